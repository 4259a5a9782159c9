"""MXFP8: values of float8_e4m3fn, and a power of two for each 32 channels, where a GPU's product reads it."""

import math
from functools import partial

import pytest
import torch
from op_inputs import EMPTY
from test_quantize import PRODUCERS, every_producer

from omni_kernels.ops import OPS, _quantized, quantize, scaled_mm
from omni_kernels.ops._quantized import MX, expanded, in_tiles, out_of_tiles
from omni_kernels.validation import oracle
from omni_kernels.validation.tolerances import assert_near

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=[True, False], ids=["tiles", "rows"])
def tiles(request, monkeypatch):
    """Whether the scales lie in tiles, as on NVIDIA."""
    monkeypatch.setattr(_quantized, "SWIZZLED", request.param)
    return request.param


def check(op, results, *inputs, **options):
    for value, (_, exact, terms) in zip(results, oracle.expected(op, results, *inputs, **options), strict=True):
        assert_near(value, exact, terms)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 32), (1, 130, 64), (2, 3, 5, 160), (1, 2, 3072), (1, 2, 12288)], ids=str)
def test_values_and_scales_are_those_of_fp64(implementation, tiles, x_dtype, shape):
    x = implementation.randn(*shape, dtype=x_dtype) * 3
    q, scale = implementation["quantize"](x, MX)
    assert (q.dtype, q.shape, scale.dtype) == (torch.float8_e4m3fn, x.shape, MX)
    assert scale.dim() == (1 if tiles else x.dim())
    check("quantize", (q, scale), x, MX)
    assert (q.float().unflatten(-1, (-1, 32)).abs().amax(-1) >= 208).all(), "half of 448, rounded"


def test_the_scale_is_the_smallest_power_of_two_that_cuts_nothing_off(implementation):
    largest = [448.0, 448.0 * (1 + 2.0**-20), 447.0, 256.0, 1.75, 1.76, 3e38, 2.0**-119, 2.0**-130, 0.0]
    x = torch.zeros(len(largest), 32, device=implementation.device)
    x[:, 5] = torch.tensor(largest)
    q, scale = implementation["quantize"](x, MX)
    expected = [max(2.0**-127, 2.0 ** math.ceil(math.log2(one / 448))) if one else 2.0**-127 for one in largest]
    assert out_of_tiles(scale, x.shape).double().flatten().tolist() == expected
    for got, one, by in zip(q[:, 5].double().tolist(), largest, expected, strict=True):
        assert got == torch.tensor(one / by).to(torch.float8_e4m3fn).double()
    assert not q[:, [0, 31]].float().any()


@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (130, 6), (256, 4)])
def test_tiles_hold_each_scale_at_its_place(tokens, columns):
    scale = torch.randint(1, 250, (tokens, columns), dtype=torch.uint8)
    laid = in_tiles(scale.view(MX)).view(torch.uint8).tolist()
    for m in range(tokens):
        for c in range(columns):
            tile = m // 128 * -(-columns // 4) + c // 4
            assert laid[512 * tile + 16 * (m % 32) + 4 * (m % 128 // 32) + c % 4] == scale[m, c]
    assert torch.equal(out_of_tiles(in_tiles(scale.view(MX)), (tokens, 32 * columns)).view(torch.uint8), scale)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes with numpy
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_infinities_and_nan_spoil_their_32_channels_alone(implementation, x_dtype):
    x = implementation.randn(3, 9, 96, dtype=x_dtype)
    x[0, 0, 0], x[1, 8, 95], x[2, 1, 40:42] = float("-inf"), float("nan"), torch.tensor([float("inf"), float("nan")])
    spoilt = torch.zeros(3, 9, 3, dtype=torch.bool, device=x.device)
    spoilt[0, 0, 0] = spoilt[1, 8, 2] = spoilt[2, 1, 1] = True
    made = expanded(*implementation["quantize"](x, MX)).isnan().unflatten(-1, (3, 32))
    assert torch.equal(made.all(-1), spoilt)
    assert torch.equal(made.any(-1), spoilt)


@every_producer
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
def test_ops_write_it_themselves(implementation, tiles, op, beside):
    for shape in ((2, 70, 96), (1, 3, 2816)):
        inputs = PRODUCERS[op](partial(implementation.randn, dtype=torch.bfloat16), *shape)
        results = implementation[op](*inputs, quantize=MX, beside=beside)
        check(op, results, *inputs, quantize=MX, beside=beside)


@pytest.mark.parametrize("shape", [one for one in EMPTY if len(one) > 1], ids=str)
def test_nothing_gives_nothing(implementation, tiles, shape):
    shape = (*shape[:-1], 64 if shape[-1] else 0)
    q, scale = implementation["quantize"](implementation.randn(*shape), MX)
    assert (q.shape, scale.numel()) == (shape, 0)


@every_producer
def test_the_bytes_are_counted(op):
    inputs = PRODUCERS[op](torch.randn, 2, 64, 128)
    numbers, count = 2 * 64 * 128, OPS[op].bytes_moved
    assert count(*inputs) - count(*inputs, quantize=MX) == 4 * numbers - numbers - numbers // 32


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_those_of_fp64(implementation, tiles, dtype, gelu):
    x, weight = implementation.randn(2, 37, 96), implementation.randn(40, 96)
    given = (*quantize(x, MX), *quantize(weight, MX), implementation.randn(40, dtype=dtype))
    check("scaled_mm", [implementation["scaled_mm"](*given, dtype=dtype, gelu=gelu)], *given, dtype=dtype, gelu=gelu)
    exact = torch.nn.functional.linear(x, weight)
    assert (scaled_mm(*given[:4], dtype=torch.float32) - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu_it_is_torchs_product(monkeypatch, tiles, dtype, bias):
    """Simulated: torch's product is replaced by one that reads the scales where torch's would."""
    asked = []

    def product(a, b, left, kind, right, other, swizzle, swizzle_b, bias, output_dtype):
        assert kind == other == torch.nn.functional.ScalingType.BlockWise1x32
        assert swizzle == swizzle_b
        asked.append((swizzle.name, a.dim(), left.dim(), right.dim(), bias is not None))
        y = expanded(a, left) @ expanded(b.t(), right).t()
        return (y if bias is None else y + bias).to(output_dtype)

    scaled = __import__("sys").modules["omni_kernels.ops.scaled_mm"]
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", product)
    monkeypatch.setattr(scaled, "has_mxfp8", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    x, weight = torch.randn(2, 9, 64), torch.randn(16, 64)
    given = (*quantize(x, MX), *quantize(weight, MX), None if bias is None else torch.randn(16, dtype=bias))
    out = torch.empty(2, 9, 16, dtype=dtype)
    made = OPS["scaled_mm"].launcher(*given, dtype, True, None, out)
    assert made is out
    check("scaled_mm", [made], *given, dtype=dtype, gelu=True)
    within = bias == dtype == torch.bfloat16
    assert asked == [("SWIZZLE_32_4_4", 2, 1, 1, within) if tiles else ("NO_SWIZZLE", 2, 2, 2, within)]


def test_scales_of_the_other_kind_of_gpu_are_laid_out_anew(monkeypatch):
    x, weight = torch.randn(9, 64), torch.randn(16, 64)
    expected = scaled_mm(*quantize(x, MX), *quantize(weight, MX), dtype=torch.float32)
    monkeypatch.setattr(_quantized, "SWIZZLED", not _quantized.SWIZZLED)
    there = quantize(x, MX), quantize(weight, MX)
    monkeypatch.undo()
    assert torch.equal(scaled_mm(*there[0], *there[1], dtype=torch.float32), expected)
    for (_, scale), t in zip(there, (x, weight), strict=True):
        assert torch.equal(_quantized.laid_out(scale, t.shape), quantize(t, MX)[1])


Q, S = quantize(torch.ones(2, 64), MX)
W, WS = quantize(torch.ones(3, 64), MX)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(torch.ones(2, 40), MX), r"a scale for each 32 channels of a token: \[2, 40\] has none"),
        (lambda: quantize(torch.ones(64), MX), r"a scale for each 32 channels of a token: \[64\] has none"),
        (lambda: scaled_mm(Q, S[:-1], W, WS), r"scale is float8_e8m0fnu \[511\] on cpu; in MXFP8 it must be"),
        (lambda: scaled_mm(Q, S, W, torch.ones(3)), r"weight_scale is float32 \[3\] on cpu; in MXFP8 it must be"),
        (lambda: scaled_mm(Q.char(), S, W.char(), WS), "q is int8 .*; MXFP8 is float8_e4m3fn"),
        (lambda: scaled_mm(Q, S, W, WS, quantize=torch.int8), "quantize does not go with MXFP8"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
