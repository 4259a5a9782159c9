"""The same prompts and seeds under several caches: what each costs, and how far its images are from those without one.

Every image is measured against the image of the same prompt and seed without a cache, at the full number of steps.
Plain sampling with fewer steps is among the runs: it is what a user gets for free, and a cache has to beat it.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_runtime import contact_sheet, quality
from omni_runtime.loading import embedded_models
from omni_runtime.omni import Omni
from omni_runtime.request import GenerationRequest
from omni_runtime.result import OmniResult, jsonable, write_png

REFERENCE = "no cache"

#: TeaCache with the distance itself, not a polynomial that was fitted to another checkpoint.
IDENTITY = [0.0, 0.0, 0.0, 1.0, 0.0]


@dataclass(frozen=True)
class Run:
    """One column of the comparison: a cache backend with its configuration, or plain sampling (None)."""

    name: str
    backend: str | None
    config: Mapping[str, Any] | None
    steps: int


#: Runs that suit an embedded model: thresholds at which TeaCache computes about a third of the steps, the others about
#: half. Any other model gets each method with its own defaults.
RUNS: dict[str, tuple[tuple[str, str, dict[str, Any]], ...]] = {
    "emoji-qwen-image": (
        ("TeaCache", "tea_cache", {"rel_l1_thresh": 0.13, "coefficients": IDENTITY}),
        ("TeaCache + Newton", "tea_cache", {"rel_l1_thresh": 0.13, "coefficients": IDENTITY, "forecaster": "newton"}),
        ("DBCache", "cache_dit", {"residual_diff_threshold": 0.12}),
        ("DBCache + TaylorSeer", "cache_dit", {"residual_diff_threshold": 0.12, "enable_taylorseer": True}),
        ("first-block cache", "first_block_cache", {"threshold": 0.1}),
    ),
    "": (
        ("TeaCache", "tea_cache", {}),
        ("DBCache", "cache_dit", {}),
        ("DBCache + TaylorSeer", "cache_dit", {"enable_taylorseer": True}),
        ("first-block cache", "first_block_cache", {}),
    ),
}


@dataclass
class Sample:
    """One image of one run."""

    prompt: str
    seed: int
    image: Any
    seconds: float
    forwards: int
    blocks: float
    psnr: float = math.inf
    ssim: float = 1.0


@dataclass
class RunResult:
    """A run with its images, in the order of the prompts and seeds."""

    run: Run
    samples: list[Sample] = field(default_factory=list)

    def values(self, name: str) -> list[float]:
        """One number of every sample."""
        return [float(getattr(sample, name)) for sample in self.samples]

    def seconds(self) -> float:
        """The time of all images together."""
        return sum(self.values("seconds"))


_RUN = re.compile(r"(?:(?P<name>[^={]+)=)?(?P<backend>[\w-]+)(?::(?P<config>.+))?", re.DOTALL)


def parse_run(text: str, steps: int) -> Run:
    """A run from `NAME=BACKEND:JSON`, where name and configuration may be left out.

    Raises:
        ValueError: another form, or no JSON.
    """
    match = _RUN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"a run is NAME=BACKEND:JSON, not {text!r}")
    try:
        config = json.loads(match["config"] or "{}")
    except ValueError as error:
        raise ValueError(f"the configuration of run {text!r} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"the configuration of run {text!r} must be a JSON object")
    backend = None if match["backend"] == "none" else match["backend"]
    return Run((match["name"] or match["backend"]).strip(), backend, config or None, steps)


def make_runs(model: str, chosen: Sequence[str], steps: int, fewer_steps: Sequence[int] | None) -> list[Run]:
    """The reference, the chosen runs (or those that suit the model), and plain sampling with fewer steps.

    `fewer_steps` None is a half and a third of the steps; 0 in it stands for none.

    Raises:
        ValueError: a run that cannot be read, two of one name, fewer steps that are not fewer.
    """
    runs = [Run(REFERENCE, None, None, steps)]
    if fewer_steps is None:  # one step alone is beyond what schedulers with a terminal shift can do
        fewer_steps = [count for count in (steps // 2, steps // 3) if count > 1]
    for count in fewer_steps:
        if count >= steps:
            raise ValueError(f"fewer steps than {steps} are wanted, not {count}")
        if count > 0:
            runs.append(Run(f"{count} steps", None, None, count))
    if chosen:
        runs += [parse_run(text, steps) for text in chosen]
    else:
        runs += [Run(name, backend, config or None, steps) for name, backend, config in RUNS.get(model) or RUNS[""]]
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two runs are called {name!r}: name them, as in NAME=BACKEND:JSON")
    return runs


def embedded_prompts(model: str, count: int = 6) -> list[str]:
    """Some prompts that an embedded model was made for, spread over its list; none for other models."""
    directory = embedded_models().get(model)
    path = directory / "prompts.json" if directory else None
    if path is None or not path.is_file():
        return []
    listed = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(listed, dict):
        listed = listed.get("contact_sheet") or next(iter(listed.values()), [])
    texts = [one.get("prompt") if isinstance(one, dict) else one for one in listed]
    prompts = [text for text in texts if isinstance(text, str)]
    return [prompts[i * len(prompts) // count] for i in range(count)] if len(prompts) > count else prompts


def compare(
    runs: Sequence[Run],
    pipe: Any,
    requests: Sequence[GenerationRequest],
    listener: Callable[[Run, GenerationRequest], Any] = lambda run, request: contextlib.nullcontext(),
) -> list[RunResult]:
    """Run every request under every run; the first run is the reference.

    Runs take turns on each request, so that a machine that slows down slows them all.

    Args:
        runs: at least one.
        pipe: a loaded pipeline without a patch.
        requests: of a single image each, seeded.
        listener: called before each image; gives a context that is open while the image is made, and gives what is
            told of each step, or None.
    """
    results = [RunResult(run) for run in runs]
    for request in requests:
        for result in results:
            with listener(result.run, request) as on_step:
                sample = _sample(result.run, pipe, request, on_step)
            reference = results[0].samples[-1] if results[0].samples and result is not results[0] else sample
            sample.psnr = float(quality.psnr(reference.image, sample.image))
            sample.ssim = float(quality.ssim(reference.image, sample.image))
            result.samples.append(sample)
    return results


def _sample(run: Run, pipe: Any, request: GenerationRequest, on_step: Any) -> Sample:
    request = GenerationRequest(request.prompt, request.seed, request.arguments | {"num_inference_steps": run.steps})
    with Omni(pipe, cache_backend=run.backend, cache_config=run.config) as omni, _counted(pipe) as calls:
        (made,) = [omni.run(request, on_step)]
    return Sample(
        prompt=made.prompt or "",
        seed=made.seed or 0,
        image=made.images[0],
        seconds=made.timings.total,
        forwards=len(calls) if made.cache is None else made.cache.forwards,
        blocks=_share_of_blocks(made),
    )


def _share_of_blocks(made: OmniResult) -> float:
    return 1.0 if made.cache is None else made.cache.blocks_run / made.cache.blocks_total


@contextlib.contextmanager
def _counted(pipe: Any) -> Iterator[list[None]]:
    """A list that grows by one at every call of the transformer."""
    calls: list[None] = []
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        yield calls
        return
    hook = transformer.register_forward_pre_hook(lambda module, arguments: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


@dataclass(frozen=True)
class Summary:
    """One line of the table. Means and sample standard deviations over all images.

    Attributes:
        forwards: transformer forwards computed per image (NFE).
        blocks: transformer blocks run, relative to the reference.
        seconds: per image.
        speedup: the reference's time over this run's, all images together.
        psnr, ssim: against the reference; PSNR in dB.
        worst_psnr: of all images.
    """

    name: str
    forwards: tuple[float, float]
    blocks: float
    seconds: tuple[float, float]
    speedup: float
    psnr: tuple[float, float]
    worst_psnr: float
    ssim: tuple[float, float]


def summarise(results: Sequence[RunResult]) -> list[Summary]:
    """A summary per run; the first run is the reference."""
    reference = results[0]
    return [
        Summary(
            name=result.run.name,
            forwards=mean_and_deviation(result.values("forwards")),
            blocks=statistics.fmean(result.values("blocks")) * result.run.steps / reference.run.steps,
            seconds=mean_and_deviation(result.values("seconds")),
            speedup=reference.seconds() / result.seconds(),
            psnr=mean_and_deviation(result.values("psnr")),
            worst_psnr=min(result.values("psnr")),
            ssim=mean_and_deviation(result.values("ssim")),
        )
        for result in results
    ]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; (inf, 0) where any value is infinite: an image that is identical."""
    if any(math.isinf(value) for value in values):
        return math.inf, 0.0
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(summaries: Sequence[Summary]) -> str:
    """The summaries as aligned text; the reference has no quality of its own."""
    heading = ("run", "NFE", "blocks", "s/image", "speedup", "PSNR dB", "worst", "SSIM")
    lines = [heading]
    for number, one in enumerate(summaries):
        quality_of = (
            ("–", "–", "–")
            if number == 0
            else (_spread(*one.psnr, 1), _fixed(one.worst_psnr, 1), _spread(*one.ssim, 3))
        )
        lines.append(
            (
                one.name,
                _spread(*one.forwards, 0),
                f"{one.blocks:.0%}",
                _spread(*one.seconds, 2),
                f"{one.speedup:.2f}×",
                *quality_of,
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _fixed(value: float, digits: int) -> str:
    return "identical" if math.isinf(value) else f"{value:.{digits}f}"


def _spread(mean: float, deviation: float, digits: int) -> str:
    return "inf" if math.isinf(mean) else f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def to_json(results: Sequence[RunResult], about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything measured, fit for JSON: `about`, then the runs, each with its summary and its images.

    An infinite PSNR (identical images) is null.
    """
    runs = []
    for result, summary in zip(results, summarise(results), strict=True):
        images = [
            {
                "prompt": sample.prompt,
                "seed": sample.seed,
                "seconds": sample.seconds,
                "nfe": sample.forwards,
                "blocks": sample.blocks,
                "psnr": _finite(sample.psnr),
                "ssim": sample.ssim,
            }
            for sample in result.samples
        ]
        psnr = result.values("psnr")
        runs.append(
            {
                "name": result.run.name,
                "cache_backend": result.run.backend,
                "cache_config": jsonable(result.run.config),
                "steps": result.run.steps,
                "nfe": _named(summary.forwards),
                "blocks": summary.blocks,
                "seconds": _named(summary.seconds),
                "speedup": summary.speedup,
                "psnr": {**_named(summary.psnr), "min": _finite(min(psnr)), "p5": _finite(percentile(psnr, 5))},
                "ssim": _named(summary.ssim),
                "images": images,
            }
        )
    return {**about, "runs": runs}


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of 100 lie, interpolated between neighbours."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    return below if below == above else below + (above - below) * (place % 1)


def _named(pair: tuple[float, float]) -> dict[str, float | None]:
    return {"mean": _finite(pair[0]), "std": pair[1]}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def sheet(results: Sequence[RunResult]) -> Any:
    """The contact sheet: a row per prompt and seed, a column per run."""
    summaries = summarise(results)
    several_seeds = len({sample.seed for sample in results[0].samples}) > 1
    columns = [[one.name, f"{one.forwards[0]:.0f} forwards, {one.speedup:.2f}x"] for one in summaries]
    rows, images, captions = [], [], []
    for samples in zip(*(result.samples for result in results), strict=True):
        rows.append(samples[0].prompt + (f" (seed {samples[0].seed})" if several_seeds else ""))
        images.append([sample.image for sample in samples])
        captions.append(
            [
                "reference",
                *(
                    f"{_fixed(sample.psnr, 1)} dB" if math.isfinite(sample.psnr) else "identical"
                    for sample in samples[1:]
                ),
            ]
        )
    return contact_sheet.draw(images, captions, rows, columns)


def write(results: Sequence[RunResult], about: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write `contact_sheet.png` and `results.json` into `directory`, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / "contact_sheet.png", directory / "results.json"]
    write_png(sheet(results), paths[0], {**about, "runs": [jsonable(vars(result.run)) for result in results]})
    paths[1].write_text(json.dumps(to_json(results, about), indent=1) + "\n", encoding="utf-8")
    return paths
