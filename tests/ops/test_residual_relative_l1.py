import pytest
import torch
from op_inputs import DTYPES, EMPTY, SHAPES

from omni_kernels.validation import oracle
from omni_kernels.validation.layouts import VIEWS
from omni_kernels.validation.tolerances import assert_near


def check(implementation, h_out, h_in, r_prev):
    residual, sums = implementation["residual_relative_l1"](h_out, h_in, r_prev)
    assert residual.dtype == h_out.dtype
    assert residual.is_contiguous()
    assert sums.dtype == torch.float32
    assert_near(residual, h_out.double() - h_in.double())
    # The sums are of the residual as it was rounded.
    assert_near(sums, oracle.sums(r_prev.double() - residual.double(), r_prev))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_residual_and_sums_are_those_of_fp64(implementation, shape, dtypes):
    check(implementation, *(implementation.randn(*shape, dtype=dtype) for dtype in dtypes))


def test_every_row_of_an_odd_matrix_is_a_sample(implementation, large_blocks):
    check(implementation, *(implementation.randn(183, 781, dtype=torch.bfloat16) for _ in range(3)))


@pytest.mark.parametrize("dtypes", DTYPES[1:4], ids=str)
def test_large_odd_sample(implementation, large_blocks, dtypes):
    check(implementation, *(implementation.randn(1, 1823, 781, dtype=dtype) for dtype in dtypes))


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_gives_nothing_and_zeros(implementation, shape):
    h_out, h_in, r_prev = (implementation.randn(*shape) for _ in range(3))
    residual, sums = implementation["residual_relative_l1"](h_out, h_in, r_prev)
    assert residual.shape == shape
    assert torch.equal(sums.cpu(), torch.zeros(shape[0], 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(7,), (2, 33, 129)], ids=str)
def test_without_an_earlier_residual_the_sums_are_zero(implementation, shape, dtype):
    h_out, h_in = (implementation.randn(*shape, dtype=dtype) for _ in range(2))
    residual, sums = implementation["residual_relative_l1"](h_out, h_in, None)
    assert_near(residual, h_out.double() - h_in.double())
    assert torch.equal(sums.cpu(), torch.zeros(shape[0], 2))


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_views_give_what_their_elements_give(implementation, view):
    plain = [implementation.randn(3, 34, 48, dtype=torch.bfloat16) for _ in range(3)]
    for viewed in range(3):
        check(implementation, *(view(t) if j == viewed else t for j, t in enumerate(plain)))
    check(implementation, *(view(t) for t in plain))


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes with numpy
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_infinities_and_nan_are_carried(implementation, dtypes):
    h_out, h_in, r_prev = (implementation.randn(5, 9, 100, dtype=dtype) for dtype in dtypes)
    h_out[0, 0, 0], h_in[1, 8, 99], r_prev[2, 3, 4] = float("inf"), float("-inf"), float("nan")
    h_out[3, 1, 1] = h_in[3, 1, 1] = float("inf")
    check(implementation, h_out, h_in, r_prev)


def test_a_repeated_residual_is_at_distance_zero(implementation):
    h_out, h_in = (implementation.randn(2, 33, 129, dtype=torch.bfloat16) for _ in range(2))
    residual, _ = implementation["residual_relative_l1"](h_out, h_in, None)
    again, sums = implementation["residual_relative_l1"](h_out, h_in, residual)
    assert torch.equal(residual, again)
    assert sums[:, 0].tolist() == [0, 0]
