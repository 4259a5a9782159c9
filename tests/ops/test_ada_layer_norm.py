import pytest
import torch
from op_inputs import DTYPES

from omni_kernels.ops import OPS
from omni_kernels.validation import oracle
from omni_kernels.validation.layouts import VIEWS, channels, first_tokens, offset
from omni_kernels.validation.tolerances import assert_near

SHAPES = [(1, 1, 1), (1, 7, 1), (1, 1, 7), (3, 5, 17), (2, 33, 129), (2, 3, 3072)]


def check(implementation, x, scale, shift=None, **options):
    y = implementation["ada_layer_norm"](x, scale, shift, **options)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    assert_near(y, *oracle.modulated(x, scale, shift, **options))


def inputs(implementation, shape, dtypes=DTYPES[0], rows=None):
    """x, scale, shift."""
    B, _, D = shape
    x = implementation.randn(*shape, dtype=dtypes[0])
    return x, *(implementation.randn(rows or B, D, dtype=dtype) for dtype in dtypes[1:])


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_y_is_that_of_fp64(implementation, norm, shape, dtypes):
    check(implementation, *inputs(implementation, shape, dtypes), norm=norm)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_large_odd_sample(implementation, large_blocks, norm):
    check(implementation, *inputs(implementation, (1, 389, 781), DTYPES[2]), norm=norm)


@pytest.mark.parametrize("D", [3840, 5120, 8192])
def test_a_row_to_a_program(implementation, D):
    check(implementation, *inputs(implementation, (1, 2, D), DTYPES[3]), weight=implementation.randn(D))


@pytest.mark.parametrize("form", ["[B, D]", "[B, 1, D]", "[1, D]", "[1, 1, D]", "[B, S, D]", "[1, S, D]"])
def test_forms_of_scale_and_shift(implementation, form):
    B, S, D = 3, 10, 48
    x, _, row = inputs(implementation, (B, S, D))
    shape = [{"B": B, "S": S, "D": D, "1": 1}[size] for size in form[1:-1].split(", ")]
    scale, shift = (implementation.randn(*shape) for _ in range(2))
    check(implementation, x, scale, shift)
    check(implementation, x, scale, row)  # one may be per token and the other not


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("without", ["scale", "shift", "scale and shift"])
def test_scale_and_shift_may_be_missing(implementation, norm, without):
    x, scale, shift = inputs(implementation, (2, 33, 129), DTYPES[3])
    check(implementation, x, *(None if name in without else t for name, t in (("scale", scale), ("shift", shift))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("with_scale", [True, False], ids=["modulated", "plain"])
def test_weight_bias_and_eps(implementation, norm, dtype, with_scale):
    x, scale, shift = inputs(implementation, (2, 5, 129), (dtype, torch.float32, torch.float32))
    weight, bias = (implementation.randn(129, dtype=dtype) for _ in range(2))
    given = (scale, shift) if with_scale else (None, None)
    check(implementation, x, *given, norm=norm, weight=weight, bias=bias, eps=0.5)
    check(implementation, x, *given, norm=norm, bias=bias)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool], ids=str)
def test_an_index_selects_a_tokens_row(implementation, dtype):
    x, scale, shift = inputs(implementation, (2, 9, 129), rows=4)
    index = (torch.arange(18).reshape(2, 9) % 3 == 0).to(implementation.device, dtype)
    check(implementation, x, scale, shift, index=index)


@pytest.mark.parametrize("view", [first_tokens, lambda t: t.T.contiguous().T, lambda t: t[:1].expand(t.shape)])
def test_views_of_an_index(implementation, view):
    x, scale, shift = inputs(implementation, (3, 9, 40), DTYPES[2], rows=6)
    # Whatever is not 0 is the second.
    index = view(torch.tensor([[0, 1, 0, 0, 2, -1, 0, 1, 1], [1] * 9, [0] * 9]).to(implementation.device))
    check(implementation, x, channels(scale), None, index=index)
    check(implementation, x[:1], scale[:2], shift[:2], index=index[:1])


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes with numpy
def test_no_eps_and_constant_rows(implementation):
    x, scale, shift = inputs(implementation, (2, 3, 100))
    y = implementation["ada_layer_norm"](torch.ones_like(x), scale, shift, norm="rms", eps=0.0)
    assert_near(
        y, (1 + scale.double() + shift.double())[:, None].expand(x.shape), (2 + scale.abs() + shift.abs())[:, None]
    )


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_nothing_gives_nothing(implementation, shape):
    x, scale, shift = inputs(implementation, shape)
    y = implementation["ada_layer_norm"](x, scale, shift)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_views_give_what_their_elements_give(implementation, view):
    x, _, _ = inputs(implementation, (3, 34, 48), DTYPES[2])
    scale, shift = (implementation.randn(3, 34, 48) for _ in range(2))
    check(implementation, view(x), view(scale), view(shift))


@pytest.mark.parametrize("view", [channels, offset], ids=lambda view: view.__name__)
def test_chunks_of_the_modulation_give_what_their_elements_give(implementation, view):
    x, scale, shift = inputs(implementation, (2, 5, 48), DTYPES[2])
    weight, bias = (view(implementation.randn(1, 48))[0] for _ in range(2))
    check(implementation, x, view(scale), view(shift), weight=weight, bias=bias)


@pytest.mark.parametrize("form", ["[B, D]", "[B, 1, D]", "[B, S, D]", "[2B, D]"])
def test_chunks_of_one_projection_are_not_copied(triton_launch, no_copies, form):
    B, S, D = 2, 5, 48
    shape = {"[B, D]": (B, 6 * D), "[B, 1, D]": (B, 1, 6 * D), "[B, S, D]": (B, S, 6 * D), "[2B, D]": (2 * B, 6 * D)}
    x = channels(triton_launch.randn(B, S, D, dtype=torch.bfloat16))
    shift, scale, *_ = triton_launch.randn(*shape[form]).chunk(6, -1)
    index = torch.arange(B * S).reshape(S, B).T.to(triton_launch.device) % 2 if form == "[2B, D]" else None
    check(triton_launch, x, scale, shift, index=index)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes with numpy
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
def test_infinities_and_nan_are_carried_in_their_token(implementation, norm, dtypes):
    x, scale, shift = inputs(implementation, (4, 9, 100), dtypes)
    x[0, 0, 0], x[1, 8, 99], scale[2, 3], shift[3, 99] = float("inf"), float("nan"), float("nan"), float("-inf")
    check(implementation, x, scale, shift, norm=norm)


def test_large_offsets_do_not_cancel_the_variance(implementation):
    x, scale, shift = inputs(implementation, (2, 4, 256))
    check(implementation, x + 1000, scale, shift)


def test_rows_too_long_for_a_program(triton_launch):
    long = 8193
    x, scale, shift = inputs(triton_launch, (1, 2, long))
    check(triton_launch, x, scale, shift)
    assert OPS["ada_layer_norm"].bytes_moved(x, scale, shift) == 4 * long * (2 + 1 + 1 + 2)
