"""One check: run an op twice on one shape, dtype and layout, between guards, and compare with fp64.

Its inputs and outputs lie between sentinels (`memory`). Reads outside of an input give NaN, writes outside of an output
or into an input are detected, and elements that are not written are NaN. The results of two runs must be bit-identical.
A check's `id` is use/shape/dtype/layout. Together with the seed, it reproduces the check.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from omni_kernels.device import has_fp64
from omni_kernels.validation import layouts, oracle
from omni_kernels.validation.cases import Use
from omni_kernels.validation.memory import Placed, poisoned_outputs, same_bits
from omni_kernels.validation.shapes import FLUX, QWEN_IMAGE, QWEN_IMAGE_EDIT, TINY, WAN, Z_IMAGE, Shape
from omni_kernels.validation.tolerances import Mismatch, mismatch, worst
from omni_kernels.validation.uses import USES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

#: "model" is the layout in which a model calls the op: chunks of projections, slices of a joint sequence.
LAYOUTS: dict[str, layouts.Layout] = {
    "model": lambda t: t,
    "contiguous": layouts.contiguous,
    "transposed": lambda t: layouts.heads_first(t) if t.dim() == 4 else layouts.transposed(t),
    "tokens": layouts.first_tokens,
    "channels": layouts.channels,
    "offset": layouts.offset,
}
MOVED = ("offset", "tokens", "transposed", "channels")

MODELS = (QWEN_IMAGE, QWEN_IMAGE_EDIT, Z_IMAGE, FLUX, WAN)
# Sizes that 16 does not divide, several samples, a tiny model, and a minimal size.
ODD = Shape("odd", 3, 37, 200, torch.bfloat16)
SMALL = (ODD, Shape("odd-129", 2, 33, 129, torch.bfloat16), TINY, Shape("one", 1, 1, 8, torch.bfloat16))

#: Returns an op's implementation, given its name.
Implementation = Callable[[str], Callable[..., Any]]


@dataclass(frozen=True)
class Check:
    """One check. Its dtype is that of `shape`."""

    use: Use
    shape: Shape
    layout: str

    @property
    def dtype(self) -> str:
        """The dtype of the tensors, except angles and indices."""
        return str(self.shape.dtype).removeprefix("torch.")

    @property
    def id(self) -> str:
        """use/BxSxD/dtype/layout."""
        B, S, D = self.shape.size
        return f"{self.use.name.replace(' ', '-')}/{B}x{S}x{D}/{self.dtype}/{self.layout}"


def parse(text: str) -> Check:
    """The check with an id. Any shape is allowed.

    Raises:
        ValueError: it is not the id of a check.
    """
    parts = text.split("/")
    uses = {name.replace(" ", "-"): use for name, use in USES.items()}
    if len(parts) != 4 or not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", parts[1]):
        raise ValueError(f"{text!r} is not a check; the form is use/BxSxD/dtype/layout, as in {example().id}")
    name, size, dtype, layout = parts
    for value, allowed in ((name, uses), (dtype, DTYPES), (layout, LAYOUTS)):
        if value not in allowed:
            raise ValueError(f"{text!r} is not a check: {value!r} is not one of {', '.join(allowed)}")
    B, S, D = (int(n) for n in size.split("x"))
    shape = Shape("given", B, S, D, DTYPES[dtype])
    if not uses[name].fits(shape):
        raise ValueError(f"{text!r} is not a check: {name} has no inputs of {shape.D} channels")
    return Check(uses[name], shape, layout)


def example() -> Check:
    """An example of a check."""
    return Check(USES["gelu"], ODD, "offset")


def reduced(shape: Shape, divisor: int) -> Shape:
    """The same shape with fewer tokens."""
    return dataclasses.replace(shape, S=max(1, shape.S // divisor))


def plan(ops: Iterable[str], *, divisor: int, quick: bool) -> list[Check]:
    """The checks of `ops`, the most important ones first.

    Args:
        ops: keys of `omni_kernels.ops.OPS`.
        divisor: divides the models' numbers of tokens. 1 tests a device at real sizes.
        quick: only every op in every dtype, and one model.
    """
    uses = [use for use in USES.values() if use.op in set(ops)]
    first, *others = [reduced(shape, divisor) for shape in MODELS]
    wanted: list[tuple[Sequence[Shape], Sequence[str], Sequence[str]]] = [
        ([ODD], [*DTYPES], ["contiguous"]),
        ([first], ["bfloat16"], ["model"]),
        ([ODD], ["bfloat16"] if quick else [*DTYPES], MOVED),
    ]
    if not quick:
        wanted += [
            (others, ["bfloat16"], ["model"]),
            ([first, *others], ["float16", "float32"], ["model"]),
            (SMALL[1:], [*DTYPES], ["contiguous"]),
            ([first], ["bfloat16"], MOVED),
        ]
    return [
        Check(use, dataclasses.replace(shape, dtype=DTYPES[dtype]), layout)
        for shapes, dtypes, lays in wanted
        for shape in shapes
        for dtype in dtypes
        for layout in lays
        for use in uses
        if use.fits(shape)
    ]


def run(
    check: Check,
    implementation: Implementation,
    device: torch.device,
    seed: int,
    observe: Callable[[float], object] | None = None,
) -> list[Mismatch]:
    """Run a check. Returns everything that is wrong with an implementation; empty if it is correct.

    Args:
        check: the check to run.
        implementation: returns the function to call for an op.
        device: where the inputs are created.
        seed: seed of the inputs.
        observe: called with the largest error of every result, divided by the allowed error.

    Raises:
        Exception: whatever the implementation raises.
    """
    torch.manual_seed(seed)
    given, options = check.use.ours(check.use.inputs(check.shape, device))
    placed: list[Placed] = []

    def place(t: torch.Tensor, written: bool = False) -> torch.Tensor:
        # A vector is the same in every layout, except that "offset" changes its alignment.
        moved = t.dim() > 1 or (t.dim() == 1 and check.layout == "offset")
        placed.append(Placed(LAYOUTS[check.layout](t) if moved else t, written=written))
        return placed[-1].view

    args = [
        tree_map_only(torch.Tensor, functools.partial(place, written=j in check.use.places), argument)
        for j, argument in enumerate(given)
    ]
    kwargs = {
        name: tree_map_only(torch.Tensor, functools.partial(place, written=name in check.use.places), option)
        for name, option in options.items()
    }
    places = [kwargs[where] if isinstance(where, str) else args[where] for where in check.use.places]
    function = implementation(check.use.op)
    problems: list[Mismatch] = []

    def results() -> list[torch.Tensor]:
        for t in places:
            t.fill_(float("nan"))
        with poisoned_outputs() as intact:
            returned = function(*args, **kwargs)
            if places:
                returned = places
            made = [
                t.clone() for t in ([returned] if isinstance(returned, torch.Tensor) else returned) if t is not None
            ]
            outside = not intact()
        if outside or not all(p.untouched() for p in placed):
            problems.append(Mismatch("wrote outside of its outputs"))
        return made

    first, second = results(), results()
    wrong = _wrong(check.use.op, first, args, kwargs, device, observe)
    # If both runs wrote outside of their outputs, report it once.
    del problems[1:]
    problems[:0] = [wrong] if wrong else []
    if any(a.shape != b.shape or not same_bits(a, b) for a, b in zip(first, second, strict=True)):
        problems.append(Mismatch("two runs on the same inputs differ in their bits"))
    return problems


def _wrong(
    op: str,
    got: Sequence[torch.Tensor],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    device: torch.device,
    observe: Callable[[float], object] | None,
) -> Mismatch | None:
    """The first result that differs from the oracle's."""
    if not has_fp64(device):
        got, args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.cpu, (got, args, kwargs))
    expected = oracle.expected(op, got, *args, **kwargs)
    if len(got) != len(expected):
        return Mismatch(f"{len(got)} results, expected {len(expected)}")
    for value, (name, exact, magnitude) in zip(got, expected, strict=True):
        if observe is not None and value.shape == exact.shape and value.numel():
            observe(worst(value, exact, magnitude)[0])
        found = mismatch(value, exact, magnitude)
        if found is not None:
            return dataclasses.replace(found, reason=f"{name}: {found.reason}")
    return None
