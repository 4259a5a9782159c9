"""How an `Omni` runs on several ranks: `Omni(parallel={"ulysses": 2, "cfg": 2})`."""

from __future__ import annotations

import contextlib
import random
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from omni_runtime.parallel.degrees import Degrees, check_launch
from omni_runtime.parallel.pair import Pair
from omni_runtime.parallel.transformers import check_class, enable
from omni_runtime.parallel.world import World, place, world

if TYPE_CHECKING:
    from omni_runtime.parallel.guidance import Guidance


class Parallel:
    """The ranks that run one `Omni`, seen from one of them.

    Args:
        degrees: the degrees of parallelism.

    Attributes:
        rank: this rank.

    Raises:
        ValueError: not as many ranks were started.
    """

    def __init__(self, degrees: Degrees) -> None:
        self.degrees = degrees
        self._place = check_launch(degrees, place())
        self.rank = self._place.rank
        self._world: World | None = None
        self._guidance: Guidance | None = None
        self._move: Callable[[Any], None] | None = None
        self._seeds = random.Random()

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Parallel | None:
        """The ranks for the argument `parallel` of `Omni`; None if a single rank is enough.

        Raises:
            TypeError, ValueError: it is wrong.
        """
        if given is None:
            return None
        degrees, found = Degrees.of(given), place()
        alone = degrees.ranks == 1 and (found is None or found.count == 1)
        return None if alone else cls(degrees)

    def check_class(self, config: Mapping[str, Any] | None) -> None:
        """Check a transformer's config.json before its weights are loaded. Raises ValueError."""
        check_class(self.degrees, config)

    def device(self, device: str | torch.device) -> str | torch.device:
        """This rank's device: the one given, with the rank's number on this machine if it has no index."""
        kind = str(device)
        if kind == "auto":
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            kind = "cpu" if accelerator is None else accelerator.type
        return device if ":" in kind or kind in ("cpu", "meta") else f"{kind}:{self._place.local}"

    def join(self, device: torch.device) -> None:
        """Come together with the other ranks, if that has not been done."""
        self._world = world(device.type)

    @contextlib.contextmanager
    def section(self, asked: Mapping[str, str]) -> Iterator[None]:
        """Context manager: all ranks work together within. See `World.section`."""
        assert self._world is not None  # join() has set it
        with self._world.section({"parallel": str(self.degrees), **asked}):
            yield

    def install(self, pipe: Any) -> None:
        """Share out the work of a loaded pipeline; within a section."""
        ranks = self._world
        assert ranks is not None
        self._seeds.seed(ranks.gather(secrets.randbits(64))[0])
        self._move = enable(pipe, self.degrees, ranks.mesh(self.degrees), ranks.device)
        if self.degrees.cfg > 1:
            from omni_runtime.parallel.guidance import Guidance  # not every torch has what it imports

            self._guidance = Guidance(self._pair())
        if self.rank > 0:
            pipe.set_progress_bar_config(disable=True)
        ranks.used_by(self)

    def renewed(self) -> None:
        """The ranks' connections were made anew: use them."""
        assert self._world is not None
        if self._move is not None:
            self._move(self._world.mesh(self.degrees))
        if self._guidance is not None:
            self._guidance.pair = self._pair()

    def close(self) -> None:
        """Let go of the pipeline."""
        self._guidance = self._move = None

    def _pair(self) -> Pair:
        assert self._world is not None
        return Pair(self._world.mesh(self.degrees)["cfg"].get_group())

    def seed(self) -> int:
        """A random seed, the same on all ranks."""
        return self._seeds.randrange(2**32)

    @contextlib.contextmanager
    def during(self, pipe: Any, session: Any) -> Iterator[None]:
        """Context manager for a call of the pipeline, within a section.

        Raises:
            ValueError: the tokens cannot be shared out evenly.
        """
        shared = contextlib.nullcontext() if self._guidance is None else self._guidance.during(pipe, session)
        try:
            with shared:
                yield
        except AssertionError as error:
            if "divisible by mesh size" not in str(error):
                raise
            degrees = self.degrees
            both = degrees.ulysses > 1 and degrees.ring > 1
            raise ValueError(
                f"parallel: the number of image or text tokens is no multiple of {degrees.ulysses * degrees.ring} "
                f"(ulysses · ring): give uneven=True, too{', and only one of ulysses and ring' if both else ''}"
            ) from error
