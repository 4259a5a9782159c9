"""gelu and swiglu."""

import pytest
import torch
import torch.nn.functional as F
from op_inputs import DTYPES, EMPTY, SHAPES, far_apart

from omni_kernels.ops import gelu
from omni_kernels.validation import oracle
from omni_kernels.validation.layouts import VIEWS
from omni_kernels.validation.tolerances import assert_near

OPS = ["gelu", "swiglu"]
ORACLES = {"gelu": oracle.gelu, "swiglu": lambda gate, up: (oracle.swiglu(gate, up), None)}


def check(implementation, op, *inputs):
    inputs = inputs[: 1 + (op == "swiglu")]
    result = implementation[op](*inputs)
    assert result.dtype == inputs[0].dtype
    assert result.is_contiguous()
    assert_near(result, *ORACLES[op](*inputs))


every_op = pytest.mark.parametrize("op", OPS)


@every_op
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_activation_is_that_of_fp64(implementation, op, shape, dtypes):
    check(implementation, op, *(implementation.randn(*shape, dtype=dtype).mul_(2) for dtype in dtypes[:2]))


@every_op
@pytest.mark.parametrize("dtypes", DTYPES[1:4], ids=str)
def test_large_odd_input(implementation, large_blocks, op, dtypes):
    check(implementation, op, *(implementation.randn(1, 1823, 781, dtype=dtype) for dtype in dtypes[:2]))


@every_op
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_gives_nothing(implementation, op, shape):
    inputs = (implementation.randn(*shape) for _ in range(1 + (op == "swiglu")))
    assert implementation[op](*inputs).shape == shape


@every_op
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_views_give_what_their_elements_give(implementation, op, view):
    gate, up = (implementation.randn(2, 5, 48, dtype=torch.bfloat16) for _ in range(2))
    check(implementation, op, view(gate), up)
    check(implementation, op, view(gate), view(up))


@pytest.mark.parametrize("D", [48, 2055])
def test_halves_of_a_packed_projection_are_not_copied(implementation, monkeypatch, D):
    packed = implementation.randn(2, 5, 2 * D, dtype=torch.bfloat16)
    copied, contiguous = [], torch.Tensor.contiguous
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda t: contiguous(t) if t.is_contiguous() else copied.append(t) or contiguous(t)
    )
    check(implementation, "swiglu", *packed.chunk(2, -1))
    assert not copied


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes with numpy
@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_infinities_nan_and_large_numbers_are_carried(implementation, op, dtype):
    x = implementation.randn(2, 9, 100, dtype=dtype)
    x[0, 0, :5] = torch.tensor([float("inf"), float("-inf"), float("nan"), 6e4, -6e4], dtype=dtype)
    up = torch.ones_like(x)
    up[1, 2, 3] = float("-inf")
    check(implementation, op, x, up)
    expected = F.gelu(x.float(), approximate="tanh") if op == "gelu" else F.silu(x.float()) * up
    got = implementation[op](*(x, up)[: 1 + (op == "swiglu")]).float()
    assert torch.equal(got.isnan(), expected.isnan())


@every_op
def test_samples_far_apart(triton_launch, op):
    gate, up = (triton_launch.randn(3, 5, 48, dtype=torch.bfloat16) for _ in range(2))
    inputs = (gate, up)[: 1 + (op == "swiglu")]
    assert torch.equal(triton_launch[op](*map(far_apart, inputs)), triton_launch[op](*inputs))


@every_op
@pytest.mark.parametrize("view", [lambda t: t, *VIEWS[:-1]], ids=lambda view: view.__name__)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)], ids=str)
def test_output_is_written_where_it_is_to_be(implementation, op, view, dtypes):
    inputs = [implementation.randn(2, 5, 48, dtype=dtypes[0]) for _ in range(1 + (op == "swiglu"))]
    out = view(torch.full_like(inputs[0], 42.0, dtype=dtypes[1]))
    around = out.untyped_storage().nbytes() // out.element_size()
    memory = torch.as_strided(out, (around,), (1,), 0)
    others = torch.ones(around, dtype=torch.bool, device=out.device)
    others.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(False)
    before = memory[others].clone()
    assert implementation[op](*inputs, out=out) is out
    assert_near(out, *ORACLES[op](*inputs))
    assert torch.equal(memory[others], before)


@every_op
@pytest.mark.parametrize("place", [0, 1])
def test_output_may_be_an_input(implementation, op, place):
    inputs = [implementation.randn(2, 5, 48, dtype=torch.float16) for _ in range(1 + (op == "swiglu"))]
    expected = implementation[op](*inputs)
    assert torch.equal(implementation[op](*inputs, out=inputs[place % len(inputs)]), expected)


def test_behind_other_channels_nothing_is_copied(implementation, no_copies):
    packed = implementation.randn(2, 5, 60)
    first = packed[..., :12].clone()
    x = implementation.randn(2, 5, 48)
    assert_near(implementation["gelu"](x, out=packed[..., 12:]), *oracle.gelu(x))
    gate, up = implementation.randn(2, 5, 96).chunk(2, -1)
    assert_near(implementation["swiglu"](gate, up, out=packed[..., 12:]), oracle.swiglu(gate, up), None)
    assert torch.equal(packed[..., :12], first)


def test_torch_compile_writes_behind_other_channels():
    torch._dynamo.reset()

    def fill(x):
        packed = x.new_zeros(2, 5, 60)
        gelu(x, out=packed[..., 12:])
        return packed + 1

    x = torch.randn(2, 5, 48)
    assert torch.equal(torch.compile(fill, fullgraph=True, backend="aot_eager")(x), fill(x))
