import pytest
import torch
from op_inputs import DTYPES

from omni_kernels.ops import OPS
from omni_kernels.validation import oracle
from omni_kernels.validation.layouts import VIEWS, channels, offset
from omni_kernels.validation.tolerances import assert_near

SHAPES = [(1, 1, 1), (1, 7, 1), (1, 1, 7), (3, 5, 17), (2, 33, 129), (2, 10, 3072)]


def check(implementation, h, scale, shift, m_prev, **options):
    m, sums = implementation["modulated_relative_l1"](h, scale, shift, m_prev, **options)
    assert m.dtype == h.dtype
    assert m.is_contiguous()
    assert sums.dtype == torch.float32
    expected, terms = oracle.modulated(h, scale, shift, **options)
    assert_near(m, expected, terms)
    # The sums are of m as it was rounded.
    if m_prev is None:
        assert torch.equal(sums.cpu(), torch.zeros(h.shape[0], 2))
    else:
        assert_near(sums, oracle.sums(m.double() - m_prev.double(), m_prev))


def inputs(implementation, shape, dtypes=DTYPES[0]):
    """h, scale, shift, m_prev."""
    B, _, D = shape
    h, m_prev = (implementation.randn(*shape, dtype=dtype) for dtype in dtypes[:2])
    scale, shift = (implementation.randn(B, D, dtype=dtypes[2]) for _ in range(2))
    return h, scale, shift, m_prev


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_m_and_sums_are_those_of_fp64(implementation, norm, shape, dtypes):
    check(implementation, *inputs(implementation, shape, dtypes), norm=norm)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_large_odd_sample(implementation, large_blocks, norm):
    check(implementation, *inputs(implementation, (1, 1823, 781), DTYPES[2]), norm=norm)


@pytest.mark.parametrize("form", ["[B, D]", "[B, 1, D]", "[1, D]", "[1, 1, D]", "[B, S, D]", "[1, S, D]"])
def test_forms_of_scale_and_shift(implementation, form):
    B, S, D = 3, 10, 48
    h, _, _, m_prev = inputs(implementation, (B, S, D))
    shape = [{"B": B, "S": S, "D": D, "1": 1}[size] for size in form[1:-1].split(", ")]
    scale, shift = (implementation.randn(*shape) for _ in range(2))
    check(implementation, h, scale, shift, m_prev)
    # One may be per token and the other not.
    check(implementation, h, scale, implementation.randn(B, D), m_prev)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("without", ["shift", "m_prev", "shift and m_prev"])
def test_shift_and_m_prev_may_be_missing(implementation, norm, without):
    h, scale, shift, m_prev = inputs(implementation, (2, 33, 129), DTYPES[3])
    shift = None if "shift" in without else shift
    m_prev = None if "m_prev" in without else m_prev
    check(implementation, h, scale, shift, m_prev, norm=norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_weight_and_eps(implementation, norm, dtype):
    weight = implementation.randn(129, dtype=dtype)
    check(implementation, *inputs(implementation, (2, 33, 129)), norm=norm, weight=weight, eps=0.5)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes with numpy
def test_no_eps_and_constant_rows(implementation):
    h, scale, shift, m_prev = inputs(implementation, (2, 3, 100))
    m, sums = implementation["modulated_relative_l1"](torch.ones_like(h), scale, shift, m_prev, norm="rms", eps=0.0)
    assert_near(
        m,
        (1 + scale.double() + shift.double())[:, None].expand(h.shape),
        2 + scale[:, None].abs() + shift.abs()[:, None],
    )
    assert_near(sums, oracle.sums(m.double() - m_prev.double(), m_prev))


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_nothing_gives_nothing_and_zeros(implementation, shape):
    m, sums = implementation["modulated_relative_l1"](*inputs(implementation, shape))
    assert m.shape == shape
    assert torch.equal(sums.cpu(), torch.zeros(shape[0], 2))


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_views_give_what_their_elements_give(implementation, view):
    h, _, _, m_prev = inputs(implementation, (3, 34, 48), DTYPES[2])
    scale, shift = (implementation.randn(3, 34, 48) for _ in range(2))
    check(implementation, view(h), view(scale), view(shift), view(m_prev))


@pytest.mark.parametrize("view", [channels, offset], ids=lambda view: view.__name__)
def test_a_chunk_of_the_modulation_is_read_in_place(implementation, view):
    h, scale, shift, m_prev = inputs(implementation, (2, 5, 48), DTYPES[2])
    weight = view(implementation.randn(1, 48))[0]
    check(implementation, h, view(scale), view(shift), m_prev, weight=weight)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes with numpy
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
def test_infinities_and_nan_are_carried(implementation, norm, dtypes):
    h, scale, shift, m_prev = inputs(implementation, (6, 9, 100), dtypes)
    h[0, 0, 0], h[1, 8, 99], scale[2, 3] = float("inf"), float("nan"), float("nan")
    shift[3, 99], m_prev[4, 8, 99] = float("-inf"), float("nan")
    check(implementation, h, scale, shift, m_prev, norm=norm)


def test_large_offsets_do_not_cancel_the_variance(implementation):
    h, scale, shift, m_prev = inputs(implementation, (2, 4, 256))
    check(implementation, h + 1000, scale, shift, m_prev)


def test_rows_too_long_for_a_program(triton_launch):
    long = 16385
    h, scale, shift, m_prev = inputs(triton_launch, (1, 2, long))
    check(triton_launch, h, scale, shift, m_prev)
    assert OPS["modulated_relative_l1"].bytes_moved(h, scale, shift, m_prev) == 4 * long * (2 + 1 + 1 + 2 + 2) + 8
