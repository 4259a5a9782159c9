"""The ops on an NPU: right, never off the device, and by torch_npu's fused operators where they are there."""

import types
from unittest import mock

import pytest
import simulated_npu
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from omni_kernels import ascend, ops, registration, validate
from omni_kernels.ascend import operators
from omni_kernels.ascend.swiglu import swiglu
from omni_kernels.device import Device, pretend
from omni_kernels.ops import OPS
from omni_kernels.validation import checks
from omni_kernels.validation.uses import USES

NPU = "npu"
#: None: without fused operators.
VERSIONS = [None, "2.6.0", "2.13.0"]

#: Which fused operators a use takes, by how its name begins, where they are there; one that is not named takes none.
TAKES = {
    "modulated_relative_l1 rms": {"npu_rms_norm"},
    "ada_layer_norm rms": {"npu_rms_norm"},
    "gate_residual_norm rms": {"npu_rms_norm"},
    "rms_norm": {"npu_rms_norm"},
    "qk_norm_rope half": {"npu_rotary_mul"},
    "qk_norm_rope cos and sin by head": {"npu_rms_norm"},
    "qk_norm_rope": {"npu_rms_norm", "npu_rotary_mul"},
    "gelu int8": set(),
    "gelu float8_e4m3fn": set(),
    "gelu": {"npu_gelu"},
}


def on_npu(value):
    return tree_map_only(torch.Tensor, lambda t: t.to(NPU), value)


def contiguous(value):
    """As a copy to another device is: on the CPU, the bits of an exponential depend on how its argument lies."""
    return tree_map_only(torch.Tensor, torch.Tensor.contiguous, value)


def equal(a, b):
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(x is y if y is None else torch.equal(x.cpu(), y) for x, y in pairs)


def of(plan):
    return [pytest.param(check, id=check.id) for check in plan]


PLAN = [checks.Check(use, checks.ODD if use.fits(checks.ODD) else checks.TINY, "contiguous") for use in USES.values()]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("check", of(PLAN))
@torch.no_grad()
def test_every_op_stays_on_the_device_and_says_what_it_takes(check, version):
    given, options = on_npu(check.use.ours(check.use.inputs(check.shape, torch.device("cpu"))))
    with simulated_npu.fused(version), simulated_npu.log() as calls:
        made = OPS[check.use.op].function(*given, **options)
    assert calls.reads == []
    assert all(t.device.type == "npu" for t in tree_leaves(made) if isinstance(t, torch.Tensor))
    assert any(name.startswith("omni_kernels::") for name in calls.names), "the op itself was called on the device"
    fused = {name.removeprefix("npu::") for name in calls.names if name.startswith("npu::")}
    takes = next((taken for name, taken in TAKES.items() if check.use.name.startswith(name)), set())
    assert fused == (takes if version else set())


@pytest.mark.parametrize("version", [None, "2.13.0"])
def test_every_op_is_right_by_the_checks_of_validate(version):
    wrong = {}
    with simulated_npu.fused(version):
        for check in checks.plan(OPS, divisor=512, quick=True):
            if check.shape.name == "odd" or check.layout == "model":
                found = checks.run(check, lambda op: OPS[op].function, torch.device(NPU), seed=0)
                wrong |= {check.id: [str(one) for one in found]} if found else {}
    assert wrong == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted({*OPS} - {"qk_norm_rope"}))
@torch.no_grad()
def test_without_fused_operators_the_bits_are_the_cpus(name, dtype):
    for use in USES.values():
        if use.op == name:
            shape = checks.Shape("small", 2, 5, 24, dtype)
            args, kwargs = contiguous(use.ours(use.inputs(shape, torch.device("cpu"))))
            expected = OPS[name].function(*args, **kwargs)
            with simulated_npu.fused(None):
                assert equal(OPS[name].function(*on_npu(args), **on_npu(kwargs)), expected)


@pytest.mark.parametrize("version", [None, "2.13.0"])
@torch.no_grad()
def test_weights_as_a_tensor_are_not_read(version):
    base, *history = torch.randn(3, 2, 5, 24)
    weights = torch.tensor([0.5, -1.5])
    given = on_npu((base, history, weights))
    with simulated_npu.fused(version), simulated_npu.log() as calls:
        out = ops.linear_forecast(*given)
    assert calls.reads == []
    torch.testing.assert_close(out.cpu(), ops.linear_forecast(base, history, weights), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("tables", ["freqs", "freqs of each sample", "cos and sin", "cos and sin of each head"])
@pytest.mark.parametrize("heads", [4, 600])
@torch.no_grad()
def test_rotations_are_the_cpus_fused_where_the_operator_takes_them(heads, tables, layout):
    q, k, v = torch.randn(3, 2, 3, heads, 8)
    by_head = tables == "cos and sin of each head"
    angle = torch.rand(2, 3, *[heads] * by_head, 4) if "each" in tables else torch.rand(3, 4)
    rotation = {"freqs": torch.stack((angle.cos(), angle.sin()), -1)}
    if "cos" in tables:
        doubled = angle.repeat_interleave(2, -1) if layout == "interleaved" else torch.cat((angle, angle), -1)
        rotation = {"cos": doubled.cos(), "sin": doubled.sin()}
    expected = [torch.empty_like(q) for _ in range(3)]
    ops.qk_norm_rope(q, k, v, *expected, q_weight=torch.ones(8), layout=layout, **rotation)
    takes = (2 * heads < 1000 and tables != "freqs of each sample") if layout == "interleaved" else True
    takes = takes and not by_head
    for version in VERSIONS:
        out = [torch.empty_like(q, device=NPU) for _ in range(3)]
        given = on_npu((q, k, v)), on_npu({"q_weight": torch.ones(8), **rotation})
        with simulated_npu.fused(version), simulated_npu.log() as calls:
            ops.qk_norm_rope(*given[0], *out, layout=layout, **given[1])
        assert ("npu::npu_rotary_mul" in calls.names) == bool(version and takes)
        assert not [name for name in calls.names if "complex" in name]
        for mine, other in zip(out, expected, strict=True):
            torch.testing.assert_close(mine.cpu(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "samples", "heads", "takes"),
    [
        ("interleaved", 1, 999, True),
        ("interleaved", 1, 1000, False),
        ("interleaved", 3, 333, True),
        ("interleaved", 4, 250, False),
        ("half", 1, 999, True),
        ("half", 1, 1000, False),
        ("half", 999, 1, True),
        ("half", 1000, 1, False),
        ("half", 4, 250, True),
    ],
)
@torch.no_grad()
def test_the_operator_is_asked_to_rotate_999_heads_at_most(layout, samples, heads, takes):
    x = torch.ones(samples, 1, heads, 4, device=NPU)
    turn = {"cos": torch.zeros(1, 4, device=NPU), "sin": torch.ones(1, 4, device=NPU)}  # by 90°
    out = [torch.empty_like(x) for _ in range(3)]
    with simulated_npu.fused("2.13.0"), simulated_npu.log() as calls:
        ops.qk_norm_rope(x, x, x, *out, layout=layout, **turn)
    assert ("npu::npu_rotary_mul" in calls.names) is takes
    turned = torch.tensor([-1.0, 1.0, -1.0, 1.0] if layout == "interleaved" else [-1.0, -1.0, 1.0, 1.0])
    assert torch.equal(out[0].cpu(), turned.expand(samples, 1, heads, 4))


@torch.no_grad()
def test_products_that_rotate_few_sizes_are_not_asked_to():
    x = torch.randn(1, 3, 2, 8, device=NPU)
    rotation = {"cos": torch.ones(3, 8, device=NPU), "sin": torch.zeros(3, 8, device=NPU)}
    out = [torch.empty_like(x) for _ in range(3)]
    for arch, takes in (("Ascend910B2", True), ("Ascend310P3", False)):
        with (
            pretend("npu", Device("ascend", arch, arch)),
            simulated_npu.fused("2.13.0"),
            simulated_npu.log() as calls,
        ):
            ops.qk_norm_rope(x, x, x, *out, **rotation)
        assert ("npu::npu_rotary_mul" in calls.names) is takes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_halves_of_one_projection_are_gated_at_once(dtype):
    packed = torch.randn(2, 5, 48).to(dtype)
    apart = [t.contiguous() for t in packed.chunk(2, -1)]
    expected = ops.swiglu(*packed.chunk(2, -1))
    for gate, up, takes in (
        (*packed.to(NPU).chunk(2, -1), True),
        (*packed.to(NPU).chunk(2, -1)[::-1], False),
        (*packed.to(NPU)[:, :3].chunk(2, -1), False),
        (*on_npu(apart), False),
        (*torch.stack(apart).to(NPU).unbind(), False),
    ):
        with simulated_npu.fused("2.13.0"), simulated_npu.log() as calls:
            out = ops.swiglu(gate, up)
        assert ("npu::npu_swiglu" in calls.names) is takes
        assert out.is_contiguous()
        if gate.shape == expected.shape and takes:
            torch.testing.assert_close(out.cpu(), expected)
            place = torch.zeros(2, 5, 36, dtype=dtype, device=NPU)[..., 12:]
            with simulated_npu.fused("2.13.0"):
                assert ops.swiglu(gate, up, out=place) is place
            torch.testing.assert_close(place.cpu(), expected)


@torch.no_grad()
def test_weights_of_another_dtype_are_rounded_once_too():
    x, weight = torch.randn(7, 24).bfloat16(), torch.randn(24)
    with simulated_npu.fused("2.13.0"), simulated_npu.log() as calls:
        out = ops.rms_norm(x.to(NPU), weight.to(NPU))
    assert "npu::npu_rms_norm" in calls.names
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.cpu(), ops.rms_norm(x, weight), rtol=2**-7, atol=0)


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)])
@torch.no_grad()
def test_empty_tensors_are_kept_from_the_fused_operators(shape):
    x = torch.empty(shape, device=NPU)
    with simulated_npu.fused("2.13.0"), simulated_npu.log() as calls:
        for made in (ops.rms_norm(x), ops.gelu(x), ops.swiglu(*x.chunk(2, -1))):
            assert made.shape[:-1] == x.shape[:-1]
    assert not [name for name in calls.names if name.startswith("npu::")]


@pytest.mark.parametrize(
    "schema",
    [
        "npu_rms_norm(Tensor input, Tensor gamma, Tensor beta, float epsilon=1e-6) -> (Tensor, Tensor)",
        "npu_rms_norm(Tensor input, Tensor gamma, *, float epsilon=1e-6) -> (Tensor, Tensor)",
        "npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-6) -> Tensor",
        "npu_rms_norm(Tensor input, Tensor gamma, float epsilon, int axis) -> (Tensor, Tensor)",
        "npu_rms_norm(Tensor input, Tensor gamma) -> (Tensor, Tensor)",
    ],
)
@torch.no_grad()
def test_an_operator_that_does_not_take_the_call_is_left_alone(schema):
    x = torch.randn(3, 24)
    operators.fused.cache_clear()
    with torch.library._scoped_library("npu", "FRAGMENT") as library, simulated_npu.log() as calls:
        library.define(schema)
        out = ops.rms_norm(x.to(NPU))
    assert "npu::npu_rms_norm" not in calls.names
    assert torch.equal(out.cpu(), ops.rms_norm(x))


def test_validate_finds_the_device_and_says_what_runs_there():
    assert validate.find_device(None) == torch.device("npu")
    assert validate.find_device("npu:1") is None
    for version, words in ((None, "plain torch"), ("2.6.0", ", ".join((*operators.CALLS, "plain torch")))):
        with simulated_npu.fused(version), mock.patch.object(validate, "interpreted", return_value=False):
            assert validate.implementation_on(torch.device("npu"))[0] == words


@torch.no_grad()
def test_what_is_there_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(operators, "takes", lambda *args: asked.append(args) or False)
    x = torch.randn(3, 24, device=NPU)
    with simulated_npu.fused("2.13.0"):
        for _ in range(3):
            ops.rms_norm(x)
        assert [call for _, call in asked] == [operators.CALLS["npu_rms_norm"]]


def test_triton_runs_where_it_compiles_for_npus_and_is_asked_for_or_proven(monkeypatch):
    def chosen(name):
        return ascend.implementation(name, "plain", "kernel")

    assert chosen("relative_l1") == "plain"
    monkeypatch.setenv(ascend.TRITON_VARIABLE, "relative_l1, gelu")
    assert chosen("relative_l1") == "plain", "Triton has no driver for NPUs here"
    monkeypatch.setattr(ascend, "triton_compiles", lambda: True)
    assert chosen("relative_l1") == chosen("gelu") == "kernel"
    assert chosen("swiglu") == "plain"
    assert callable(ascend.implementation("swiglu", "plain", "kernel", swiglu))
    monkeypatch.setenv(ascend.TRITON_VARIABLE, "all")
    assert {chosen(name) for name in OPS} == {"kernel"}
    monkeypatch.delenv(ascend.TRITON_VARIABLE)
    assert chosen("relative_l1") == "plain"
    monkeypatch.setattr(ascend, "PROVEN", frozenset({"linear_forecast"}))
    assert (chosen("linear_forecast"), chosen("gelu")) == ("kernel", "plain")


def test_no_kernel_is_called_proven_that_was_not_run_on_an_npu():
    assert frozenset() == ascend.PROVEN


def test_the_active_driver_of_triton_says_what_it_compiles_for(monkeypatch):
    from triton.runtime.driver import driver

    assert not ascend.triton_compiles()
    for backend, compiles in (("npu", True), ("cuda", False)):
        target = types.SimpleNamespace(backend=backend)
        monkeypatch.setattr(driver, "_active", types.SimpleNamespace(get_current_target=lambda t=target: t))
        assert ascend.triton_compiles() is compiles


@torch.no_grad()
def test_triton_kernels_run_on_tensors_of_the_device_and_are_chosen_once(monkeypatch):
    monkeypatch.setattr(ascend, "triton_compiles", lambda: True)
    monkeypatch.setenv(ascend.TRITON_VARIABLE, "relative_l1")
    chosen, choose, op = [], ascend.implementation, OPS["relative_l1"]
    monkeypatch.setattr(ascend, "implementation", lambda *args: chosen.append(args) or choose(*args))
    run = registration._on_npu("relative_l1", op.reference, op.launcher, None)
    x, y = torch.randn(2, 2, 50)
    for _ in range(2):
        torch.testing.assert_close(run(x.to(NPU), y.to(NPU)).cpu(), ops.relative_l1(x, y))
    assert chosen == [("relative_l1", op.reference, op.launcher, None)]


def test_a_gradient_is_refused_on_the_device():
    x = torch.ones(2, 3, device=NPU).requires_grad_()
    with pytest.raises(RuntimeError, match="swiglu: up requires a gradient"):
        ops.swiglu(x.detach(), x)
