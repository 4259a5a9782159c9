"""What only a GPU shows. The tests of each op, too, run on it where there is one: `pytest tests/ops -m gpu`."""

import importlib

import pytest
import torch
from implementations import INTERPRETED

from omni_kernels import ops
from omni_kernels.ops import OPS
from omni_kernels.validation import oracle
from omni_kernels.validation.tolerances import assert_near

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        INTERPRETED or not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU, and no TRITON_INTERPRET"
    ),
]
DEVICE = "cuda"
NAMES = sorted(OPS)
# The size of a real model's hidden states, and an odd one.
SHAPES = [(1, 4096, 3072), (2, 1023, 781)]


def arguments(name, shape, device=DEVICE):
    torch.manual_seed(0)
    h = [torch.randn(shape).to(device, torch.bfloat16) for _ in range(3)]
    row = torch.randn(shape[0], shape[2]).to(device, torch.bfloat16)
    return {
        "relative_l1": (h[0], h[1]),
        "residual_relative_l1": (h[0], h[1], h[2]),
        "modulated_relative_l1": (h[0], row, row, h[1]),
        "linear_forecast": (h[0], h[1:], [0.5, -1.5]),
        "ada_layer_norm": (h[0], row, row),
        "gate_residual_norm": (h[0], h[1], row, row, row),
        "rms_norm": (h[0], row[0]),
        "gelu": (h[0],),
        "swiglu": (h[0], h[1]),
        "qk_norm_rope": attention(h),
    }[name]


def attention(h):
    """q, k and v as heads, their places behind 7 other tokens, a weight and angles."""
    D = 128 if h[0].shape[2] % 128 == 0 else 78
    heads = [t[..., : t.shape[2] // D * D].unflatten(-1, (-1, D)) for t in h]
    B, S, H, _ = heads[0].shape
    places = (t.new_zeros(B, 7 + S, H, D)[:, 7:] for t in heads)
    angle = torch.randn(S, D // 2).to(h[0].device)
    return (*heads, *places, torch.randn(D).to(h[0]), torch.stack((angle.cos(), angle.sin()), -1))


def rope(q, k, v, q_out, k_out, v_out, weight, freqs):
    OPS["qk_norm_rope"].function(q, k, v, q_out, k_out, v_out, q_weight=weight, k_weight=weight, freqs=freqs)


FUNCTIONS = {name: op.function for name, op in OPS.items()} | {"qk_norm_rope": rope}


def run(function, inputs):
    """What a function returns or, where that is nothing, what it wrote."""
    result = function(*inputs)
    if result is None:
        return tuple(t.clone() for t in inputs[3:6])
    return result if isinstance(result, tuple) else (result,)


def results(name, *inputs):
    return run(FUNCTIONS[name], inputs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_dispatcher_runs_the_kernel_and_it_is_right(name, shape, monkeypatch):
    file = importlib.import_module(f"omni_kernels.ops.{name}")
    kernel, launched = getattr(file, f"{name}_kernel"), []

    class Recorded:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(file, f"{name}_kernel", Recorded())
    inputs = arguments(name, shape)
    got = results(name, *inputs)
    assert len(launched) == 1
    args, options = inputs, {}
    if name == "qk_norm_rope":
        *args, weight, freqs = inputs
        options = {"q_weight": weight, "k_weight": weight, "freqs": freqs}
    for value, (_, *near) in zip(got, oracle.expected(name, got, *args, **options), strict=True):
        assert_near(value, *near)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_inputs_give_the_same_bits(name):
    inputs = arguments(name, SHAPES[0])
    first = results(name, *inputs)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, results(name, *inputs), strict=True))


def test_more_than_2_to_the_31_elements():
    n = 2**31 + 4099
    x = torch.zeros(1, n, dtype=torch.bfloat16, device=DEVICE)
    x[0, -1], x[0, 2**31], x[0, 0] = 3.0, 2.0, 1.0
    y = torch.zeros_like(x)
    assert ops.relative_l1(x, y).tolist() == [[6.0, 0.0]]
    residual, _ = ops.residual_relative_l1(x, y, None)
    assert torch.equal(residual, x)
    assert ops.linear_forecast(None, [x, residual], [1.0, 2.0], out=y) is y
    assert y[0, [-1, 2**31, 0]].tolist() == [9.0, 6.0, 3.0]


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_replays_the_ops(name):
    inputs = arguments(name, SHAPES[1])
    expected = results(name, *inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(name, *inputs)
    for t in captured:
        t.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_takes_the_function_whole(name):
    torch._dynamo.reset()
    inputs = arguments(name, SHAPES[1])
    got = run(torch.compile(FUNCTIONS[name], fullgraph=True), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, results(name, *inputs), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_another_than_the_current_device(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here, there = (results(name, *arguments(name, SHAPES[1], device)) for device in ("cuda:0", "cuda:1"))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(here, there, strict=True))
