"""Auto: one word, or one number, instead of a method and its keys.

`quality` names a preset: "exact" skips nothing, "high" computes about a half of the steps, "balanced" a third and
"fast" a quarter. `speedup` and `psnr` ask for a number instead. `omni_runtime.cache.presets` says which steps are
computed, and what that rests on; the report repeats it. Whole steps are skipped as by velocity_cache, which is the best
of the methods at each number of forwards on the embedded models (`python -m benchmarks.quality`). Where the pipeline's
scheduler allows no whole steps to be skipped, cache_dit with TaylorSeer is used, with a threshold for each preset.

site: whole steps · signal: nothing · gate: schedule · forecaster: Newton in σ, within the usual reach
"""

from __future__ import annotations

from omni_runtime.cache import config as keys
from omni_runtime.cache import presets, schedules
from omni_runtime.cache.forecasters import make_forecaster
from omni_runtime.cache.lifecycle import Request
from omni_runtime.cache.methods.cache_dit import CACHE_DIT
from omni_runtime.cache.methods.method import Config, Method
from omni_runtime.cache.methods.shared_keys import calibrated_key
from omni_runtime.cache.methods.velocity_cache import chosen
from omni_runtime.cache.output import Chosen, OutputSite

#: preset → threshold of cache_dit with TaylorSeer. In `python -m benchmarks.quality`, these compute 36 to 53%, 34 to
#: 39% and 30 to 32% of the forwards of the embedded models.
THRESHOLDS = {"exact": 0.0, "high": 0.08, "balanced": 0.12, "fast": 0.3}


def asked(config: Config) -> presets.Asked:
    """What a configuration asks for."""
    return presets.Asked(config["quality"], config["speedup"], config["psnr"])


def _output(config: Config) -> OutputSite:
    calibrated = schedules.calibrated(config["calibration"])

    def choose(request: Request) -> Chosen:
        sigmas = request.sigmas[request.begin : request.begin + request.steps]
        found = presets.answer(asked(config), request.steps, calibrated, sigmas)
        request.notes.append(f"{asked(config)}: {found}")
        return chosen(found.schedule)

    given = config["calibration"]
    return OutputSite(
        choose=choose,
        forecaster=make_forecaster("newton", 1),
        fitted_for=None if given is None or config["quality"] == "exact" else given["calibrated_for"],
    )


def _instead(config: Config) -> tuple[Method, Config]:
    for name in ("speedup", "psnr"):
        if config[name] is not None:
            raise ValueError(f"{name} needs whole steps to be skipped: ask for a preset with quality instead")
    threshold = THRESHOLDS[config["quality"] or presets.DEFAULT]
    return CACHE_DIT, CACHE_DIT.check({"residual_diff_threshold": threshold, "enable_taylorseer": True})


def _relations(config: Config, blocks: int | None, steps: int | None) -> None:
    given = [name for name in ("quality", "speedup", "psnr") if config[name] is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} cannot be combined: ask for one of them")
    if steps is not None:
        presets.answer(asked(config), steps, schedules.calibrated(config["calibration"]))


AUTO = Method(
    name="auto",
    summary="Auto: quality='high', 'balanced' or 'fast', or a speedup or PSNR in numbers; the rest is chosen for you",
    keys=(
        keys.choice(
            "quality",
            None,
            tuple(presets.PRESETS),
            "exact: nothing is skipped; high, balanced, fast: about a half, a third, a quarter of the steps are "
            "computed; None: balanced",
            none=True,
        ),
        keys.number("speedup", None, "wanted speedup over the full run, instead of quality", above=1.0),
        keys.number("psnr", None, "wanted mean PSNR in dB against the full run, instead of quality", above=0.0),
        calibrated_key(
            "velocity_cache", keys.nothing("calibration", "schedules found for a model; None: the model's own")
        ),
    ),
    relations=_relations,
    calibrated_by="calibration",
    calibration_of="velocity_cache",
    output=_output,
    instead=_instead,
)
