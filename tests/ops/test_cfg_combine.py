import pytest
import torch
from op_inputs import DTYPES, EMPTY, SHAPES, far_apart

from omni_kernels.validation import oracle
from omni_kernels.validation.layouts import VIEWS
from omni_kernels.validation.tolerances import assert_near

# The interpreter computes with numpy; lanes outside of a tile hold 0 / 0.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

RESCALINGS = [None, "token"]
every_rescaling = pytest.mark.parametrize("rescale", RESCALINGS)


def check(implementation, cond, uncond, scale=4.0, rescale=None):
    result = implementation["cfg_combine"](cond, uncond, scale, rescale=rescale)
    assert result.dtype == cond.dtype
    assert result.is_contiguous()
    assert_near(result, *oracle.cfg_combine(cond, uncond, scale, rescale))


@every_rescaling
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_combination_is_that_of_fp64(implementation, rescale, shape, dtypes):
    check(implementation, *(implementation.randn(*shape, dtype=dtype) for dtype in dtypes[:2]), rescale=rescale)


@every_rescaling
@pytest.mark.parametrize("scale", [0, 1, 1.0 + 5.0, -0.5])
def test_scales(implementation, rescale, scale):
    check(implementation, implementation.randn(2, 7, 64), implementation.randn(2, 7, 64), scale, rescale)


@every_rescaling
def test_large_odd_sample(implementation, large_blocks, rescale):
    check(implementation, *(implementation.randn(1, 1823, 781, dtype=torch.float16) for _ in range(2)), rescale=rescale)


@every_rescaling
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_gives_nothing(implementation, rescale, shape):
    inputs = (implementation.randn(*shape) for _ in range(2))
    assert implementation["cfg_combine"](*inputs, 4.0, rescale=rescale).shape == shape


@every_rescaling
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_views_give_what_their_elements_give(implementation, rescale, view):
    cond, uncond = (implementation.randn(2, 5, 48, dtype=torch.bfloat16) for _ in range(2))
    check(implementation, view(cond), uncond, rescale=rescale)
    check(implementation, view(cond), view(uncond), rescale=rescale)


@every_rescaling
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_infinities_and_nan_are_carried(implementation, rescale, dtypes):
    cond, uncond = (implementation.randn(3, 9, 100, dtype=dtype) for dtype in dtypes[:2])
    cond[0, 0, 0], uncond[1, 8, 99], cond[2, 3, 4] = float("inf"), float("-inf"), float("nan")
    cond[2, 4, 4] = uncond[2, 4, 4] = float("inf")
    check(implementation, cond, uncond, rescale=rescale)


def test_equal_predictions_are_returned_as_they_are(implementation):
    cond = implementation.randn(2, 33, 65)
    assert torch.equal(implementation["cfg_combine"](cond, cond.clone(), 4.0), cond)


def test_vectors_of_norm_zero_give_nan_as_in_diffusers(implementation):
    cond = implementation.randn(1, 3, 8)
    cond[0, 1] = 0
    result = implementation["cfg_combine"](cond, cond.clone(), 4.0, rescale="token")
    assert result.isnan().all(-1).tolist() == [[False, True, False]]
    assert_near(result[:, ::2], cond[:, ::2].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_qwen_images_pipeline_computes(implementation, dtype):
    noise_pred, neg_noise_pred = (implementation.randn(1, 64, 64, dtype=dtype) for _ in range(2))
    comb_pred = neg_noise_pred + 4.0 * (noise_pred - neg_noise_pred)
    theirs = comb_pred * (torch.norm(noise_pred, dim=-1, keepdim=True) / torch.norm(comb_pred, dim=-1, keepdim=True))
    ours = implementation["cfg_combine"](noise_pred, neg_noise_pred, 4.0, rescale="token")
    exact, _ = oracle.cfg_combine(noise_pred, neg_noise_pred, 4.0, "token")
    if dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    else:  # theirs rounds six times, ours once
        assert (ours.double() - exact).norm() < (theirs.double() - exact).norm()


def test_what_z_images_pipeline_computes(implementation):
    pos, neg = (implementation.randn(2, 16, 1, 8, 8) for _ in range(2))
    torch.testing.assert_close(implementation["cfg_combine"](pos, neg, 1 + 4.0), pos + 4.0 * (pos - neg))


def test_rows_too_long_for_a_program(triton_launch):
    cond, uncond = (triton_launch.randn(2, 16385) for _ in range(2))
    check(triton_launch, cond, uncond, rescale="token")


@every_rescaling
def test_samples_far_apart(triton_launch, rescale):
    run = triton_launch["cfg_combine"]
    cond, uncond = (triton_launch.randn(3, 5, 48, dtype=torch.bfloat16) for _ in range(2))
    near = run(cond, uncond, 4.0, rescale=rescale)
    assert torch.equal(run(far_apart(cond), far_apart(uncond), 4.0, rescale=rescale), near)
