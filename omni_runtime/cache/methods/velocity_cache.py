"""Velocity cache: skip whole steps on a schedule, and forecast the guided model output there.

The cached value is what the pipeline passes to `scheduler.step`. For flow matching this is a velocity (MeanCache, Gao
et al. 2026, arXiv:2601.19961, caches it on a schedule, too).

The computed steps are chosen before the request begins, by one of four keys: `schedule` (a list or a name), `budget`
(the number of computed steps), `speedup`, or `quality`. `quality` uses the schedules that `omni calibrate schedule`
found for the model, whose quality was measured. `budget` and `speedup` use these, too, or else a default that is denser
at the beginning (`omni_runtime.cache.schedules.early`).

By default, a skipped step is forecast by the line in σ through the last two outputs (`forecaster` and
`forecaster_order`), extrapolated no farther than `reach`. The fewer steps are computed, the shorter that is by default
(`omni_runtime.cache.schedules.usual_reach`). The next computed step corrects the error of the forecasts
(`corrector_order`, `omni_runtime.cache.output.Corrector`). A calibration may give both numbers with its schedules.

site: whole steps · signal: nothing · gate: schedule · forecaster: Newton in σ, or another, within `reach`
"""

from __future__ import annotations

from typing import Any

from omni_kernels.patching.backends import nearest
from omni_runtime.cache import config as keys
from omni_runtime.cache import schedules
from omni_runtime.cache.forecasters import FORECASTERS, make_forecaster
from omni_runtime.cache.gates import ScheduleGate
from omni_runtime.cache.lifecycle import Request
from omni_runtime.cache.methods.method import Config, Method
from omni_runtime.cache.methods.shared_keys import calibrated_key
from omni_runtime.cache.output import CORRECTOR_ORDER, Chosen, OutputSite

#: The keys that choose the computed steps; at most one may be given.
_ASKED = ("schedule", "budget", "speedup", "quality")


def _schedule_key() -> keys.Key:
    def convert(value: Any) -> str | tuple[int, ...]:
        if isinstance(value, str):
            if value not in schedules.NAMES:
                raise ValueError(nearest(value, schedules.NAMES))
            return str(value)
        found = tuple(sorted(map(keys.whole, keys.entries(value))))
        if not found or found[0] < 0 or len(set(found)) < len(found):
            raise ValueError("it must name each computed step once, from 0")
        return found

    allowed = f"None, a list of step indices, or one of {', '.join(map(repr, schedules.NAMES))}"
    doc = "the computed steps; the first and last are added"
    return keys.Key("schedule", None, "steps or name", allowed, doc, convert)


def _schedule(config: Config, request: Request) -> schedules.Schedule:
    steps = request.steps
    sigmas = request.sigmas[request.begin : request.begin + steps]
    if isinstance(config["schedule"], str):
        return schedules.named(config["schedule"], steps, sigmas)
    if config["schedule"] is not None:
        return schedules.Schedule(steps, tuple(sorted({0, steps - 1, *config["schedule"]})), "given")
    calibrated = schedules.calibrated(config["calibration"])
    if config["quality"] is not None:
        return schedules.fitted(schedules.good_enough(calibrated, config["quality"]), steps, sigmas)
    budget = _budget(config, steps)
    found = schedules.nearest(calibrated, steps, budget)
    return schedules.early(steps, budget) if found is None else schedules.fitted(found, steps, sigmas, budget)


def _budget(config: Config, steps: int) -> int:
    """The number of computed steps, from `budget` or `speedup`; by default half of the steps."""
    if config["budget"] is not None:
        return min(config["budget"], steps)
    if config["speedup"] is None:
        return min(max(2, steps // 2), steps)
    return schedules.fast_enough(schedules.calibrated(config["calibration"]), steps, config["speedup"])


def chosen(schedule: schedules.Schedule, reach: float | None = None, corrector_order: int | None = None) -> Chosen:
    """The choices for a schedule: the given ones, else the schedule's own, else the defaults."""
    if reach is None:
        reach = schedules.usual_reach(len(schedule.computed)) if schedule.reach is None else schedule.reach
    if corrector_order is None:
        corrector_order = CORRECTOR_ORDER if schedule.corrector_order is None else schedule.corrector_order
    return Chosen(ScheduleGate(schedule.mask), reach, corrector_order)


def _output(config: Config) -> OutputSite:
    def choose(request: Request) -> Chosen:
        _relations(config, None, request.steps)
        schedule = _schedule(config, request)
        request.notes.append(
            f"schedule: {len(schedule.computed)} of {schedule.steps} steps computed, {schedule.origin}"
        )
        return chosen(schedule, config["reach"], config["corrector_order"])

    given = config["calibration"]
    return OutputSite(
        choose=choose,
        forecaster=make_forecaster(config["forecaster"], config["forecaster_order"]),
        fitted_for=None if given is None or config["schedule"] is not None else given["calibrated_for"],
    )


def _relations(config: Config, blocks: int | None, steps: int | None) -> None:
    asked = [name for name in _ASKED if config[name] is not None]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} cannot be combined: give one of {', '.join(_ASKED)}")
    if config["quality"] is not None and config["calibration"] is not None:
        schedules.good_enough(schedules.calibrated(config["calibration"]), config["quality"])
    if steps is None:
        return
    if config["speedup"] is not None:
        _budget(config, steps)
    if config["budget"] is not None and config["budget"] > steps:
        raise ValueError(f"budget is {config['budget']} computed steps, but the request has {steps}")
    last = max(config["schedule"]) if isinstance(config["schedule"], tuple) else 0
    if last >= steps:
        raise ValueError(f"schedule names step {last}, but the request has {steps} steps, from 0 to {steps - 1}")


VELOCITY_CACHE = Method(
    name="velocity_cache",
    summary="Velocity cache: skip whole steps on a schedule, and forecast the guided model output there",
    keys=(
        _schedule_key(),
        keys.integer(
            "budget",
            None,
            2,
            None,
            "how many steps are computed; without schedule, budget, speedup and quality, half of the steps",
        ),
        keys.number(
            "speedup",
            None,
            "wanted speedup over all steps, as the calibration measured it; without one, skipped steps count as free",
            above=1.0,
        ),
        keys.number("quality", None, "wanted mean PSNR in dB against the full run; it needs a calibration", above=0.0),
        calibrated_key(
            "velocity_cache", keys.nothing("calibration", "schedules found for a model; None: the model's own")
        ),
        keys.choice(
            "forecaster", "newton", tuple(FORECASTERS), "what replaces the model output of a skipped step", none=True
        ),
        keys.integer(
            "forecaster_order",
            1,
            0,
            2,
            "order of the forecaster, if it has one; in bfloat16 and float16, rounding may cost more than 2 gains",
        ),
        keys.number(
            "reach",
            None,
            "longest extrapolation, in distances between the two newest computed steps; None: the calibration's, or 1, "
            "and less if fewer than 16 steps are computed",
            above=0.0,
        ),
        keys.integer(
            "corrector_order",
            None,
            0,
            3,
            f"order of the correction after skipped steps; 0: none; None: the calibration's, or {CORRECTOR_ORDER}",
        ),
    ),
    relations=_relations,
    calibrated_by="calibration",
    output=_output,
)
