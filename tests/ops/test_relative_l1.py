import pytest
import torch
from op_inputs import DTYPES, EMPTY, SHAPES

from omni_kernels.validation import oracle
from omni_kernels.validation.layouts import VIEWS
from omni_kernels.validation.tolerances import assert_near


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_sums_are_those_of_fp64(implementation, shape, dtypes):
    x, y = (implementation.randn(*shape, dtype=dtype) for dtype in dtypes[:2])
    sums = implementation["relative_l1"](x, y)
    assert sums.dtype == torch.float32
    assert_near(sums, oracle.relative_l1(x, y))


def test_every_row_of_an_odd_matrix_is_a_sample(implementation, large_blocks):
    x, y = (implementation.randn(183, 781, dtype=torch.bfloat16) for _ in range(2))
    assert_near(implementation["relative_l1"](x, y), oracle.relative_l1(x, y))


@pytest.mark.parametrize("dtypes", DTYPES[1:4], ids=str)
def test_large_odd_sample(implementation, large_blocks, dtypes):
    x, y = (implementation.randn(1, 1823, 781, dtype=dtype) for dtype in dtypes[:2])
    assert_near(implementation["relative_l1"](x, y), oracle.relative_l1(x, y))


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_sums_of_nothing_are_zero(implementation, shape):
    x, y = (implementation.randn(*shape) for _ in range(2))
    assert torch.equal(implementation["relative_l1"](x, y).cpu(), torch.zeros(shape[0], 2))


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_views_count_their_own_elements(implementation, view):
    x, y = (implementation.randn(3, 34, 48, dtype=torch.bfloat16) for _ in range(2))
    for a, b in ((view(x), y), (x, view(y)), (view(x), view(y))):
        assert_near(implementation["relative_l1"](a, b), oracle.relative_l1(a, b))


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes with numpy
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_infinities_and_nan_reach_the_sums_of_their_sample(implementation, dtypes):
    x, y = (implementation.randn(5, 9, 100, dtype=dtype) for dtype in dtypes[:2])
    x[0, 0, 0], y[1, 8, 99], x[2, 3, 4] = float("inf"), float("-inf"), float("nan")
    x[3, 1, 1] = y[3, 1, 1] = float("inf")
    sums = implementation["relative_l1"](x, y).cpu()
    inf, nan = float("inf"), float("nan")
    special = torch.tensor([[inf, 0], [inf, inf], [nan, 0], [nan, inf], [0, 0]])
    assert_near(torch.where(special == 0, special, sums), special)
    assert_near(sums, oracle.relative_l1(x, y))


def test_equal_inputs_are_at_distance_zero(implementation):
    x = implementation.randn(2, 33, 129, dtype=torch.bfloat16)
    assert implementation["relative_l1"](x, x.clone())[:, 0].tolist() == [0, 0]
