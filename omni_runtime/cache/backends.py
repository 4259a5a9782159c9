"""The table of methods: each is one choice of site, signal, gate and forecaster, and the keys that set them.

To add a method, add a `Method` here and its name to the entry points in pyproject.toml.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from omni_kernels.patching import Patch
from omni_kernels.patching.backends import nearest
from omni_runtime.cache import calibration, library, magnitudes, polynomial, schedules
from omni_runtime.cache import config as keys
from omni_runtime.cache.forecasters import FORECASTERS, make_forecaster
from omni_runtime.cache.gates import (
    AccumulatedPolynomialGate,
    Limits,
    MagnitudeRatioGate,
    ScheduleGate,
    ThresholdGate,
)
from omni_runtime.cache.lifecycle import Request
from omni_runtime.cache.masks import POLICIES, parse_mask, steps_mask
from omni_runtime.cache.models import ModelRow, TransformerFacts, row_of
from omni_runtime.cache.output import OutputSession, OutputSite
from omni_runtime.cache.passage import Parts
from omni_runtime.cache.session import BlockSession, CacheSession
from omni_runtime.cache.signals import (
    ExpectedChange,
    FilteredModulatedInput,
    FirstBlocksResidual,
    ModulatedInput,
    Nothing,
)

Config = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A row of the table, and the cache backend that it makes.

    Attributes:
        name: what `cache_backend=` is given.
        summary: one line for listings.
        keys: the configuration keys.
        parts: (configuration, model row, number of blocks) → the choices for the blocks; raises ValueError for a row
            that lacks what the method needs. None for a method that leaves the blocks alone, and needs no row.
        relations: (configuration, number of blocks, number of steps; None where unknown) → raises for values that
            don't go together.
        calibrated_by: the key that takes a calibration, whose default is the model's own; None for a method without.
        own: (checked configuration, a model's directory) → the same with what the directory brings, for a method that
            is made of others.
        output: configuration → the choices for whole steps; None for a method that skips none.
    """

    name: str
    summary: str
    keys: tuple[keys.Key, ...]
    parts: Callable[[Config, ModelRow, int], Parts] | None
    relations: Callable[[Config, int | None, int | None], None]
    calibrated_by: str | None = None
    own: Callable[[Mapping[str, Any], str], Mapping[str, Any]] | None = None
    output: Callable[[Config], OutputSite] | None = None

    def check(
        self,
        config: Mapping[str, Any] | None,
        transformer: TransformerFacts | None = None,
        steps: int | None = None,
    ) -> Config:
        """The complete configuration.

        Args:
            config: the given keys.
            transformer: what is known of the transformer; checks that need the number of blocks wait for it.
            steps: denoising steps of the request; checks that need them wait for it.

        Raises:
            ValueError: unknown key, value out of range, values that don't go together.
            TypeError: a value of the wrong type.
        """
        resolved = keys.resolve(self.keys, config, self.name)
        rowless = transformer is None or self.parts is None or _on_library(resolved)
        row = None if transformer is None or rowless else row_of(transformer.class_name)
        self.relations(resolved, None if transformer is None else transformer.blocks, steps)
        if self.parts is not None and row is not None and transformer is not None and transformer.blocks is not None:
            self.parts(resolved, row, transformer.blocks)
        if transformer is not None and self.output is not None:
            self.output(resolved)
        return resolved

    def with_own(self, config: Mapping[str, Any] | None, directory: str | None) -> Mapping[str, Any] | None:
        """A checked configuration, with the model's own calibration where the caller gives none.

        Args:
            directory: the model's, or its name on the hub.
        """
        if not directory:
            return config
        if self.own is not None:
            return self.own(config or {}, directory)
        if self.calibrated_by is None or (config or {}).get(self.calibrated_by) is not None:
            return config
        file = calibration.own_file(directory, self.name)
        return config if file is None else {**(config or {}), self.calibrated_by: file}

    def install(self, pipe: Any, config: Config, patch: Patch) -> CacheSession:
        """Install on `pipe`; `config` is complete."""
        if _on_library(config):
            session: CacheSession = library.LibrarySession(self.name, pipe, config, partial(_request_mask, config))
            session.install(patch)
            return session
        choose = self.parts

        def parts(row: ModelRow, blocks: int) -> Parts:
            assert choose is not None
            self.relations(config, blocks, None)
            return choose(config, row, blocks)

        if self.output is not None:
            session = OutputSession(self.name, pipe, self.output(config))
        else:
            session = BlockSession(self.name, pipe, parts)
        session.install(patch)
        return session


def _on_library(config: Config) -> bool:
    return config.get("engine") == "library"


_FORECASTER_KEYS = (
    keys.choice("forecaster", None, tuple(FORECASTERS), "what stands in for a skipped residual; None: reuse"),
    keys.integer("forecaster_order", 1, 0, 3, "order of taylorseer, newton and hermite, which keep one snapshot more"),
)


def _forecaster(config: Config) -> tuple[str, int]:
    return config["forecaster"] or "reuse", config["forecaster_order"]


_DECISION_KEYS = (
    keys.choice(
        "decision", "measure", ("measure", "replay"), "who decides: each request, or the first of its kind for all"
    ),
    keys.number(
        "drift_tolerance", 0.1, "drift, in shares of the threshold, past which a request decides afresh", low=0.0
    ),
)


def _drift_tolerance(config: Config) -> float | None:
    return config["drift_tolerance"] if config["decision"] == "replay" else None


def _unrelated(config: Config, blocks: int | None, steps: int | None) -> None:
    return None


def _calibrated_key(method: str, numbers: keys.Key) -> keys.Key:
    """A key that takes numbers, or a file of `omni calibrate` that holds them."""
    allowed = f"{numbers.allowed}, or a file of `omni calibrate`, by its path or parsed"

    def parse(value: Any) -> Any:
        if not isinstance(value, str | os.PathLike | Mapping):
            return numbers.parse(value)
        try:
            return calibration.read(value, method)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{numbers.name}: {error}") from None

    return keys.Key(numbers.name, None, f"{numbers.type_name} or a file", allowed, numbers.doc, parse)


def _numbers(key: str, given: Any, published: Any) -> tuple[Mapping[str, Any], Mapping[str, Any] | None, str]:
    """The numbers under `key` with whatever a file holds beside them, the runs that they were fitted to, and a note."""
    if isinstance(given, Mapping):
        return given, given["calibrated_for"], f"{key}: calibrated on {calibration.summary(given)}"
    if given is None:
        return {key: published}, None, f"{key}: those published for the transformer's class"
    return {key: given}, None, f"{key}: given as numbers"


def _tea_cache(config: Config, row: ModelRow, blocks: int) -> Parts:
    if row.modulation is None:
        raise ValueError("tea_cache watches block 0's modulated input: the transformer's ModelRow gives no modulation")
    numbers, fitted_for, note = _numbers("coefficients", config["coefficients"], row.tea_coefficients)
    coefficients, fitted = numbers["coefficients"], numbers.get("range", (-math.inf, math.inf))
    if coefficients is None:
        raise ValueError("no TeaCache coefficients are known for this transformer: give them as the key 'coefficients'")
    return Parts(
        first=0,
        last=blocks,
        signal=ModulatedInput(row.modulation),
        gate=lambda request: AccumulatedPolynomialGate(Limits(), config["rel_l1_thresh"], coefficients, fitted),
        forecaster=make_forecaster(*_forecaster(config)),
        fitted_for=fitted_for,
        note=note,
        drift_tolerance=_drift_tolerance(config),
    )


TEA_CACHE = Method(
    name="tea_cache",
    summary="TeaCache: skip all blocks while block 0's modulated input has changed little since the last computed step",
    keys=(
        keys.number("rel_l1_thresh", 0.2, "accumulated distance at which a step is computed", positive=True),
        _calibrated_key(
            "tea_cache",
            keys.numbers(
                "coefficients",
                polynomial.DEGREE + 1,
                "polynomial of the distance, highest power first; None: the model's own",
            ),
        ),
        *_DECISION_KEYS,
        *_FORECASTER_KEYS,
    ),
    parts=_tea_cache,
    relations=_unrelated,
    calibrated_by="coefficients",
)


def _first_block_cache(config: Config, row: ModelRow, blocks: int) -> Parts:
    return Parts(
        first=1,
        last=blocks,
        signal=FirstBlocksResidual(),
        gate=lambda request: ThresholdGate(Limits(), config["threshold"]),
        forecaster=make_forecaster(*_forecaster(config)),
        drift_tolerance=_drift_tolerance(config),
    )


def _first_block_relations(config: Config, blocks: int | None, steps: int | None) -> None:
    if blocks is not None and blocks < 2:
        raise ValueError(f"first_block_cache needs at least 2 blocks; the transformer has {blocks}")


FIRST_BLOCK_CACHE = Method(
    name="first_block_cache",
    summary="First-block cache: skip all blocks but the first while its residual has changed little",
    keys=(
        keys.number("threshold", 0.05, "distance below which a step is skipped; ≤ 0 never skips, ≥ 1 always"),
        *_DECISION_KEYS,
        *_FORECASTER_KEYS,
    ),
    parts=_first_block_cache,
    relations=_first_block_relations,
)


def _mask_key() -> keys.Key:
    def parse(value: Any) -> tuple[int, ...] | None:
        try:
            return None if value is None else parse_mask(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"steps_computation_mask: {error}") from None

    allowed = "None or one 0 or 1 for each step, as a list or a string"
    doc = "explicit steps computation mask: 1 computes the step"
    return keys.Key("steps_computation_mask", None, "mask", allowed, doc, parse)


def _dbcache_mask(config: Config, steps: int) -> tuple[int, ...] | None:
    mask = config["steps_computation_mask"]
    if mask is None:
        policy = config["scm_steps_mask_policy"]
        return None if policy is None else steps_mask(policy, steps)
    if len(mask) != steps:
        raise ValueError(f"steps_computation_mask has {len(mask)} entries, but the request has {steps} steps")
    return mask


def _request_mask(config: Config, request: Request) -> tuple[int, ...] | None:
    told = config["num_inference_steps"]
    if told is not None and told != request.steps:
        warnings.warn(
            f"cache_config says num_inference_steps={told}; the request has {request.steps} steps, which counts",
            stacklevel=3,
        )
    return _dbcache_mask(config, request.steps)


def _dbcache_gate(config: Config) -> Callable[[Request], ThresholdGate]:
    def gate(request: Request) -> ThresholdGate:
        limits = Limits(
            warmup=config["max_warmup_steps"],
            warmup_interval=config["warmup_interval"],
            mask=_request_mask(config, request),
            static=config["scm_steps_policy"] == "static",
            most_skips=config["max_cached_steps"],
            longest_run=config["max_continuous_cached_steps"],
        )
        return ThresholdGate(limits, config["residual_diff_threshold"])

    return gate


def _cache_dit(config: Config, row: ModelRow, blocks: int) -> Parts:
    name, order = _forecaster(config)
    if config["enable_taylorseer"]:
        name, order = "taylorseer", config["taylorseer_order"]
    return Parts(
        first=config["Fn_compute_blocks"],
        last=blocks - config["Bn_compute_blocks"],
        signal=FirstBlocksResidual(),
        gate=_dbcache_gate(config),
        forecaster=make_forecaster(name, order),
        drift_tolerance=_drift_tolerance(config),
    )


def _dbcache_relations(config: Config, blocks: int | None, steps: int | None) -> None:
    first, last = config["Fn_compute_blocks"], config["Bn_compute_blocks"]
    if blocks is not None and first + last >= blocks:
        raise ValueError(
            f"Fn_compute_blocks + Bn_compute_blocks is {first} + {last}: of the transformer's {blocks} blocks at "
            "least one must be left to skip"
        )
    if config["enable_taylorseer"] and config["forecaster"] not in (None, "taylorseer"):
        raise ValueError(f"enable_taylorseer contradicts forecaster={config['forecaster']!r}: give one of them")
    if config["scm_steps_mask_policy"] is not None and config["steps_computation_mask"] is not None:
        raise ValueError("scm_steps_mask_policy and steps_computation_mask exclude each other: give one of them")
    told = config["num_inference_steps"] if steps is None else steps
    if told is not None:
        _dbcache_mask(config, told)
    if _on_library(config):
        library.check(config)


CACHE_DIT = Method(
    name="cache_dit",
    summary="DBCache, with TaylorSeer and SCM: skip the middle blocks while what the first Fn add has changed little",
    keys=(
        keys.integer("Fn_compute_blocks", 1, 1, None, "first blocks, always computed and watched"),
        keys.integer("Bn_compute_blocks", 0, 0, None, "last blocks, always computed"),
        keys.integer("max_warmup_steps", 4, 0, None, "first steps, always computed"),
        keys.integer("warmup_interval", 1, 1, None, "of the warmup's steps, compute every so many"),
        keys.integer("max_cached_steps", -1, -1, None, "most steps skipped in a request; −1: no limit"),
        keys.integer("max_continuous_cached_steps", 3, -1, None, "most steps skipped in a row; −1: no limit"),
        keys.number("residual_diff_threshold", 0.24, "distance below which a step is skipped; ≤ 0 never, ≥ 1 always"),
        keys.flag("enable_taylorseer", False, "forecast the residual by TaylorSeer instead of reusing it"),
        keys.integer("taylorseer_order", 1, 0, 3, "order of TaylorSeer"),
        keys.choice("scm_steps_mask_policy", None, POLICIES, "steps computation mask by name"),
        _mask_key(),
        keys.choice(
            "scm_steps_policy", "dynamic", ("dynamic", "static"), "the mask's zeros: ask the gate, or skip at once"
        ),
        keys.integer("num_inference_steps", None, 1, None, "not needed: a request's steps are read from its scheduler"),
        keys.choice("engine", "own", ("own", "library"), "who runs the blocks: we, or the installed cache-dit library"),
        *_DECISION_KEYS,
        *_FORECASTER_KEYS,
    ),
    parts=_cache_dit,
    relations=_dbcache_relations,
)


def _mag_cache(config: Config, row: ModelRow, blocks: int) -> Parts:
    numbers, fitted_for, note = _numbers("mag_ratios", config["mag_ratios"], row.mag_ratios)
    ratios = numbers["mag_ratios"]
    if ratios is None:
        raise ValueError(
            "no MagCache ratios are known for this transformer: give them as the key 'mag_ratios', or find them with "
            "`omni calibrate mag_cache`"
        )

    def gate(request: Request) -> MagnitudeRatioGate:
        scheduled = request.begin + request.steps
        # Rounded as diffusers does: 28 steps at 0.2 retain 6.
        retained = int(config["retention_ratio"] * request.steps + 0.5)
        limits = Limits(warmup=retained, longest_run=config["max_skip_steps"])
        return MagnitudeRatioGate(limits, config["threshold"], magnitudes.resized(ratios, scheduled)[request.begin :])

    return Parts(
        first=0,
        last=blocks,
        signal=Nothing(),
        gate=gate,
        forecaster=make_forecaster(*_forecaster(config)),
        fitted_for=fitted_for,
        note=note,
    )


MAG_CACHE = Method(
    name="mag_cache",
    summary="MagCache: skip all blocks while calibrated ratios say that the residual's magnitude has changed little",
    keys=(
        keys.number("threshold", 0.06, "accumulated error of the magnitude up to which steps are skipped"),
        keys.integer("max_skip_steps", 3, 0, None, "most steps skipped in a row"),
        keys.fraction("retention_ratio", 0.2, "share of the steps, the first ones, that are always computed"),
        _calibrated_key(
            "mag_cache",
            keys.positives("mag_ratios", "ratio of each step, for any number of steps; None: the model's own"),
        ),
        *_FORECASTER_KEYS,
    ),
    parts=_mag_cache,
    relations=_unrelated,
    calibrated_by="mag_ratios",
)


def _sea_cache(config: Config, row: ModelRow, blocks: int) -> Parts:
    if row.modulation is None or row.noise_grid is None:
        lacking = "modulation" if row.modulation is None else "noise_grid"
        raise ValueError(
            "sea_cache filters block 0's modulated input over the grid of its tokens: the transformer's ModelRow gives "
            f"no {lacking}"
        )

    def gate(request: Request) -> AccumulatedPolynomialGate:
        ends = (1, *[0] * (request.steps - 2), 1)[: request.steps]
        limits = Limits(mask=ends, longest_run=config["max_consecutive_cached"])
        return AccumulatedPolynomialGate(limits, config["threshold"], (1.0, 0.0))

    return Parts(
        first=0,
        last=blocks,
        signal=FilteredModulatedInput(row.modulation, row.noise_grid, config["power_exp"]),
        gate=gate,
        forecaster=make_forecaster(*_forecaster(config)),
        drift_tolerance=_drift_tolerance(config),
    )


SEA_CACHE = Method(
    name="sea_cache",
    summary="SeaCache: TeaCache on what a filter for the step's noise level leaves of block 0's modulated input",
    keys=(
        keys.number("threshold", 0.25, "accumulated distance at which a step is computed", positive=True),
        keys.integer("max_consecutive_cached", 2, -1, None, "most steps skipped in a row; −1: no limit"),
        keys.number("power_exp", 3.0, "p of the signal's spectrum 1/|f|^p that the filter assumes", positive=True),
        *_DECISION_KEYS,
        *_FORECASTER_KEYS,
    ),
    parts=_sea_cache,
    relations=_unrelated,
)


def _schedule_key() -> keys.Key:
    allowed = f"None, a list of step indices, or one of {', '.join(map(repr, schedules.NAMES))}"

    def parse(value: Any) -> str | tuple[int, ...] | None:
        if value is None:
            return None
        if isinstance(value, str):
            if value not in schedules.NAMES:
                raise ValueError(f"schedule must be {allowed}, not {value!r}: {nearest(value, schedules.NAMES)}")
            return value
        if not isinstance(value, Sequence) or any(isinstance(s, bool) or not isinstance(s, int) for s in value):
            raise TypeError(f"schedule must be {allowed}, not {value!r}")
        if not value or min(value) < 0 or len(set(value)) < len(value):
            raise ValueError(f"schedule must name each computed step once, from 0, not {value!r}")
        return tuple(sorted(value))

    return keys.Key(
        "schedule", None, "steps or name", allowed, "the computed steps; the first and last are added", parse
    )


_REACH_KEY = keys.number(
    "reach", 1.0, "longest extrapolation, in distances between the two newest computed steps", positive=True
)

_ASKED = ("schedule", "budget", "speedup", "quality")


def _velocity_schedule(config: Config, request: Request, transformer: str) -> schedules.Schedule:
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
    published = [one for one in schedules.PUBLISHED.values() if one.transformer == transformer]
    found = schedules.nearest(calibrated, steps, budget) or schedules.nearest(published, steps, budget)
    return schedules.even(steps, budget) if found is None else schedules.fitted(found, steps, sigmas, budget)


def _budget(config: Config, steps: int) -> int:
    """How many steps are computed, where their number was asked for."""
    if config["budget"] is not None:
        return min(config["budget"], steps)
    if config["speedup"] is None:
        return max(2, steps // 2)
    return schedules.fast_enough(schedules.calibrated(config["calibration"]), steps, config["speedup"])


def _velocity_cache(config: Config) -> OutputSite:
    def gate(request: Request, transformer: str) -> ScheduleGate:
        _velocity_relations(config, None, request.steps)
        schedule = _velocity_schedule(config, request, transformer)
        request.notes.append(
            f"schedule: {len(schedule.computed)} of {schedule.steps} steps computed, {schedule.origin}"
        )
        return ScheduleGate(schedule.mask)

    given = config["calibration"]
    return OutputSite(
        gate=gate,
        forecaster=make_forecaster(config["forecaster"], config["forecaster_order"]),
        reach=config["reach"],
        corrector_order=config["corrector_order"],
        fitted_for=None if given is None or config["schedule"] is not None else given["calibrated_for"],
    )


def _velocity_relations(config: Config, blocks: int | None, steps: int | None) -> None:
    asked = [name for name in _ASKED if config[name] is not None]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} exclude each other: give one of {', '.join(_ASKED)}")
    if config["quality"] is not None and config["calibration"] is not None:
        schedules.good_enough(schedules.calibrated(config["calibration"]), config["quality"])
    if steps is None:
        return
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
        keys.integer("budget", None, 2, None, "how many steps are computed"),
        keys.optional_number(
            "speedup",
            1.0,
            "times as fast as with all steps, by what was measured where that was calibrated; nothing given: half of "
            "the steps",
        ),
        keys.optional_number("quality", 0.0, "mean PSNR in dB against the full run, where that was calibrated"),
        _calibrated_key(
            "velocity_cache", keys.nothing("calibration", "schedules found for a model; None: the model's own")
        ),
        keys.choice("forecaster", "newton", tuple(FORECASTERS), "what stands in for a skipped step's model output"),
        keys.integer("forecaster_order", 1, 0, 2, "order of the forecaster, where it has one"),
        _REACH_KEY,
        keys.integer("corrector_order", 2, 0, 3, "order of what corrects skipped steps behind them; 0: nothing"),
    ),
    parts=None,
    relations=_velocity_relations,
    calibrated_by="calibration",
    output=_velocity_cache,
)


def _easy_cache(config: Config) -> OutputSite:
    """EasyCache's choices: a skipped step is given x + (out − x) of the last computed one.

    To the guided output; where guidance is linear in the branches' outputs, that is what adding each branch's own
    difference, as the authors do, would give. (Qwen-Image's guidance rescales, and is not.)
    """

    def gate(request: Request, transformer: str) -> AccumulatedPolynomialGate:
        first, last = config["ret_steps"], request.steps - 1
        forced = tuple(int(step < first or step == last) for step in range(request.steps))
        return AccumulatedPolynomialGate(Limits(warmup=first, mask=forced), config["thresh"], (1.0, 0.0))

    return OutputSite(
        gate=gate,
        forecaster=make_forecaster(*_forecaster(config)),
        reach=config["reach"],
        signal=ExpectedChange,
        residual=True,
        drift_tolerance=_drift_tolerance(config),
    )


EASY_CACHE = Method(
    name="easy_cache",
    summary="EasyCache: skip whole steps while the guided model output is expected to have changed little",
    keys=(
        keys.number("thresh", 0.05, "accumulated expected change at which a step is computed", positive=True),
        keys.integer("ret_steps", 10, 0, None, "first steps, always computed"),
        *_DECISION_KEYS,
        *_FORECASTER_KEYS,
        _REACH_KEY,
    ),
    parts=None,
    relations=_unrelated,
    output=_easy_cache,
)


def _parts_key(name: str, doc: str, parse: Callable[[Any], Config]) -> keys.Key:
    def checked(value: Any) -> Config:
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be an object of keys, not {value!r}")
        try:
            return parse(value)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from None

    return keys.Key(name, parse({}), "object", "an object of keys", doc, checked)


def _block_method(given: Mapping[str, Any]) -> Method:
    name = given.get("cache_backend") or CACHE_DIT.name
    known = {method.name: method for method in BLOCK_METHODS}
    if name not in known:
        raise ValueError(f"cache_backend must be a method for blocks, not {name!r}: {nearest(str(name), known)}")
    return known[name]


def _blocks(value: Mapping[str, Any]) -> Config:
    unknown = set(value) - {"cache_backend", "cache_config"}
    if unknown:
        raise ValueError(f"no key {min(unknown)!r}: there are cache_backend and cache_config")
    method = _block_method(value)
    config = method.check(value.get("cache_config"))
    if _on_library(config):
        raise ValueError("engine 'library' cannot be combined: the library keeps the steps itself")
    return {"cache_backend": method.name, "cache_config": config}


def _combined_own(config: Mapping[str, Any], directory: str) -> Mapping[str, Any]:
    blocks = config.get("blocks") or {}
    own = _block_method(blocks).with_own(blocks.get("cache_config"), directory)
    velocity = VELOCITY_CACHE.with_own(config.get("velocity"), directory)
    return {**config, "velocity": velocity or {}, "blocks": {**blocks, "cache_config": own or {}}}


def _combined_parts(config: Config, row: ModelRow, blocks: int) -> Parts:
    method = _block_method(config["blocks"])
    assert method.parts is not None
    return method.parts(config["blocks"]["cache_config"], row, blocks)


def _combined_relations(config: Config, blocks: int | None, steps: int | None) -> None:
    _velocity_relations(config["velocity"], blocks, steps)
    _block_method(config["blocks"]).relations(config["blocks"]["cache_config"], blocks, steps)


#: The methods that watch and skip blocks, any of which can serve the steps that a schedule computes.
BLOCK_METHODS = (TEA_CACHE, CACHE_DIT, FIRST_BLOCK_CACHE, MAG_CACHE, SEA_CACHE)

COMBINED = Method(
    name="combined",
    summary="Velocity cache over a cache of blocks, which skips blocks in some of the steps that are computed",
    keys=(
        _parts_key("velocity", "keys of velocity_cache", VELOCITY_CACHE.check),
        _parts_key("blocks", "cache_backend and cache_config of the cache of blocks; cache_dit by default", _blocks),
    ),
    parts=_combined_parts,
    relations=_combined_relations,
    own=_combined_own,
    output=lambda config: _velocity_cache(config["velocity"]),
)

#: name → method; the first one is what to try first
METHODS: dict[str, Method] = {method.name: method for method in (VELOCITY_CACHE, *BLOCK_METHODS, EASY_CACHE, COMBINED)}
