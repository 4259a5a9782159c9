"""`Method`: a row of the table of methods. `omni_kernels.patch(pipe, cache_backend=...)` installs one by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from omni_kernels.patching import Patch
from omni_runtime.cache import calibration
from omni_runtime.cache import config as keys
from omni_runtime.cache.guided import GuidedSession, guides
from omni_runtime.cache.library import LibrarySession
from omni_runtime.cache.lifecycle import Request
from omni_runtime.cache.models import UNKNOWN, ModelRow, TransformerFacts, row_of
from omni_runtime.cache.output import OutputSession, OutputSite
from omni_runtime.cache.passage import Parts
from omni_runtime.cache.schedulers import check_scheduler, why_twice
from omni_runtime.cache.session import BlockSession, CacheSession
from omni_runtime.cache.stack import MANY

#: Every key of a method with its value.
Config = dict[str, Any]


def no_relations(config: Config, blocks: int | None, steps: int | None) -> None:
    """The check for a method whose values can all be combined."""


@dataclass(frozen=True)
class Method:
    """A row of the table. A method skips blocks or whole steps, so either `parts` or `output` is given.

    Attributes:
        name: the value of `cache_backend=` that selects the method.
        summary: one line for listings.
        keys: the configuration keys.
        parts: (configuration, model row, number of blocks) → the choices for the blocks; raises ValueError if the row
            lacks what the method needs. None for a method that skips no blocks and needs no row.
        output: configuration → the choices for whole steps; None for a method that does not skip whole steps.
        relations: (configuration, number of blocks, number of steps) → raises ValueError for values that cannot be
            combined. The numbers are None if unknown.
        spellings: another name of a key, which other projects use → its name.
        calibrated_by: the key that takes a calibration, by default the model's own; None if the method has none.
        calibration_of: the method whose calibration that is; "" for this one.
        instead: configuration → the method to use, and its configuration, where the pipeline or its scheduler allows
            no whole steps to be skipped. None: that is an error. If it shows only in a request that the pipeline allows
            none, every step of the request is computed.
        mask: (configuration, request) → the request's steps computation mask. Given for a method that the cache-dit
            library can also run, selected by the key `engine`; None for other methods.
    """

    name: str
    summary: str
    keys: tuple[keys.Key, ...]
    parts: Callable[[Config, ModelRow, int], Parts] | None = None
    output: Callable[[Config], OutputSite] | None = None
    relations: Callable[[Config, int | None, int | None], None] = no_relations
    spellings: Mapping[str, str] = field(default_factory=dict)
    calibrated_by: str | None = None
    calibration_of: str = ""
    instead: Callable[[Config], tuple[Method, Config]] | None = None
    mask: Callable[[Config, Request], tuple[int, ...] | None] | None = None

    def check(
        self,
        config: Mapping[str, Any] | None,
        transformer: TransformerFacts | None = None,
        steps: int | None = None,
    ) -> Config:
        """The complete configuration.

        Args:
            config: the given keys. A result of an earlier `check` is not parsed again.
            transformer: what is known of the transformer; None omits the checks that need it.
            steps: the number of denoising steps of the request; None omits the checks that need it.

        Raises:
            ValueError: unknown key, value out of range, values that cannot be combined, a transformer that lacks what
                the method needs, or a calibration that was made for another transformer class.
            TypeError: a value of the wrong type.
        """
        resolved = (
            config if isinstance(config, keys.Resolved) else keys.resolve(self.keys, config, self.name, self.spellings)
        )
        rowless = transformer is None or self.parts is None or self._on_library(resolved)
        row = None if transformer is None or rowless else row_of(transformer.class_name)
        self.relations(resolved, None if transformer is None else transformer.blocks, steps)
        if transformer is not None and self.calibrated_by is not None:
            calibration.check_class(self._calibrated, resolved[self.calibrated_by], transformer.class_name)
        if self.parts is not None and row is not None and transformer is not None:
            try:
                self.parts(resolved, row, MANY if transformer.blocks is None else transformer.blocks)
            except ValueError as error:
                if row is not UNKNOWN:
                    raise
                raise ValueError(f"{error} (the transformer is {transformer.class_name!r})") from None
        if transformer is not None and self.output is not None:
            self.output(resolved)
        return resolved

    def with_own(self, config: Config, directory: str | None) -> Config:
        """The configuration, with the model's own calibration added if the caller gives none.

        Args:
            config: a result of `check`; only what is added is parsed.
            directory: the model's directory, or its name on the hub.

        Raises:
            ValueError: the calibration cannot be read; the message names the file.
        """
        if not directory or self.calibrated_by is None or config[self.calibrated_by] is not None:
            return config
        file = calibration.own_file(directory, self._calibrated)
        if file is None:
            return config
        key = next(key for key in self.keys if key.name == self.calibrated_by)
        return keys.Resolved({**config, key.name: key.parse(file)})

    def install(self, pipe: Any, config: Config, patch: Patch) -> CacheSession:
        """Install the method on `pipe`; `config` is complete.

        Raises:
            ValueError, PatchConflictError: the method does not support the pipeline; the message says why.
        """
        session = self.session(pipe, config)
        session.install(patch)
        return session

    @property
    def _calibrated(self) -> str:
        return self.calibration_of or self.name

    def _on_library(self, config: Config) -> bool:
        return self.mask is not None and config["engine"] == "library"

    def session(self, pipe: Any, config: Config) -> CacheSession:
        """The method for `pipe`, not installed; `config` is complete. Raises as `install` does."""
        if self.mask is not None and self._on_library(config):
            return LibrarySession(self.name, pipe, config, partial(self.mask, config))
        if self.output is not None:
            return self._of_whole_steps(pipe, config, self.output(config))
        choose = self.parts
        assert choose is not None  # either `parts` or `output` is given

        def parts(row: ModelRow, blocks: int) -> Parts:
            self.relations(config, blocks, None)
            return choose(config, row, blocks)

        session = BlockSession(self.name, pipe, parts)
        if self.calibrated_by is not None:
            classes = [kind.__name__ for kind in type(session.transformer).__mro__]
            calibration.check_class(self._calibrated, config[self.calibrated_by], *classes)
        return session

    def _of_whole_steps(self, pipe: Any, config: Config, site: OutputSite) -> CacheSession:
        kind = GuidedSession if guides(pipe) else OutputSession
        if self.instead is None:
            return kind(self.name, pipe, site)
        why = _why_no_whole_steps(pipe)
        if why is None:
            return kind(self.name, pipe, site, may_compute_all=True)
        other, its = self.instead(config)
        session = other.session(pipe, its)
        session.notes.append(f"{self.name}: {other.name}, because {why}")
        return session


def _why_no_whole_steps(pipe: Any) -> str | None:
    """Why whole steps cannot be skipped, in words; None if they can, as far as the classes show."""
    try:
        check_scheduler(pipe.scheduler)
    except ValueError:
        return f"whole steps cannot be skipped with {type(pipe.scheduler).__name__}"
    return why_twice(type(pipe))
