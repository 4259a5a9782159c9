"""Everything that the launchers choose between is among what is compiled: `omni_kernels.validation.launches`.

Sizes are those at which a launcher may turn to something else; `make test-all` takes those between, too.
"""

import itertools
from functools import cache, partial

import launches
import pytest
import torch
from launches import Configuration

from omni_kernels.ops import OPS
from omni_kernels.ops._quantized import MX

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Around every power of two: a launcher rounds to these.
WIDTHS = sorted({n for k in range(15) for n in (1 << k, (1 << k) + 1)})
MORE_WIDTHS = sorted({*WIDTHS, *(3 << k for k in range(15))})
TOKENS = sorted({1 << k for k in range(9)} | {4096})
MORE_TOKENS = sorted({*TOKENS, *((1 << k) + 1 for k in range(9))})
# Constants of which a program with more does all that one with less does.
MORE = ("ROWS", "CHUNKS", "LAYER", "TANH", "GELU")
# The caller's own sizes, and numbers that a program multiplies by.
SIZES = ("D", "H", "K", "N")


def tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def choices(every, *options):
    """Of several options each: every combination, or the first of all and the last of all."""
    return itertools.product(*options) if every else zip(*((o[0], o[-1]) for o in options), strict=True)


def norms(D, S, x_dtype, dtype, every=False):
    """Launches of the ops that hold rows: all inputs and as few as possible, or each there or not."""
    x, row, vector = tensor(2, S, D, dtype=x_dtype), tensor(4, D, dtype=dtype), tensor(D, dtype=dtype)
    index = tensor(2, S, dtype=torch.int64)
    there = choices(every, (row, None), (row, None), (index, None), (vector, None), (vector, None))
    for scale, shift, by, weight, bias in there:
        rows = slice(None if by is not None else 2)
        scale, shift = (None if t is None else t[rows] for t in (scale, shift))
        for norm in ("layer", "rms"):
            yield partial(OPS["ada_layer_norm"].launcher, x, scale, shift, by, norm, weight, bias)
        for gate, tanh, x_weight, norm in choices(
            every, (row[rows], None), (True, False), (vector, None), ("layer", "rms", None)
        ):
            modulation = (None, None) if norm is None else (scale, shift)
            affine = (None, None) if norm is None else (weight, bias)
            args = (gate, *modulation, by, tanh, x_weight, 1e-6, norm, *affine)
            yield partial(OPS["gate_residual_norm"].launcher, x, x.to(dtype), *args)
    for shift, prev, weight, norm in choices(
        every, (row[:2], None), (x.to(dtype), None), (vector, None), ("layer", "rms")
    ):
        yield partial(OPS["modulated_relative_l1"].launcher, x, row[:2], shift, prev, norm, weight)
    for weight in (vector, None):
        yield partial(OPS["rms_norm"].launcher, x, weight)
    for quantized in (torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz, *([] if D % 32 else [MX])):
        yield partial(OPS["quantize"].launcher, x, quantized)
        for beside in (False, True) if every else (True,):
            options = {"quantize": quantized, "beside": beside}
            yield partial(OPS["ada_layer_norm"].launcher, x, row[:2], **options)
            yield partial(OPS["gate_residual_norm"].launcher, x, x.to(dtype), row[:2], **options)
            yield partial(OPS["rms_norm"].launcher, x, vector, **options)
            yield partial(OPS["gelu"].launcher, x, **options)
            yield partial(OPS["swiglu"].launcher, x, x.to(dtype), **options)


def heads(D, H, S, x_dtype, dtype, every=True):
    """Launches of qk_norm_rope: every choice, or rotated by tables, with all weights and with none."""
    q, k = tensor(2, S, H, D, dtype=x_dtype), tensor(2, S, H, D, dtype=dtype)
    freqs, table = tensor(S, D // 2, 2, dtype=torch.float32), tensor(S, D, dtype=dtype)
    rotations = [{}, {"freqs": freqs}, {"cos": table, "sin": table}]
    rotations = rotations if every else rotations[2:]
    for across, layout, rotation in itertools.product((False, True), ("interleaved", "half"), rotations):
        weight = tensor(H * D if across else D, dtype=dtype)
        for q_weight, k_weight in choices(every, (weight, None), (weight, None)):
            options = {"q_weight": q_weight, "k_weight": k_weight, "layout": layout, "across_heads": across}
            for v in (k, None):
                yield partial(OPS["qk_norm_rope"].launcher, q, k, v, q, k, v, **options, **rotation)


def elementwise(x_dtype, dtype):
    """Launches of the other ops, on one block and on many."""
    for shape in ((2, 3), (2, 4097, 4096)):
        x, y = tensor(*shape, dtype=x_dtype), tensor(*shape, dtype=dtype)
        yield partial(OPS["relative_l1"].launcher, x, y)
        yield partial(OPS["residual_relative_l1"].launcher, x, y, y)
        yield partial(OPS["residual_relative_l1"].launcher, x, y, None)
        yield partial(OPS["gelu"].launcher, x, out=y)
        yield partial(OPS["swiglu"].launcher, x, y)
        for K, base in itertools.product(range(1, 17), (x, None)):
            for weights in ([0.5] * K, tensor(K, dtype=dtype)):
                yield partial(OPS["linear_forecast"].launcher, base, [y] * K, weights)


def products(bias_dtype, dtype):
    """Launches of scaled_mm, with few tokens and with many."""
    for tokens in (1, 1024, 1025):
        for eight in (torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz):
            x, weight = tensor(tokens, 256, dtype=eight), tensor(384, 256, dtype=eight)
            scales, weight_scale = tensor(tokens, dtype=torch.float32), tensor(384, dtype=torch.float32)
            for scale in (scales, tensor(tokens, 2, dtype=torch.float32)) if eight == torch.int8 else (scales,):
                for bias, gelu, quantize in itertools.product(
                    (None, tensor(384, dtype=bias_dtype)), (False, True), (None, eight) if tokens > 1024 else (None,)
                ):
                    options = {"dtype": dtype, "gelu": gelu, "quantize": quantize}
                    if eight == torch.int8 or (quantize is not None and bias is not None):
                        yield partial(OPS["scaled_mm"].launcher, x, scale, weight, weight_scale, bias, **options)


def launched(warp_size, every):
    """The configurations of all these, each once."""
    widths, tokens = (MORE_WIDTHS, MORE_TOKENS) if every else (WIDTHS, TOKENS)
    with launches.recorded(warp_size) as found:
        for D, S in itertools.product(widths, tokens):
            for run in norms(D, S, torch.float32, torch.float32):
                run()
        for x_dtype, dtype in itertools.product(DTYPES, DTYPES):
            for run in norms(3072, 4096, x_dtype, dtype, every=True):
                run()
            others = elementwise(x_dtype, dtype), products(x_dtype, dtype)
            for run in itertools.chain(heads(128, 24, 4096, x_dtype, dtype), *others):
                run()
        for D, H, S in itertools.product((2, 6, 16, 18, 48, 64, 130, 256), (1, 2, 3, 5, 24, 40, 64, 300, 512), (1, 9)):
            for run in heads(D, H, S, torch.float32, torch.float32, every):
                run()
    return [*{repr(c): c for c in found}.values()]


@cache
def compiled(warp_size):
    """The configurations that are compiled."""
    with launches.recorded(warp_size) as found:
        for launch in launches.launches.table().values():
            launch()
    return found


def covers(entry: Configuration, launch: Configuration) -> bool:
    """Whether a program does all that another does: the same rows or more of them, no fewer inputs, none narrower."""
    return (
        entry.kernel == launch.kernel
        and entry.elements >= launch.elements
        and all(
            entry.constants[name] >= value if name in MORE else entry.constants[name] == value
            for name, value in launch.constants.items()
            if name not in SIZES
        )
        and all(
            name in entry.tensors and entry.tensors[name].itemsize >= dtype.itemsize
            for name, dtype in launch.tensors.items()
        )
    )


def axes(c: Configuration, names: frozenset[str]) -> set[tuple]:
    """What is compiled at least once: every value of every constant, dtype of every input, and its absence."""
    found = {(c.kernel, "warps", c.num_warps)} | {
        (c.kernel, name, value) for name, value in c.constants.items() if name not in SIZES
    }
    there = {(name.partition("[")[0], dtype) for name, dtype in c.tensors.items()}
    # Of an index it is enough that the widest is compiled.
    found |= {(c.kernel, name, dtype) for name, dtype in there if dtype.is_floating_point}
    return found | {(c.kernel, name, None) for name in names - {name for name, _ in there}}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((warp_size, every), marks=pytest.mark.long if every else (), id=f"warps of {warp_size}, {sizes}")
        for warp_size in (32, 64)
        for every, sizes in ((False, "turning points"), (True, "all sizes"))
    ],
)
def both(request):
    """What is launched, and what is compiled, with warps of so many threads."""
    warp_size, every = request.param
    return launched(warp_size, every), compiled(warp_size)


def missing(launched, compiled):
    by_kernel = {}
    for entry in compiled:
        by_kernel.setdefault(entry.kernel, []).append(entry)
    return [c for c in launched if not any(covers(entry, c) for entry in by_kernel.get(c.kernel, ()))]


def test_whatever_is_launched_is_compiled_or_less_than_what_is(both):
    launched, compiled = both
    assert len(launched) > 1000
    assert missing(launched, compiled) == []


def test_every_value_on_every_axis_is_compiled(both):
    launched, compiled = both
    names: dict[str, frozenset] = {}
    for c in (*launched, *compiled):
        names[c.kernel] = names.get(c.kernel, frozenset()) | {name.partition("[")[0] for name in c.tensors}
    wanted, there = (set().union(*(axes(c, names[c.kernel]) for c in cs)) for cs in (launched, compiled))
    assert wanted - there == set()


def test_every_kernel_is_launched(both):
    assert {c.kernel for c in both[0]} == {c.kernel for c in both[1]} == launches.kernels()


@pytest.mark.parametrize("dropped", ["gelu_kernel", "ada_layer_norm_kernel", "qk_norm_rope_kernel"])
def test_what_is_not_compiled_is_found(both, dropped):
    launched, compiled = both
    widest = max(c.constants["BLOCK"] for c in compiled if c.kernel == dropped)
    left = [c for c in compiled if c.kernel == dropped and c.constants["BLOCK"] != widest]
    asked = [c for c in launched if c.kernel == dropped]
    assert {c.constants["BLOCK"] for c in missing(asked, left)} == {widest}
