"""How far a result may be from the fp64 oracle: one table, by dtype.

A result that is computed in fp32 and rounded once is off by at most one unit in the last place of its dtype (Triton's
interpreter truncates fp32 to bf16 where devices round, hence a whole unit), plus what fp32 arithmetic loses on the
terms that went into it. A sum of fp32 numbers, added pairwise, loses a few units however long it is.
"""

import torch

# One unit in the last place, relative, and the smallest step near zero.
UNIT = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SMALLEST = {torch.float32: 2.0**-126, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126}
# fp32 arithmetic on the way, relative to the magnitude of the terms: 8 units.
ARITHMETIC = 2.0**-20


def assert_near(actual: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor | None = None) -> None:
    """`actual` is the fp64 `expected`, rounded; `magnitude` is that of the terms, where they cancel in `expected`.

    Infinities and NaN must be where they are expected.
    """
    expected, got = expected.to("cpu", torch.float64), actual.to("cpu", torch.float64)
    assert got.shape == expected.shape, f"shape {[*got.shape]}, expected {[*expected.shape]}"
    finite = torch.isfinite(expected)
    assert torch.equal(got.isnan(), expected.isnan()), "NaN in other places than expected"
    infinite = expected.isinf()
    assert torch.equal(got[infinite], expected[infinite]), "infinities in other places than expected"
    terms = expected.abs() if magnitude is None else magnitude.to("cpu", torch.float64)
    allowed = UNIT[actual.dtype] * expected.abs() + SMALLEST[actual.dtype] + ARITHMETIC * terms
    error = (got - expected).abs()
    worst = (error / allowed)[finite]
    assert not (worst > 1).any(), f"off by up to {worst.max():.3g} times what is allowed"
