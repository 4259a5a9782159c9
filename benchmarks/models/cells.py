"""A cell of the table of models: one method on one tiny pipeline, tried."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

import omni_kernels
from benchmarks.models.ranks import of_each_rank
from benchmarks.models.tiny import Tiny, flat
from omni_runtime import Omni
from omni_runtime.cache.calibration import UselessFitError
from omni_runtime.calibrate.fitting import RECORDINGS, recording
from omni_runtime.generation.request import GenerationRequest

WORKS, REFUSED, NOTHING, WRONG = "works", "refused", "nothing", "wrong"
#: Fused and compiled blocks may differ from the model's own by this share, in fp32.
ROUNDED = 1e-4
#: The same for two ranks and one. A request has several steps, over which rounding adds up.
RANKED = 1e-3


@dataclass(frozen=True)
class Cell:
    """What came of it.

    Attributes:
        state: "works"; "refused", with an error that says why; "nothing", if nothing was skipped, fused or compiled;
            or "wrong".
        words: the reason, or what was not tried; "" if it works.
        done: how many transformer forwards were skipped, or blocks fused or compiled, ...
        of: ... of how many.
        off: how far the result is from the one without a cache, as a share of its norm.
    """

    state: str
    words: str = ""
    done: int = 0
    of: int = 0
    off: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


class WrongError(Exception):
    """A check failed."""


@dataclass(frozen=True)
class Settings:
    """A method's settings: with `none` nothing is skipped, with `some` something is. None if there are no such."""

    none: Mapping[str, Any] | None
    some: Mapping[str, Any]


_THRESHOLD = 0.9
#: TeaCache's polynomial that leaves a distance as it is.
_IDENTITY = [0.0, 0.0, 0.0, 1.0, 0.0]


def settings(method: str, model: Tiny) -> Settings:
    """The settings with which a method is tried."""
    if method == "velocity_cache":
        steps = taken(model)
        return Settings({"schedule": list(range(steps[0]))} if len(steps) == 1 else None, {"speedup": 2.0})
    if method == "easy_cache":
        return Settings({"ret_steps": model.steps}, {"thresh": 5 * _THRESHOLD, "ret_steps": 1})
    if method == "mag_cache":
        ratios = calibrated(model)
        return Settings(
            {"retention_ratio": 1.0, "mag_ratios": ratios},
            {"threshold": _THRESHOLD, "max_skip_steps": 2, "mag_ratios": ratios},
        )
    return {
        "first_block_cache": Settings({"threshold": 0.0}, {"threshold": _THRESHOLD}),
        "cache_dit": Settings(
            {"residual_diff_threshold": 0.0}, {"residual_diff_threshold": _THRESHOLD, "max_warmup_steps": 1}
        ),
        "tea_cache": Settings(
            {"rel_l1_thresh": 1e-9, "coefficients": _IDENTITY},
            {"rel_l1_thresh": _THRESHOLD, "coefficients": _IDENTITY},
        ),
        "sea_cache": Settings({"threshold": 1e-9}, {"threshold": _THRESHOLD}),
    }[method]


CACHES = ("velocity_cache", "easy_cache", "first_block_cache", "cache_dit", "mag_cache", "tea_cache", "sea_cache")


def calibrated(model: Tiny) -> list[float]:
    """The ratios of MagCache, as `omni calibrate mag_cache` finds them."""
    with recording(model.pipe, "mag_cache") as session:
        model.generate(guided=bool(model.guided))
    fitted: Any = RECORDINGS["mag_cache"].fit(session.points)
    return list(fitted.mag_ratios)


def taken(model: Tiny) -> list[int]:
    """The different numbers of steps of a request's loops: image-to-image pipelines leave out the first ones."""
    with omni_kernels.patched(model.pipe, "velocity_cache") as handle:
        model.generate()
        return sorted({report.steps for report in handle.reports})


class Trial:
    """One tiny pipeline, and what it gives without any patch."""

    def __init__(self, model: Tiny) -> None:
        self.model = model
        self.elsewhere = 0.0  # CPU seconds of the ranks' processes
        with counted(model.pipe) as calls:
            self.plain = model.generate()
        self.calls = calls()
        again = model.generate()
        if not torch.equal(self.plain, again):
            raise WrongError(f"without a patch, two equal requests differ by {off(again, self.plain):.2g}")
        self.guided = model.generate(guided=True) if model.guided else self.plain
        self.has_guidance = bool(model.guided)
        self.larger = model.generate(guided=self.has_guidance, larger=True) if model.larger else None

    def cell(self, method: str) -> Cell:
        """Try a method, or "fuse", "compile", "parallel" or "engine"."""
        attempt: Callable[[], Cell] = {
            "fuse": lambda: self._blocks("fused", {"fuse": True}),
            "compile": lambda: self._blocks("compiled", {"fuse": False, "compile": {"backend": "eager"}}),
            "parallel": self._parallel,
            "engine": self._engine,
        }.get(method, lambda: self._cache(method))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                cell = attempt()
            except (ValueError, TypeError, omni_kernels.PatchConflictError, UselessFitError) as error:
                words = in_words(error, self.model.pipe)
                cell = Cell(REFUSED, re.sub(rf"^({method}|calibration)\b", "the cache", words))
            except torch._dynamo.exc.TorchDynamoException as error:
                cell = Cell(REFUSED, f"torch.compile cannot trace its blocks: {in_words(error, self.model.pipe)[:60]}")
            except WrongError as error:
                cell = Cell(WRONG, str(error))
            except Exception as error:
                cell = Cell(WRONG, f"{type(error).__name__}: {in_words(error, self.model.pipe)}")
            finally:
                omni_kernels.unpatch(self.model.pipe)
        if not torch.equal(self.model.generate(), self.plain):
            return Cell(WRONG, "after `omni_kernels.unpatch`, the result differs from the one before")
        return cell

    def _cache(self, method: str) -> Cell:
        """With nothing skipped: equal, with guidance and in another size, too. Then something is skipped.

        Requests of two sizes are made, the first once more, and the repeated one is equal.
        """
        model, configs = self.model, settings(method, self.model)
        if configs.none is not None:
            self._nothing_skipped(method, configs.none)
        with omni_kernels.patched(model.pipe, method, configs.some) as handle:
            model.generate()  # in it, the blocks are found and checked
            with counted(model.pipe) as calls:
                model.generate()
            report = handle.report
            if report is None or not report.forwards_saved:
                return Cell(NOTHING, "nothing was skipped")
            if calls() >= self.calls:
                raise WrongError(f"{report.forwards_saved} forwards are reported as skipped, but every block ran")
            first = model.generate(guided=self.has_guidance)
            larger = None if self.larger is None else model.generate(guided=self.has_guidance, larger=True)
            second = model.generate(guided=self.has_guidance)
            report = handle.report
        if not first.isfinite().all() and self.guided.isfinite().all():
            raise WrongError("the result is not finite")
        if larger is not None and self.larger is not None:
            if larger.shape != self.larger.shape:
                raise WrongError("in another size, the result has another shape")
            if not larger.isfinite().all() and self.larger.isfinite().all():
                raise WrongError("in another size, the result is not finite")
        if not torch.equal(first, second):
            raise WrongError(f"the same request, once more after another one, is off by {off(second, first):.2g}")
        saved, run = report.forwards_saved, report.forwards
        words = "" if configs.none else "not tried with nothing skipped: its loops have different numbers of steps"
        return Cell(WORKS, words, saved, saved + run, off(first, self.guided))

    def _nothing_skipped(self, method: str, config: Mapping[str, Any]) -> None:
        requests: list[tuple[str, dict[str, bool], torch.Tensor | None]] = [
            ("", {}, self.plain),
            ("with guidance and ", {"guided": True}, self.guided if self.has_guidance else None),
            ("in another size and ", {"guided": self.has_guidance, "larger": True}, self.larger),
        ]
        with omni_kernels.patched(self.model.pipe, method, config) as handle:
            for which, how, expected in requests:
                if expected is None:
                    continue
                made = self.model.generate(**how)
                if not torch.equal(made, expected):
                    raise WrongError(f"{which}with nothing skipped, the result is off by {off(made, expected):.2g}")
                if any(report.forwards_saved for report in handle.reports):
                    raise WrongError(f"{which}a step was skipped where none should be")

    def _parallel(self) -> Cell:
        """Two ranks under first_block_cache: the same steps on both, and the same result as on one."""
        if getattr(getattr(self.model.pipe, "transformer", None), "_cp_plan", None) is None:
            return Cell(REFUSED, "diffusers has no plan of how ranks share this model's tokens (`_cp_plan`)")
        found = of_each_rank(self.model.name, {"threshold": _THRESHOLD})
        self.elsewhere += sum(one.pop("seconds") for one in found)
        first, second = found
        if "refused" in first:
            return Cell(REFUSED, first["refused"])
        if first != second:
            raise WrongError("the ranks have not computed the same")
        if not max(first["off"]) <= RANKED:
            raise WrongError(f"the result is off by {max(first['off']):.2g} from that of one rank")
        if not first["saved"]:
            return Cell(NOTHING, "nothing was skipped")
        return Cell(WORKS, "", first["saved"], first["saved"] + first["run"], max(first["off"]))

    def _engine(self) -> Cell:
        """Three requests in flight at once, without a cache and under first_block_cache: each as alone."""
        model = self.model
        asked = [(0, self.has_guidance), (1, False), (2, self.has_guidance)]
        made = samples = 0
        furthest, words = 0.0, ""
        for backend, config in ((None, None), ("first_block_cache", {"threshold": _THRESHOLD})):
            with Omni(model.pipe, cache_backend=backend, cache_config=config) as omni:

                def request(seed: int, guided: bool) -> GenerationRequest:
                    return GenerationRequest(None, seed, model.asked(guided))

                try:
                    alone = [omni.run(request(*one)) for one in asked]
                except ValueError as error:
                    if backend is None:
                        raise
                    words = f"without a cache: {in_words(error, model.pipe)}"
                    continue
                with omni.engine() as engine:
                    given = omni.cache_backend, omni.cache_config
                    jobs = [engine.take(request(*one), *given) for one in asked]
                    together = [job.result() for job in jobs]
                made += engine.forwards.made
                samples += engine.forwards.samples
            for one, other in zip(together, alone, strict=True):
                pair = [flat(each.frames if each.images is None else each.images) for each in (one, other)]
                furthest = max(furthest, off(*pair))
        if not furthest <= ROUNDED:
            raise WrongError(f"a request is off by {furthest:.2g} from the same one alone")
        if made >= samples:
            return Cell(NOTHING, "no forwards were shared", off=furthest)
        return Cell(WORKS, words, samples - made, samples, furthest)

    def _blocks(self, kind: str, options: Mapping[str, Any]) -> Cell:
        """Fused or compiled blocks: the same result, up to rounding."""
        model = self.model
        with omni_kernels.patched(model.pipe, **options) as handle:
            first, second = model.generate(guided=self.has_guidance), model.generate(guided=self.has_guidance)
            done = len(handle.fused.replaced) if kind == "fused" else len(handle.compiled)
        if not done:
            return Cell(
                NOTHING, "no block of this model has a fused forward" if kind == "fused" else "nothing to compile"
            )
        error = off(first, self.guided)
        if not error <= ROUNDED:
            raise WrongError(f"with {done} {kind} blocks, the result is off by {error:.2g}")
        if not torch.equal(first, second):
            raise WrongError(f"the second of two equal requests is off by {off(second, first):.2g}")
        return Cell(WORKS, "", done, done, error)


def off(made: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of two results as a share of the second one's norm; inf if they have different sizes."""
    if made.shape != expected.shape:
        return float("inf")
    return ((made - expected).norm() / expected.norm().clamp_min(1e-9)).item()


@contextlib.contextmanager
def counted(pipe: Any) -> Iterator[Callable[[], int]]:
    """While open, calls of blocks are counted: of the modules in the transformers' lists."""
    calls, hooks = 0, []

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            for module in part.modules():
                if type(module) is torch.nn.ModuleList:
                    hooks += [block.register_forward_pre_hook(count) for block in module if block is not None]
    try:
        yield lambda: calls
    finally:
        for hook in hooks:
            hook.remove()


def in_words(error: BaseException, pipe: Any) -> str:
    """An error's message without the names of this pipeline and of its parts' classes, to find equal reasons."""
    words = " ".join(str(error).split())
    for name, part in [("pipeline", pipe), *sorted(pipe.components.items())]:
        if isinstance(part, torch.nn.Module) or part is pipe:
            words = re.sub(rf"\b{type(part).__name__}\b", name, words)
    return words
