"""quantize: 8-bit values and a scale for each token."""

import pytest
import torch
from op_inputs import EMPTY, SHAPES

from omni_kernels.ops import OPS, quantize
from omni_kernels.ops.quantize import LIMITS, TINY
from omni_kernels.validation import oracle
from omni_kernels.validation.layouts import VIEWS
from omni_kernels.validation.tolerances import assert_near

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(implementation, x, dtype):
    q, scale = implementation["quantize"](x, dtype)
    assert (q.dtype, scale.dtype) == (dtype, torch.float32)
    assert q.is_contiguous()
    assert scale.is_contiguous()
    for value, (_, exact, magnitude) in zip((q, scale), oracle.expected("quantize", (q, scale), x, dtype), strict=True):
        assert_near(value, exact, magnitude)
    return q, scale


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 3072), (1, 2, 12288)], ids=str)
def test_values_and_scales_are_those_of_fp64(implementation, dtype, x_dtype, shape):
    q, _ = check(implementation, implementation.randn(*shape, dtype=x_dtype), dtype)
    assert (q.float().abs().amax(-1) == LIMITS[dtype]).all(), "the largest magnitude of each token is the largest value"


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_views_give_what_their_elements_give(implementation, view):
    check(implementation, view(implementation.randn(3, 34, 48, dtype=torch.bfloat16)), torch.int8)


def test_rows_at_more_than_three_distances(implementation):
    check(implementation, implementation.randn(3, 4, 5, 6, 20)[:, ::2, ::2, ::2], torch.int8)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz], ids=str)
def test_every_value_between_is_rounded_as_torch_rounds_it(implementation, dtype):
    """Each 8-bit value, and between two of them: below the middle, the middle, above it. The scale is 1."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    values = values[values.isfinite() & (values.abs() <= LIMITS[dtype])].unique()
    middle = (values[1:] + values[:-1]) / 2
    x = torch.cat((values, middle, torch.nextafter(middle, values[1:]), torch.nextafter(middle, values[:-1])))
    q, scale = implementation["quantize"](x.to(implementation.device)[None], dtype)
    assert scale.item() == 1.0
    assert torch.equal(q.cpu().float(), x.to(dtype).float()[None])


def test_integers_are_rounded_half_to_even(implementation):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 63.5, 64.5, -126.5]], device=implementation.device)
    q, scale = implementation["quantize"](x, torch.int8)
    assert scale.item() == 1.0
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, 64, 64, -126]]


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes with numpy
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_infinities_and_nan_spoil_their_token_alone(implementation, dtype, x_dtype):
    x = implementation.randn(3, 9, 100, dtype=x_dtype)
    x[0, 0, 0], x[1, 8, 99], x[2, 1, :2] = float("-inf"), float("nan"), torch.tensor([float("inf"), float("nan")])
    q, scale = check(implementation, x, dtype)
    dequantized = q.float() * scale.unsqueeze(-1)
    spoilt = torch.zeros(3, 9, dtype=torch.bool, device=x.device)
    spoilt[0, 0] = spoilt[1, 8] = spoilt[2, 1] = True
    assert torch.equal(dequantized.isnan().all(-1), spoilt)
    assert torch.equal(dequantized.isnan().any(-1), spoilt)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_zeros_and_vanishing_tokens_have_scale_0(implementation, dtype):
    x = implementation.randn(1, 4, 64)
    x[0, 0], x[0, 1], x[0, 2] = 0.0, x[0, 1] * 1e-36, x[0, 2] * 1e-20
    q, scale = implementation["quantize"](x, dtype)
    assert (q[0, :2].float() == 0).all()
    assert (scale[0, :2] == 0).all()
    assert x[0, 1].abs().max() < TINY
    assert (scale[0, 2:] > 0).all()
    assert torch.isfinite(q.float()).all()


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_gives_nothing(implementation, shape):
    q, scale = implementation["quantize"](implementation.randn(*shape), torch.int8)
    assert (q.shape, scale.shape) == (shape, shape[:-1])
    assert not scale.any()


def test_rows_too_long_for_a_program(triton_launch):
    x = triton_launch.randn(2, 16385)
    check(triton_launch, x, torch.int8)
    assert OPS["quantize"].bytes_moved(x) == 2 * 16385 * (4 + 1) + 2 * 4, "4 bytes read, 1 written, and the scales"


def test_what_is_refused():
    with pytest.raises(ValueError, match="quantize: x has no dimensions"):
        quantize(torch.ones(()))
    with pytest.raises(ValueError, match="quantize: x has dtype int32; allowed are float32"):
        quantize(torch.ones(2, 3).int())
    with pytest.raises(ValueError, match="quantize: dtype is uint8; allowed are int8, float8_e4m3fn, float8_e4m3fnuz"):
        quantize(torch.ones(2, 3), torch.uint8)
