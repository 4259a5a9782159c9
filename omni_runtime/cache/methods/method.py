"""What a method is: a row of the table, which `omni_kernels.patch(pipe, cache_backend=...)` installs by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from omni_kernels.patching import Patch
from omni_runtime.cache import calibration
from omni_runtime.cache import config as keys
from omni_runtime.cache.library import LibrarySession
from omni_runtime.cache.lifecycle import Request
from omni_runtime.cache.models import ModelRow, TransformerFacts, row_of
from omni_runtime.cache.output import OutputSession, OutputSite
from omni_runtime.cache.passage import Parts
from omni_runtime.cache.session import BlockSession, CacheSession

#: Every key of a method with its value.
Config = dict[str, Any]


def no_relations(config: Config, blocks: int | None, steps: int | None) -> None:
    """Of a method whose values all go together."""


@dataclass(frozen=True)
class Method:
    """A row of the table. It skips blocks or whole steps: one of `parts` and `output` is given.

    Attributes:
        name: what `cache_backend=` is given.
        summary: one line for listings.
        keys: the configuration keys.
        parts: (configuration, model row, number of blocks) → the choices for the blocks; raises ValueError for a row
            that lacks what the method needs. None for a method that leaves the blocks alone, and needs no row.
        output: configuration → the choices for whole steps; None for a method that skips none.
        relations: (configuration, number of blocks, number of steps; None where unknown) → raises ValueError for values
            that don't go together.
        calibrated_by: the key that takes a calibration, whose default is the model's own; None for a method without.
        mask: of a method that the cache-dit library can run, too, where its key `engine` says so: (configuration,
            request) → the request's steps computation mask. None for a method that only we run.
    """

    name: str
    summary: str
    keys: tuple[keys.Key, ...]
    parts: Callable[[Config, ModelRow, int], Parts] | None = None
    output: Callable[[Config], OutputSite] | None = None
    relations: Callable[[Config, int | None, int | None], None] = no_relations
    calibrated_by: str | None = None
    mask: Callable[[Config, Request], tuple[int, ...] | None] | None = None

    def check(
        self,
        config: Mapping[str, Any] | None,
        transformer: TransformerFacts | None = None,
        steps: int | None = None,
    ) -> Config:
        """The complete configuration.

        Args:
            config: the given keys; what this has returned before is not read again.
            transformer: what is known of the transformer; checks that need the number of blocks wait for it.
            steps: denoising steps of the request; checks that need them wait for it.

        Raises:
            ValueError: unknown key, value out of range, values that don't go together, a transformer that lacks what
                the method needs.
            TypeError: a value of the wrong type.
        """
        resolved = config if isinstance(config, keys.Resolved) else keys.resolve(self.keys, config, self.name)
        rowless = transformer is None or self.parts is None or self._on_library(resolved)
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
        if not directory or self.calibrated_by is None or (config or {}).get(self.calibrated_by) is not None:
            return config
        file = calibration.own_file(directory, self.name)
        return config if file is None else {**(config or {}), self.calibrated_by: file}

    def install(self, pipe: Any, config: Config, patch: Patch) -> CacheSession:
        """Install on `pipe`; `config` is complete.

        Raises:
            ValueError, PatchConflictError: a pipeline that the method cannot serve, by name.
        """
        session = self._session(pipe, config)
        session.install(patch)
        return session

    def _on_library(self, config: Config) -> bool:
        return self.mask is not None and config["engine"] == "library"

    def _session(self, pipe: Any, config: Config) -> CacheSession:
        if self.mask is not None and self._on_library(config):
            return LibrarySession(self.name, pipe, config, partial(self.mask, config))
        if self.output is not None:
            return OutputSession(self.name, pipe, self.output(config))
        choose = self.parts
        assert choose is not None  # one of both is given

        def parts(row: ModelRow, blocks: int) -> Parts:
            self.relations(config, blocks, None)
            return choose(config, row, blocks)

        return BlockSession(self.name, pipe, parts)
