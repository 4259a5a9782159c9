"""Which linear layers of a model bear 8 bits: what each group does to the picture, and the most groups under an aim.

A group is one linear layer of all blocks of a list, such as `transformer.transformer_blocks.*.attn.to_q`.

1. Every group is quantised alone, and the PSNR against the full runs is measured.
2. In the order of that PSNR, the best first, as many groups are quantised together as reach the wanted mean PSNR. Their
   number is found by bisection.
3. The result is measured on held-out images.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from omni_kernels.patching import Patch
from omni_kernels.patching.quantised import Options, Quantisation, group_of, quantise
from omni_runtime.cache.calibration import UselessFitError
from omni_runtime.calibrate.images import Images
from omni_runtime.calibrate.schedule import statistics
from omni_runtime.calibrate.search import Tried
from omni_runtime.generation.omni import Omni
from omni_runtime.generation.request import GenerationRequest

#: The default aim: mean PSNR in dB.
PSNR = 40.0


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of layers.

    Attributes:
        layers: the pattern of their paths.
        count: how many there are.
        psnr: mean PSNR in dB if only this group is quantised.
    """

    layers: str
    count: int
    psnr: float


@contextlib.contextmanager
def _quantised(pipe: Any, options: Options) -> Iterator[Quantisation]:
    """Context manager: the pipeline runs with these layers in 8 bits."""
    patch = Patch()
    try:
        yield quantise(pipe, options, patch)[0]
    finally:
        patch.undo()


def find(
    omni: Omni,
    requests: Sequence[GenerationRequest],
    held_out: Sequence[GenerationRequest],
    options: Options,
    psnr: float = PSNR,
    batch: int = 8,
    listener: Callable[[int, int, str, float], Any] = lambda number, most, what, psnr: None,
) -> tuple[list[Group], dict[str, Any]]:
    """Find the most groups of layers that can be quantised together.

    Args:
        omni: an `Omni` without a cache.
        requests, held_out: all with the same steps and size.
        options: the dtype, and the layers that are considered.
        psnr: the wanted mean PSNR against runs without quantisation, in dB.
        batch: the largest number of images in one call.
        listener: called after each measurement with its number from 1, the largest number of them, what was quantised,
            and the mean PSNR.

    Returns:
        The groups, the best first, and the document to write, without its provenance.

    Raises:
        UselessFitError: no group reaches the wanted PSNR.
        ValueError: nothing can be quantised, or a picture holds NaN.
    """
    if omni.cache_backend is not None or not requests or not held_out:
        raise ValueError("calibration needs an Omni without a cache, and at least one request of each kind")
    pipe = omni.pipe
    counts = _counts(pipe, options)
    images, others = (Images(pipe, some, batch) for some in (requests, held_out))
    recorded = images.record()
    steps = requests[0].arguments["num_inference_steps"]
    measured = functools.partial(_measured, pipe, options, list(counts), steps)
    numbers, most = itertools.count(1), len(counts) + len(counts).bit_length()

    def mean(layers: Sequence[str], what: str) -> float:
        found = float(np.mean(measured(layers, images).psnr))
        listener(next(numbers), most, what, found)
        return found

    groups = [Group(name, count, round(mean([name], name), 2)) for name, count in counts.items()]
    groups.sort(key=lambda one: -one.psnr)
    names = [one.layers for one in groups]
    reached = _largest(len(names), lambda count: mean(names[:count], f"{count} of {len(names)} groups") >= psnr)
    if not reached:
        raise UselessFitError(
            f"no group of layers reaches {psnr:g} dB in {options.dtype}: the best, {names[0]}, has {groups[0].psnr:.1f}"
        )
    others.record()
    height, width = images.size
    document = {
        "exclude": names[reached:],
        "min_width": options.min_width,
        "wanted": psnr,
        "psnr": statistics(measured(names[:reached], others)),
        "everything": statistics(measured(names, others)),
        "groups": [dataclasses.asdict(one) for one in groups],
        "calibrated_for": {**recorded.describe_last(), "width": width, "height": height},
    }
    return groups, document


def _counts(pipe: Any, options: Options) -> dict[str, int]:
    """Group of layers → how many layers of the pipeline's transformers it has."""
    with _quantised(pipe, options) as whole:
        return dict(collections.Counter(map(group_of, whole.replaced)))


def _measured(
    pipe: Any, options: Options, every: Sequence[str], steps: int, layers: Sequence[str], images: Images
) -> Tried:
    """All images with these groups in 8 bits, of `every` group that may be."""
    left = tuple(name for name in every if name not in layers)
    with _quantised(pipe, dataclasses.replace(options, exclude=(*options.exclude, *left))):
        return images.plain(steps)


def _largest(most: int, enough: Callable[[int], bool]) -> int:
    """The largest number up to `most` for which `enough` is true, by bisection; 0 if it is true for none."""
    reached, missed = 0, most + 1
    while missed - reached > 1:
        count = (reached + missed) // 2
        if enough(count):
            reached = count
        else:
            missed = count
    return reached


def words(options: Options, groups: Sequence[Group], document: dict[str, Any]) -> Iterator[str]:
    """Yield the result in words, a line for each group and one for all."""
    left = document["exclude"]
    for one in groups:
        yield f"{one.psnr:5.1f} dB  {one.layers} ({one.count}){' left as it is' if one.layers in left else ''}"
    now, everything = document["psnr"], document["everything"]
    yield (
        f"{options.dtype}: {len(groups) - len(left)} of {len(groups)} groups of layers reach {now['mean']:.1f} dB, 5th "
        f"percentile {now['p5']:.1f}, on {now['images']} other images (wanted: {document['wanted']:g}); with all "
        f"groups it is {everything['mean']:.1f} and {everything['p5']:.1f}"
    )
    if now["mean"] < document["wanted"]:
        yield f"warning: on other images this misses {document['wanted']:g} dB: ask for more, or give more prompts"
