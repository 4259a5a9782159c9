"""Our calls of torch_npu's operators, by the schemas that its wheels register."""

import ast
import json
import os
from pathlib import Path

import pytest
import simulated_npu
import torch

from omni_kernels.ascend import operators

DATA = json.loads(simulated_npu.SCHEMAS.read_text(encoding="utf-8"))
#: A directory in which a wheel of torch-npu, of a version that the data has, is unzipped.
WHEEL = "OMNI_TEST_TORCH_NPU_WHEEL"


def wheel():
    """(its version, its directory)."""
    root = Path(os.environ.get(WHEEL, ""))
    if WHEEL not in os.environ or not (root / "torch_npu").is_dir():
        pytest.skip(f"{WHEEL} names no directory with a wheel of torch-npu")
    (info,) = root.glob("torch_npu-*.dist-info")
    version = info.name.split("-")[1].removesuffix(".dist")
    return version, root / "torch_npu"


@pytest.mark.parametrize("version", DATA["versions"])
def test_every_call_is_taken_by_the_operators_of_a_version(version):
    schemas = simulated_npu.schemas(version)
    assert schemas.keys() == operators.CALLS.keys() == DATA["meta"].keys() == simulated_npu.FUSED.keys()
    for name, call in operators.CALLS.items():
        assert operators.takes(torch._C.parse_schema(schemas[name]), call)


@pytest.mark.parametrize("version", DATA["versions"])
def test_the_operators_are_found_by_what_can_be_called(version):
    assert {name: operators.fused(name) for name in operators.CALLS} == dict.fromkeys(operators.CALLS)
    with simulated_npu.fused(version):
        assert all(operators.fused(name) is getattr(torch.ops.npu, name).default for name in operators.CALLS)
    assert operators.fused("npu_gelu") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("version", DATA["versions"])
def test_the_played_operators_return_what_the_meta_kernels_do(version, dtype):
    x = torch.randn(2, 3, 4, 8, device="npu").to(dtype)
    calls = {
        "npu_rms_norm": ((x, x[0, 0, 0], 1e-6), [(x.shape, dtype), ((2, 3, 4, 1), torch.float32)]),
        "npu_rotary_mul": ((x, x[:1, :, :1], x[:1, :, :1], "half"), [(x.shape, dtype)]),
        "npu_swiglu": ((x, -1), [((2, 3, 4, 4), dtype)]),
        "npu_gelu": ((x,), [(x.shape, dtype)]),
    }
    with simulated_npu.fused(version):
        for name, (args, expected) in calls.items():
            made = getattr(torch.ops.npu, name)(*args)
            made = made if isinstance(made, tuple) else (made,)
            assert [(tuple(t.shape), t.dtype) for t in made] == [(tuple(shape), kind) for shape, kind in expected]


def test_the_data_is_what_a_wheel_registers():
    version, package = wheel()
    registered = (package / "lib" / "libtorch_npu.so").read_bytes()
    for schema in simulated_npu.schemas(version).values():
        assert schema.encode() in registered


def test_a_wheels_meta_kernels_take_our_calls_and_return_what_is_expected():
    """The functions of its source, run by themselves: the package cannot be imported without CANN."""
    _, package = wheel()
    source = ast.parse((package / "op_plugin" / "meta" / "_meta_registrations.py").read_text(encoding="utf-8"))
    kernels = {}
    for node in source.body:
        if isinstance(node, ast.FunctionDef):
            names = [ast.literal_eval(d.args[1]) for d in node.decorator_list if isinstance(d, ast.Call) and d.args[1:]]
            node.decorator_list = []
            for name in {*names} & operators.CALLS.keys():
                scope = {"torch": torch, "math": __import__("math")}
                exec(compile(ast.Module([node], []), node.name, "exec"), scope)
                kernels[name] = scope[node.name]
    assert kernels.keys() == operators.CALLS.keys()
    x = torch.empty(2, 3, 4, 8, dtype=torch.bfloat16, device="meta")
    normed, rstd = kernels["npu_rms_norm"](x, x[0, 0, 0], 1e-6)
    assert (normed.shape, normed.dtype, rstd.shape, rstd.dtype) == (x.shape, x.dtype, (2, 3, 4, 1), torch.float32)
    for made, shape in (
        (kernels["npu_rotary_mul"](x, x[:1, :, :1], x[:1, :, :1], "interleave"), x.shape),
        (kernels["npu_swiglu"](x, -1), (2, 3, 4, 4)),
        (kernels["npu_gelu"](x, approximate="tanh"), x.shape),
    ):
        assert (made.shape, made.dtype) == (shape, x.dtype)
