"""scaled_mm: the product in 8 bits with its scales, bias and activation."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from omni_kernels.ops import OPS, quantize, scaled_mm
from omni_kernels.validation import oracle
from omni_kernels.validation.tolerances import assert_near

DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz)
GROUP = 128


def inputs(implementation, tokens, K, N, dtype, groups=False, bias=None):
    x, weight = implementation.randn(*tokens, K), implementation.randn(N, K) / K**0.5
    q, scale = quantize(x.unflatten(-1, (-1, GROUP)) if groups else x, dtype)
    added = None if bias is None else implementation.randn(N, dtype=bias)
    return q.view(x.shape), scale, *quantize(weight, dtype), added


def check(implementation, *given, **options):
    made = implementation["scaled_mm"](*given, **options)
    results = made if isinstance(made, tuple) else (made,)
    expected = oracle.expected("scaled_mm", results, *given, **options)
    for value, (_, exact, terms) in zip(results, expected, strict=True):
        assert_near(value, exact, terms)
    return made


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "K", "N"), [((1, 7), 5, 3), ((2, 33), 130, 257), ((200,), 384, 128)], ids=str)
def test_products_are_those_of_fp64(implementation, tokens, K, N, dtype, out_dtype):
    for bias, gelu in ((None, False), (out_dtype, True)):
        y = check(implementation, *inputs(implementation, tokens, K, N, dtype, bias=bias), dtype=out_dtype, gelu=gelu)
        assert (y.shape, y.dtype) == ((*tokens, N), out_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_of_channels_have_their_own_scales(implementation, dtype):
    given = inputs(implementation, (2, 9), 384, 130, dtype, groups=True, bias=torch.float32)
    given[1][0, 3, 1] *= 1000
    check(implementation, *given, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_in_8_bits_feeds_the_next_product(implementation, dtype):
    first = inputs(implementation, (1, 40), 96, 256, dtype, bias=torch.bfloat16)
    q, scale = check(implementation, *first, gelu=True, quantize=dtype)
    assert (q.dtype, scale.shape) == (dtype, (1, 40, 2))
    *_, weight, weight_scale, _ = inputs(implementation, (1, 1), 256, 50, dtype)
    y = check(implementation, q, scale, weight, weight_scale, None, dtype=torch.float32)
    exact = F.gelu(oracle.expected("scaled_mm", (), *first)[0][1], approximate="tanh")
    exact = exact @ (weight.double() * weight_scale.double()[:, None]).T
    assert (y - exact).norm() / exact.norm() < (0.01 if dtype == torch.int8 else 0.04)


@pytest.mark.parametrize("tokens", [1024, 1025, 1500])
def test_tiles_of_many_tokens(triton_launch, tokens):
    """More tiles than are computed together, the last group of them cut short."""
    check(triton_launch, *inputs(triton_launch, (tokens,), 128, 256, torch.int8), dtype=torch.float32)


def test_a_place_is_written_and_nothing_beside_it(implementation):
    given = inputs(implementation, (2, 5), 64, 20, torch.int8, bias=torch.float32)
    expected = implementation["scaled_mm"](*given, dtype=torch.float32)
    for joint, place in (
        (implementation.randn(2, 9, 20), (slice(None), slice(4, None))),
        (implementation.randn(2, 5, 33), (..., slice(13, None))),
    ):
        before = joint.clone()
        out = joint[place]
        assert implementation["scaled_mm"](*given, dtype=torch.float32, out=out) is out
        assert torch.equal(out, expected)
        out.copy_(before[place])
        assert torch.equal(joint, before)


def test_a_spoilt_token_spoils_no_other(implementation):
    q, scale, weight, weight_scale, _ = inputs(implementation, (1, 70), 64, 20, torch.int8)
    expected = implementation["scaled_mm"](q, scale, weight, weight_scale, dtype=torch.float32)
    scale[0, 3] = float("nan")
    y = implementation["scaled_mm"](q, scale, weight, weight_scale, dtype=torch.float32)
    assert y[0, 3].isnan().all()
    others = torch.arange(70) != 3
    assert torch.equal(y[0, others], expected[0, others])


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 3, 0)], ids=str)
def test_nothing_gives_nothing(implementation, shape):
    q, scale = quantize(implementation.randn(*shape))
    weight, weight_scale = quantize(implementation.randn(6, shape[-1]))
    bias = implementation.randn(6)
    y = implementation["scaled_mm"](q, scale, weight, weight_scale, bias, dtype=torch.float32)
    assert torch.equal(y, bias.expand(*shape[:-1], 6))


def test_no_tokens_have_no_results_in_8_bits(implementation):
    q, scale = quantize(implementation.randn(1, 0, 256))
    weight, weight_scale = quantize(implementation.randn(384, 256))
    made, scales = implementation["scaled_mm"](q, scale, weight, weight_scale, gelu=True, quantize=torch.int8)
    assert (made.shape, scales.shape) == ((1, 0, 384), (1, 0, 3))
    groups = scale.new_empty(1, 0, 2)
    assert implementation["scaled_mm"](q, groups, weight, weight_scale).shape == (1, 0, 384)


def test_views_give_what_their_elements_give(implementation):
    q, scale, weight, weight_scale, bias = inputs(implementation, (2, 9), 64, 20, torch.int8, bias=torch.float32)
    expected = implementation["scaled_mm"](q, scale, weight, weight_scale, bias, dtype=torch.float32)
    views = (q.mT.contiguous().mT, scale.T.contiguous().T, weight.T.contiguous().T)
    more = weight_scale.repeat_interleave(2)[::2], bias.repeat_interleave(2)[::2]
    assert torch.equal(implementation["scaled_mm"](*views, *more, dtype=torch.float32), expected)


def test_scales_of_groups_may_be_views(implementation):
    q, scale, weight, weight_scale, _ = inputs(implementation, (2, 9), 384, 130, torch.int8, groups=True)
    view = scale.transpose(1, 2).contiguous().transpose(1, 2)
    given = (weight, weight_scale, None)
    expected = implementation["scaled_mm"](q, scale, *given, dtype=torch.float32)
    assert torch.equal(implementation["scaled_mm"](q, view, *given, dtype=torch.float32), expected)


def test_bytes_are_those_of_the_operands_and_of_the_result():
    given = inputs(type("cpu", (), {"randn": staticmethod(torch.randn)}), (4, 8), 256, 512, torch.int8)
    count, read = OPS["scaled_mm"].bytes_moved, 32 * 256 + 32 * 4 + 512 * 256 + 512 * 4
    assert count(*given) == read + 32 * 512 * 2
    assert count(*given, gelu=True, quantize=torch.int8) == read + 32 * 512 + 32 * 4 * 4


X, SCALE, W, WS = torch.ones(2, 5, 256, dtype=torch.int8), torch.ones(2, 5), torch.ones(3, 256).char(), torch.ones(3)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ((X.float(), SCALE, W, WS), {}, r"q is float32 \[2, 5, 256\]; it must be int8 or fp8 \[..., K\]"),
        ((X, SCALE, W.float(), WS), {}, r"weight is float32 \[3, 256\] on cpu; it must be int8 \[N, 256\] on cpu"),
        ((X, SCALE, W[:, :9], WS), {}, r"weight is int8 \[3, 9\] on cpu"),
        ((X, SCALE[:1], W, WS), {}, r"scale has shape \[1, 5\]; it must be \[2, 5\] or, with a multiple of 128"),
        ((X, torch.ones(2, 5, 3), W, WS), {}, r"scale has shape \[2, 5, 3\]"),
        ((X, SCALE.half(), W, WS), {}, r"scale must be float32 \[2, 5\] on cpu"),
        ((X, SCALE, W, WS[:2]), {}, r"weight_scale must be float32 \[3\] on cpu"),
        ((X, SCALE, W, WS, torch.ones(2)), {}, r"bias has shape \[2\]"),
        ((X, SCALE, W, WS), {"dtype": torch.int8}, "dtype is int8; allowed are float32, float16, bfloat16"),
        (
            (X, SCALE, W, WS),
            {"out": torch.ones(2, 5, 3, device="meta").bfloat16()},
            r"out is .* on meta; it",
        ),
        ((X, SCALE, W, WS), {"out": torch.ones(1, 1, 3).bfloat16().expand(2, 5, 3)}, "out is expanded"),
        ((X, SCALE, W, WS), {"quantize": torch.int8}, "quantize needs a multiple of 128 channels, not 3"),
        ((X, SCALE, W, WS), {"quantize": torch.uint8}, "quantize is uint8; allowed are int8"),
        (
            (X, SCALE, W, WS),
            {"out": torch.ones(2, 5, 3)},
            r"out is float32 \[2, 5, 3\] on cpu; it must be bfloat16",
        ),
    ],
)
def test_what_is_refused(given, options, message):
    with pytest.raises(ValueError, match=f"scaled_mm: {message}"):
        scaled_mm(*given, **options)


def test_fp8_with_a_bf16_result_is_torchs_product_on_a_gpu(monkeypatch):
    """On a CPU that pretends: what is asked of torch, and where it writes."""

    class OnCuda(torch.Tensor):
        is_cuda = True

    asked = []

    def product(a, b, scale_a, scale_b, *, bias, out_dtype, out=None):
        asked.append((a.shape, b.shape, scale_a.shape, scale_b.shape, out is not None))
        made = (a.float() @ b.float() * scale_a * scale_b + bias).to(out_dtype)
        return made if out is None else out.copy_(made)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    from omni_kernels.ops.scaled_mm import launch, reference

    q, scale = quantize(torch.randn(1, 6, 32), torch.float8_e4m3fn)
    weight, bias = quantize(torch.randn(16, 32), torch.float8_e4m3fn), torch.randn(16)
    joint = torch.zeros(9, 16, dtype=torch.bfloat16)
    more = (scale, *weight, bias.bfloat16(), torch.bfloat16, False, None)
    for out in (None, joint[3:].unsqueeze(0)):
        made = launch(q.as_subclass(OnCuda), *more, out)
        assert torch.equal(made.as_subclass(torch.Tensor), reference(q, *more, None))
    assert torch.equal(joint[3:], made.as_subclass(torch.Tensor)[0])
    assert asked == [((6, 32), (32, 16), (6, 1), (1, 16), False), ((6, 32), (32, 16), (6, 1), (1, 16), True)]


def test_sizes_that_cuda_does_not_multiply_are_padded_or_not_in_8_bits(monkeypatch):
    """Without Triton, on a CPU that pretends: few rows are padded, sizes that 8 does not divide go through fp32."""
    from omni_kernels.ops.scaled_mm import _products

    asked = []

    class OnCuda(torch.Tensor):
        is_cuda = True

    def int_mm(a, b):
        asked.append((tuple(a.shape), tuple(b.shape)))
        return a.as_subclass(torch.Tensor).int() @ b.as_subclass(torch.Tensor).int()

    monkeypatch.setattr(torch, "_int_mm", int_mm)
    monkeypatch.setattr(importlib.import_module("omni_kernels.ops.scaled_mm"), "_has_vnni", lambda: False)
    q, weight = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((3, 16), (24, 16)))
    got = _products(q.as_subclass(OnCuda), weight)
    assert asked == [((17, 16), (16, 24))]
    assert torch.equal(got.as_subclass(torch.Tensor), q.int() @ weight.int().t())
    _products(q[:, :12].as_subclass(OnCuda), weight[:, :12])
    assert len(asked) == 1
