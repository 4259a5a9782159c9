"""quantize: 8-bit values and a scale for each token."""

from functools import partial

import pytest
import torch
from op_inputs import EMPTY, SHAPES

from omni_kernels.ops import OPS, _quantized, quantize
from omni_kernels.ops._quantized import LIMITS, TINY
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


#: Op → its inputs, for hidden states [B, S, D].
PRODUCERS = {
    "ada_layer_norm": lambda randn, B, S, D: (randn(B, S, D), randn(B, D), randn(B, D)),
    "gate_residual_norm": lambda randn, B, S, D: (randn(B, S, D), *(randn(B, S, D), *(randn(B, D) for _ in range(3)))),
    "rms_norm": lambda randn, B, S, D: (randn(B, S, D), randn(D)),
    "gelu": lambda randn, B, S, D: (randn(B, S, D),),
    "swiglu": lambda randn, B, S, D: tuple(randn(B, S, 2 * D).chunk(2, -1)),
}
every_producer = pytest.mark.parametrize("op", PRODUCERS)


def made_in_8_bits(implementation, op, shape, x_dtype, **options):
    """The results of an op in 8 bits, each checked against fp64."""
    inputs = PRODUCERS[op](partial(implementation.randn, dtype=x_dtype), *shape)
    results = implementation[op](*inputs, **options)
    expected = oracle.expected(op, results, *inputs, **options)
    for value, (_, exact, terms) in zip(results, expected, strict=True):
        assert value.is_contiguous()
        assert_near(value, exact, terms)
    return inputs, results


@every_producer
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize(
    ("dtype", "x_dtype"),
    [(torch.int8, torch.bfloat16), (torch.float8_e4m3fn, torch.float32), (torch.float8_e4m3fnuz, torch.float16)],
    ids=str,
)
def test_ops_write_8_bits_themselves(implementation, op, dtype, x_dtype, beside):
    for shape in ((2, 5, 17), (1, 3, 2816)):
        inputs, results = made_in_8_bits(implementation, op, shape, x_dtype, quantize=dtype, beside=beside)
        q, scale, *y = results[1:] if op == "gate_residual_norm" else results
        assert (q.dtype, scale.dtype, scale.shape) == (dtype, torch.float32, q.shape[:-1])
        assert (q.float().abs().amax(-1) == LIMITS[dtype]).all()
        plain = implementation[op](*inputs)
        plain = plain if isinstance(plain, tuple) else (plain,)
        assert len(y) == beside
        if beside:
            assert torch.equal(y[0], plain[-1])
        if op == "gate_residual_norm":
            assert torch.equal(results[0], plain[0])


@every_producer
@pytest.mark.parametrize("D", [1536, 2500, 4999, 5120])
def test_rows_in_chunks(implementation, op, D):
    made_in_8_bits(implementation, op, (1, 2, D), torch.bfloat16, quantize=torch.int8, beside=True)


@pytest.mark.parametrize(("op", "D"), [("swiglu", 18432), ("gelu", 22528)])
def test_the_widest_rows_of_models_in_16_bits_are_for_the_kernel(triton_launch, monkeypatch, op, D):
    """FLUX.2's feed-forwards."""
    monkeypatch.setattr(_quantized, "finished", lambda *_: pytest.fail("in plain torch"))
    inputs = PRODUCERS[op](partial(triton_launch.randn, dtype=torch.bfloat16), 1, 2, D)
    q, scale = triton_launch[op](*inputs, quantize=torch.int8)
    expected = oracle.expected(op, (q, scale), *inputs, quantize=torch.int8)
    for value, (_, exact, terms) in zip((q, scale), expected, strict=True):
        assert_near(value, exact, terms)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@every_producer
@pytest.mark.parametrize("D", [100, 2816])
def test_a_spoilt_token_of_an_op_spoils_no_other(implementation, op, D):
    inputs = PRODUCERS[op](implementation.randn, 1, 4, D)
    inputs[0][0, 1, 3], inputs[0][0, 2, D - 1] = float("nan"), float("inf")
    *_, q, scale = implementation[op](*inputs, quantize=torch.int8)
    spoilt = (q.float() * scale.unsqueeze(-1)).isnan()
    assert spoilt.all(-1).tolist() == spoilt.any(-1).tolist() == [[False, True, True, False]]


def test_without_eps_zeros_stay_zeros(triton_launch):
    """The masked channels of a row then hold 0 · ∞."""
    x = triton_launch.randn(1, 3, 2816)
    _, expected = triton_launch["rms_norm"](x, eps=0.0, quantize=torch.int8)
    assert expected.isfinite().all()


@every_producer
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_nothing_gives_nothing_in_8_bits(implementation, op, shape):
    inputs = PRODUCERS[op](implementation.randn, *shape)
    *_, q, scale = implementation[op](*inputs, quantize=torch.int8)
    assert (q.shape, scale.shape) == (shape, shape[:-1])


@every_producer
def test_8_bits_move_half_the_bytes_of_bf16(op):
    inputs = PRODUCERS[op](partial(torch.randn, dtype=torch.bfloat16), 2, 8, 64)
    count = OPS[op].bytes_moved
    numbers, tokens = 2 * 8 * 64, 2 * 8
    assert count(*inputs) - count(*inputs, quantize=torch.int8) == 2 * numbers - numbers - 4 * tokens
    assert count(*inputs, quantize=torch.int8, beside=True) - count(*inputs) == numbers + 4 * tokens


@every_producer
def test_a_compiled_op_returns_8_bits(op):
    torch._dynamo.reset()
    inputs, function = PRODUCERS[op](torch.randn, 1, 3, 24), OPS[op].function
    with torch.no_grad():
        for beside in (False, True):
            run = partial(function, quantize=torch.int8, beside=beside)
            made = torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs)
            assert [*map(torch.equal, made, run(*inputs))] == [True] * (2 + beside + (op == "gate_residual_norm"))


@every_producer
def test_what_an_op_refuses(op):
    inputs = PRODUCERS[op](torch.randn, 1, 3, 24)
    with pytest.raises(ValueError, match=f"{op}: quantize is uint8; allowed are int8, float8_e4m3fn, float8_e4m3fnuz"):
        OPS[op].function(*inputs, quantize=torch.uint8)
    with pytest.raises(ValueError, match=f"{op}: beside is given without quantize"):
        OPS[op].function(*inputs, beside=True)
    if op in ("gelu", "swiglu"):
        with pytest.raises(ValueError, match=f"{op}: out and quantize cannot be given together"):
            OPS[op].function(*inputs, quantize=torch.int8, out=torch.empty(1, 3, 24))
    if op == "gate_residual_norm":
        with pytest.raises(ValueError, match=f"{op}: quantize is given, and norm is None"):
            OPS[op].function(*inputs[:3], norm=None, quantize=torch.int8)
