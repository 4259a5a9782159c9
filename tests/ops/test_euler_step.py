import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from op_inputs import DTYPES, EMPTY

from omni_kernels.validation import oracle
from omni_kernels.validation.layouts import VIEWS
from omni_kernels.validation.tolerances import assert_near

every_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=str)


def check(implementation, sample, velocity, dt):
    result = implementation["euler_step"](sample, velocity, dt)
    assert result.dtype == velocity.dtype
    assert result.is_contiguous()
    assert_near(result, *oracle.linear_forecast(sample, [velocity], [float(dt)]))


@pytest.mark.parametrize("kind", ["number", "tensor"])
@every_dtype
def test_step_is_that_of_fp64(implementation, dtypes, kind):
    sample, velocity = (implementation.randn(2, 33, 65, dtype=dtype) for dtype in dtypes[:2])
    dt = -0.043 if kind == "number" else torch.tensor(-0.043, device=implementation.device)
    check(implementation, sample, velocity, dt)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_gives_nothing(implementation, shape):
    assert implementation["euler_step"](*(implementation.randn(*shape) for _ in range(2)), -0.1).shape == shape


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_views_give_what_their_elements_give(implementation, view):
    sample, velocity = (implementation.randn(3, 34, 48, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    check(implementation, view(sample), view(velocity), -0.1)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes with numpy
@every_dtype
def test_infinities_and_nan_are_carried(implementation, dtypes):
    sample, velocity = (implementation.randn(3, 9, 100, dtype=dtype) for dtype in dtypes[:2])
    sample[0, 0, 0], velocity[1, 8, 99], velocity[2, 3, 4] = float("inf"), float("-inf"), float("nan")
    check(implementation, sample, velocity, -0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_the_scheduler_computes(implementation, dtype):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    sample, velocity = implementation.randn(1, 16, 64), implementation.randn(1, 16, 64, dtype=dtype)
    dt = (scheduler.sigmas[1] - scheduler.sigmas[0]).to(implementation.device)
    theirs = scheduler.step(velocity, scheduler.timesteps[0], sample, return_dict=False)[0]
    ours = implementation["euler_step"](sample, velocity, dt)
    assert ours.dtype == theirs.dtype
    if dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    else:  # theirs rounds the change before it is added
        exact, _ = oracle.linear_forecast(sample, [velocity], [float(dt)])
        assert (ours.double() - exact).norm() <= (theirs.double() - exact).norm()
