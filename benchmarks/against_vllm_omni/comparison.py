"""Compares the two sides, names the reason for each difference, and makes the tables."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.against_vllm_omni.cases import MODELS, Setting, calls_of, settings
from benchmarks.against_vllm_omni.environment import newest_cache_dit, requirements

#: Mean |difference| of the latents, over mean |latents|, up to which two sides are equal: rounding of fp32.
TOLERANCE = 1e-5
#: The verdicts on a pair of requests.
EQUAL, THEIRS_WRONG, CHOICE, NOT_THERE = "equal", "theirs wrong", "a choice", "not there"
ROUNDING, UNEXPLAINED = "rounding", "unexplained"


@dataclass(frozen=True)
class Pair:
    """One request on both sides, as it is written to the results.

    Attributes:
        setting: None without a cache.
        cache_dit: the version of cache-dit that theirs ran with.
        ours, theirs: the computed steps of each branch, as text; None without a cache, or if the side has failed.
        difference: mean |difference| of the latents, over mean |latents|; None if a side has failed.
        error: what failed, if a side has.
        newest: whether theirs with the newest cache-dit is equal to ours; None if it was not run, or is this pair.
    """

    model: str
    guided: bool
    steps: int
    setting: Setting | None
    cache_dit: str
    ours: str | None
    theirs: str | None
    difference: float | None
    error: str | None = None
    newest: bool | None = None

    @property
    def backend(self) -> str:
        """The cache; empty without one."""
        return "" if self.setting is None else self.setting.backend

    @property
    def key(self) -> tuple[Any, ...]:
        """What it is, on either version of cache-dit."""
        return self.model, self.guided, self.steps, str(self.setting)

    @property
    def same_steps(self) -> bool:
        """Whether both have run, and compute the same steps."""
        return self.difference is not None and self.ours == self.theirs

    @property
    def equal(self) -> bool:
        """Whether both compute the same steps, and the latents are equal."""
        return self.difference is not None and self.same_steps and self.difference <= TOLERANCE

    def given(self, key: str) -> Any:
        """A key of the configuration; None if it is not given."""
        return None if self.setting is None else self.setting.theirs.get(key)


def compared(
    model: str,
    guided: bool,
    steps: int,
    setting: Setting | None,
    version: str,
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
) -> Pair:
    """A pair, from what both sides give: `latents` and `computed`, or `error`."""
    difference = None
    error = theirs.get("error") or ours.get("error")
    if error is None and setting is not None and len(theirs["computed"]) != len(ours["computed"]):
        error = f"they have {len(theirs['computed'])} branches, ours {len(ours['computed'])}"
    if error is None:
        mean = (theirs["latents"] - ours["latents"]).abs().mean() / ours["latents"].abs().mean()
        difference = float(f"{float(mean):.2g}")
    told = [None if setting is None else _steps(side) for side in (ours, theirs)]
    return Pair(model, guided, steps, setting, version, *told, difference, error)


@dataclass(frozen=True)
class Reason:
    """Why two sides differ.

    Attributes:
        verdict: one of the verdicts.
        text: the rule, in a sentence.
        applies: whether it is the reason in a pair that is not equal.
    """

    verdict: str
    text: str
    applies: Callable[[Pair], bool]


def _of(pair: Pair, pipeline: str) -> bool:
    return MODELS[pair.model] == pipeline


def _forecasts_early(pair: Pair) -> bool:
    """Whether fewer steps are computed before the first that may be skipped than theirs needs for a forecast."""
    warmup, order = pair.given("max_warmup_steps") or 4, pair.given("taylorseer_order") or 1
    return bool(pair.given("enable_taylorseer")) and warmup < order + 3


#: The first one that applies is the reason.
REASONS = (
    Reason(
        NOT_THERE,
        "vLLM-Omni has sea_cache for Cosmos 3 only, and filters the latents there; ours filters block 0's modulated "
        "input, as the paper does",
        lambda pair: pair.backend == "sea_cache" and pair.difference is None,
    ),
    Reason(
        NOT_THERE,
        "vLLM-Omni's mag_cache looks for an argument `hidden_states` of the blocks, which is called otherwise in "
        "Z-Image, and fails",
        lambda pair: pair.backend == "mag_cache" and pair.difference is None and _of(pair, "ZImagePipeline"),
    ),
    Reason(
        THEIRS_WRONG,
        "vLLM-Omni tells cache-dit that every second call is the other guidance branch. Without guidance there is one "
        "call a step: each of the two states sees every second step, so the warmup and the runs of skipped steps are "
        "twice as long, and a mask is read at half the pace",
        lambda pair: pair.backend == "cache_dit" and not pair.guided and _of(pair, "QwenImagePipeline"),
    ),
    Reason(
        THEIRS_WRONG,
        "for FLUX, vLLM-Omni does not tell cache-dit of the second guidance branch. With guidance in two calls, both "
        "share one state: what the first blocks add is compared between the branches, which differ, so that no step "
        "is skipped; and a mask is read at twice the pace",
        lambda pair: pair.backend == "cache_dit" and pair.guided and _of(pair, "FluxPipeline"),
    ),
    Reason(
        THEIRS_WRONG,
        "vLLM-Omni's mag_cache counts transformer calls, not steps. With guidance in two calls, both branches share "
        "one state: the residual of one is added to the other, and each ratio is used for the wrong step",
        lambda pair: pair.backend == "mag_cache" and pair.guided and calls_of(pair.model, True) == 2,
    ),
    Reason(
        THEIRS_WRONG,
        "in the cache-dit that vLLM-Omni pins, a computed step does not end a run of skipped steps, so "
        "max_continuous_cached_steps counts across it; mended in the newest cache-dit, with which both are equal",
        lambda pair: pair.backend == "cache_dit" and pair.newest is True,
    ),
    Reason(
        CHOICE,
        "FLUX has two lists of blocks. cache-dit caches each alone, with first blocks and a decision of its own; ours "
        "is one decision for all blocks",
        lambda pair: pair.backend == "cache_dit" and _of(pair, "FluxPipeline"),
    ),
    Reason(
        CHOICE,
        "cache-dit's TaylorSeer reaches its order after order + 3 computed steps, ours after order + 1; the warmup is "
        "shorter than the former",
        lambda pair: pair.backend == "cache_dit" and _forecasts_early(pair),
    ),
    Reason(
        ROUNDING,
        "the same steps, and latents that differ by less than 1e-4: TaylorSeer's line over a long gap of a static mask "
        "multiplies the rounding of float32, which is not the same in a ladder of differences and in a weighted sum",
        lambda pair: (
            bool(pair.given("enable_taylorseer"))
            and pair.given("scm_steps_policy") == "static"
            and pair.same_steps
            and (pair.difference or 0.0) < 1e-4
        ),
    ),
    Reason(
        CHOICE,
        "vLLM-Omni uses Qwen-Image's polynomial for Z-Image (its comment says that it has to be tuned); ours is one "
        "that was fitted to Z-Image",
        lambda pair: pair.backend == "tea_cache" and pair.given("coefficients") is None and _of(pair, "ZImagePipeline"),
    ),
)


def verdict(pair: Pair) -> tuple[str, str]:
    """(verdict, reason) of a pair; no reason if it is equal."""
    if pair.equal:
        return EQUAL, ""
    for reason in REASONS:
        if reason.applies(pair):
            return reason.verdict, reason.text
    return UNEXPLAINED, pair.error or "not known"


def judged(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs, each of which knows whether the newest cache-dit makes it equal."""
    newest = {pair.key: pair.equal for pair in pairs if pair.cache_dit == newest_cache_dit()}
    pinned = requirements()["cache_dit"]
    return [replace(pair, newest=newest.get(pair.key) if pair.cache_dit == pinned else None) for pair in pairs]


def _ranges(steps: Iterable[int]) -> str:
    """Steps as text: "0-3, 7"."""
    found = []
    for _, run in itertools.groupby(enumerate(steps), lambda pair: pair[1] - pair[0]):
        first, *others = (step for _, step in run)
        found.append(f"{first}-{others[-1]}" if others else str(first))
    return ", ".join(found)


def _steps(side: Mapping[str, Any]) -> str | None:
    """The computed steps of a side, its branches separated; once if they are the same in each."""
    branches = [_ranges(branch) for branch in side.get("computed", ())]
    return " | ".join(branches if len(set(branches)) > 1 else branches[:1]) or None


def row(pair: Pair) -> dict[str, Any]:
    """A pair as it is written to the results."""
    found, reason = verdict(pair)
    made: dict[str, Any] = {
        "model": pair.model,
        "guided": pair.guided,
        "steps": pair.steps,
        "backend": pair.backend or None,
        "setting": None if pair.setting is None else pair.setting.name,
        "cache_dit": pair.cache_dit,
        "verdict": found,
        "computed": pair.ours,
    }
    if pair.difference is not None:
        made |= {"difference": pair.difference} | ({} if pair.same_steps else {"theirs": pair.theirs})
    if pair.error is not None:
        made["error"] = pair.error
    if reason:
        made["reason"] = _place(reason) or reason
    return made


def read(rows: Iterable[Mapping[str, Any]]) -> list[Pair]:
    """The pairs that `row` has written, to be judged again."""
    made = []
    for one in rows:
        known = settings(one["steps"], calls_of(one["model"], one["guided"]))
        named = [s for s in known if (s.backend, s.name) == (one["backend"], one["setting"])]
        pair = Pair(
            *(one[key] for key in ("model", "guided", "steps")),
            setting=named[0] if named else None,
            cache_dit=one["cache_dit"],
            ours=one["computed"],
            theirs=one.get("theirs", one["computed"]),
            difference=one.get("difference"),
            error=one.get("error"),
        )
        made.append(pair)
    return judged(made)


def _place(reason: str) -> int | None:
    """The number of a reason in the table."""
    return next((place for place, one in enumerate(REASONS, 1) if one.text == reason), None)


def summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    """A table: for each cache, model and guidance, how many settings are equal, and why others are not."""
    rows = []
    kinds = dict.fromkeys(
        (p.backend, p.cache_dit if p.backend == "cache_dit" else "", p.model, p.guided) for p in pairs
    )
    for backend, version, model, guided in kinds:
        of_kind = [
            p
            for p in pairs
            if (p.backend, p.model, p.guided) == (backend, model, guided) and version in ("", p.cache_dit)
        ]
        equal = [p.difference or 0.0 for p in of_kind if p.equal]
        others: dict[str, int] = {}
        for pair in of_kind:
            found, reason = verdict(pair)
            if found != EQUAL:
                named = f"{found} ({_place(reason) or '?'})"
                others[named] = others.get(named, 0) + 1
        rows.append(
            [
                f"{backend} (cache-dit {version})" if version else backend or "none",
                model,
                "yes" if guided else "no",
                f"{len(equal)} of {len(of_kind)}",
                f"{max(equal):.0e}" if equal and max(equal) else "0" if equal else "",
                ", ".join(f"{count} {named}" for named, count in others.items()),
            ]
        )
    columns = ["cache", "model", "guidance", "equal settings", "largest difference there", "others (reason below)"]
    return {"columns": columns, "rows": sorted(rows, key=lambda one: one[0])}


def reasons(pairs: Sequence[Pair]) -> dict[str, Any]:
    """A table: each reason, and in how many pairs it is the one."""
    found = [verdict(pair)[1] for pair in pairs]
    rows = [[str(i), one.verdict, one.text, str(found.count(one.text))] for i, one in enumerate(REASONS, 1)]
    return {"columns": ["", "verdict", "the rule", "requests"], "rows": rows}
