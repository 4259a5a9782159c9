import pytest
import torch
from op_inputs import DTYPES, EMPTY, SHAPES

from omni_kernels.ops import OPS
from omni_kernels.validation import oracle
from omni_kernels.validation.layouts import VIEWS, offset
from omni_kernels.validation.tolerances import assert_near


def check(implementation, x, weight=None, **options):
    y = implementation["rms_norm"](x, weight, **options)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    assert_near(y, *oracle.modulated(x, None, None, "rms", weight, **options))


@pytest.mark.parametrize("with_weight", [True, False], ids=["weight", "no weight"])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 3072), (1, 2, 8192)], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_y_is_that_of_fp64(implementation, with_weight, shape, dtypes):
    weight = implementation.randn(shape[-1], dtype=dtypes[1]) if with_weight else None
    check(implementation, implementation.randn(*shape, dtype=dtypes[0]), weight)


def test_large_odd_sample(implementation, large_blocks):
    check(implementation, implementation.randn(389, 781, dtype=torch.bfloat16), implementation.randn(781))


@pytest.mark.parametrize("D", [64, 128])
def test_heads_of_a_joint_projection_are_not_copied(triton_launch, no_copies, D):
    B, S, H = 2, 5, 3
    qkv = triton_launch.randn(B, S, 3 * H * D, dtype=torch.bfloat16)
    weight = triton_launch.randn(D, dtype=torch.bfloat16)
    q, k, v = (t.unflatten(2, (H, D)) for t in qkv.chunk(3, 2))
    views = [q, k.transpose(1, 2), v[:, 1:4], v[:, :, 1], q[:1, :, :2], q.permute(2, 1, 0, 3)]
    for view in views:
        check(triton_launch, view, weight)


def test_rows_at_more_than_three_distances(implementation):
    x = implementation.randn(3, 4, 5, 6, 20)[:, ::2, ::2, ::2]
    check(implementation, x, implementation.randn(20))


def test_eps(implementation):
    check(implementation, implementation.randn(2, 3, 100), eps=0.5)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_gives_nothing(implementation, shape):
    y = implementation["rms_norm"](implementation.randn(*shape), implementation.randn(shape[-1]))
    assert y.shape == shape


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_views_give_what_their_elements_give(implementation, view):
    x, weight = implementation.randn(3, 34, 48, dtype=torch.bfloat16), implementation.randn(48)
    check(implementation, view(x), offset(weight))


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes with numpy
@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
def test_infinities_and_nan_are_carried_in_their_row(implementation, dtypes):
    x, weight = implementation.randn(3, 9, 100, dtype=dtypes[0]), implementation.randn(100, dtype=dtypes[1])
    x[0, 0, 0], x[1, 8, 99] = float("inf"), float("nan")
    check(implementation, x, weight)
    weight[3] = float("-inf")
    check(implementation, x, weight)


def test_rows_too_long_for_a_program(triton_launch):
    long = 16385
    x, weight = triton_launch.randn(2, long), triton_launch.randn(long)
    check(triton_launch, x, weight)
    assert OPS["rms_norm"].bytes_moved(x, weight) == 4 * long * (2 + 1 + 2)
