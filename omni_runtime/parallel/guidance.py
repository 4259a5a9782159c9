"""CFG parallelism: the two ranks of a pair compute one branch of classifier-free guidance each, in any pipeline.

All ranks run the whole pipeline; only the transformer's calls are shared out. Pipelines make guidance in one of two
ways, and the calls themselves show which.

- **One call for both branches.** Its first argument has the same latents twice. Each rank computes half of the
  samples, and the halves are joined (`omni_runtime.parallel.halves`).
- **A call for each branch.** Rank 0 computes the first call of a round, rank 1 the second. What a pipeline gets from
  the first call before the second is there is pending (`omni_runtime.parallel.pending`). A `Round` is a run of calls
  between which the pipeline uses none of their results. After two calls, the ranks exchange them. A result that is used
  earlier is exchanged at once. That is right, but in vain if another call follows in the same step: such a pipeline is
  refused. Where a step has one call (without guidance, or after its end), rank 0 computes it.

A call may change an object that it is given, such as a cache of keys. The rank that computes the call then has the
changed object. If calls of both ranks are given the same one, the pipeline is refused. Calls that change their other
arguments, and those whose results are not tensors, are computed by each rank.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
import types
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from omni_kernels.patching import Patch
from omni_runtime.cache.contract import tensors_of
from omni_runtime.cache.lifecycle import outside
from omni_runtime.cache.output import with_tensors
from omni_runtime.cache.session import NAMES, CacheSession
from omni_runtime.cache.sharing import SHARING, Compute
from omni_runtime.cache.stack import EXACT, ROUNDED, difference
from omni_runtime.parallel import halves
from omni_runtime.parallel.pair import Pair
from omni_runtime.parallel.pending import Batch, Pending

#: So many kinds of calls are remembered.
KINDS = 1024
#: The types of values that a call does not change, besides tensors.
VALUES = (
    *(type(None), bool, int, float, str, enum.Enum, np.generic, np.ndarray),
    *(torch.dtype, torch.device, torch.Size, torch.nn.Module, types.FunctionType, types.MethodType),
)
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Round:
    """Calls between which the pipeline uses none of their results.

    Args:
        pair: the ranks.
        steps: the number of steps that the scheduler has taken.
        level: what the calls were given as noise level.

    Attributes:
        calls: the number of calls.
        over: whether a result was used.
        early: what used a result before the second call; None if nothing did.
    """

    def __init__(self, pair: Pair, steps: int, level: list[torch.Tensor]) -> None:
        self.calls = 0
        self.over = False
        self.early: str | None = None
        self.steps = steps
        self.level = level
        self._pair = pair
        self._waiting: list[tuple[int, list[torch.Tensor]]] = []
        self._batch = Batch(self)

    @property
    def missing(self) -> bool:
        """See `omni_runtime.parallel.pending.Use`."""
        return bool(self._waiting)

    def add(self, result: Any, owner: int) -> Any:
        """Add a call's result, which is empty on all ranks but the owner's. Returns it as pending."""
        self.calls += 1
        self._waiting.append((owner, tensors_of(result)))
        pending = self._batch.wrap(result, empty=owner != self._pair.rank)
        if len(self._waiting) == self._pair.count:
            self._exchange()
        return pending

    def used(self, what: str) -> None:
        """See `omni_runtime.parallel.pending.Use`."""
        if self._waiting:
            self.early = what
            self._exchange()
        self.over = True

    def _exchange(self) -> None:
        waiting, self._waiting = self._waiting, []
        for owner, tensors in waiting:
            for tensor in tensors:
                self._pair.send(tensor, owner)
        self._batch.filled()


class Guidance:
    """Shares out the transformer calls of one pipeline in a pair of ranks.

    See `omni_runtime.cache.sharing.Sharing`.

    Args:
        pair: the ranks.
    """

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        #: Kind of a call → its result without values; None if each rank must compute such calls.
        self._forms: dict[Hashable, Any] = {}
        #: Kind of a call → whether it is for both branches.
        self._both: dict[Hashable, bool] = {}
        #: How arguments are cut → how results are joined.
        self._seams: dict[Hashable, Any] = {}
        #: Object that calls are given → the object itself, and the rank that computes these calls.
        self._owners: dict[int, tuple[Any, int]] = {}
        self._names: dict[torch.nn.Module, tuple[str, ...]] = {}
        self._inner: dict[torch.nn.Module, Callable[..., Any]] = {}
        self._round = Round(pair, 0, [])
        self._steps = self._shared = 0
        self._pipeline = ""

    @contextlib.contextmanager
    def during(self, pipe: Any, session: Any) -> Iterator[None]:
        """Context manager: the transformer calls of `pipe` are shared out, which is called within.

        Args:
            session: the cache on the pipeline; None without one.

        Raises:
            ValueError: the cache does not work with it.
        """
        if getattr(session, "alone", None) is not None:
            raise ValueError(f"{session.name} with this configuration does not work with parallel cfg")
        patch = Patch()
        self._pipeline = type(pipe).__name__
        self._round, self._steps, self._shared = Round(self.pair, 0, []), 0, 0
        self._owners.clear()
        for transformer in _transformers(pipe):
            self._install(transformer, patch)
        if getattr(pipe, "scheduler", None) is not None:
            self._count_steps(pipe.scheduler, patch)
        token = SHARING.set(self)
        try:
            yield
            if isinstance(session, CacheSession):
                for rank, decided in enumerate(self.pair.all(session.decided())):
                    if rank != self.pair.rank:
                        session.decided_elsewhere(decided)
            if not self._shared:
                warnings.warn(
                    f"parallel cfg: {self._pipeline} has made no two transformer calls in a step, and no call for two "
                    "branches, so there was nothing to share: is guidance on?",
                    stacklevel=4,
                )
        finally:
            SHARING.reset(token)
            patch.release()
            self._inner.clear()
            self._owners.clear()

    def _count_steps(self, scheduler: Any, patch: Patch) -> None:
        step = scheduler.step

        @functools.wraps(step)  # pipelines inspect its signature
        def counted(*args: Any, **kwargs: Any) -> Any:
            if SHARING.get() is self:
                self._use([args, kwargs], "a step of the scheduler")
                self._steps += 1
            return step(*args, **kwargs)

        patch.set_method(scheduler, "step", counted)

    def _use(self, value: Any, what: str) -> None:
        for tensor in tensors_of(value):
            if isinstance(tensor, Pending):
                tensor._omni_batch.use(what)

    def _install(self, transformer: torch.nn.Module, patch: Patch) -> None:
        inner = transformer._compiled_call_impl or transformer._call_impl
        self._inner[transformer] = inner
        self._names[transformer] = tuple(inspect.signature(transformer.forward).parameters)

        def compute(args: Args, kwargs: Kwargs, rows: Any) -> Any:
            return inner(*args, **kwargs)

        def shared(*args: Any, **kwargs: Any) -> Any:
            if SHARING.get() is not self:
                return inner(*args, **kwargs)
            return self.share(transformer, compute, args, kwargs, _nothing)

        patch.set_method(transformer, "_compiled_call_impl", shared)

    def inner(self, transformer: torch.nn.Module) -> Callable[..., Any]:
        """See `omni_runtime.cache.sharing.Sharing`."""
        return self._inner[transformer]

    def agreed(self, sums: torch.Tensor) -> torch.Tensor:
        """See `omni_runtime.cache.sharing.Sharing`."""
        sums = sums.contiguous()
        self.pair.send(sums, 0)
        return sums

    def share(
        self,
        transformer: torch.nn.Module,
        compute: Compute,
        args: Args,
        kwargs: Kwargs,
        passed_over: Callable[[], None],
    ) -> Any:
        """See `omni_runtime.cache.sharing.Sharing`."""
        self._use([args, kwargs], "a transformer call")
        objects = _objects([args, kwargs])
        if any(isinstance(one, torch.Generator) for one in objects):
            return compute(args, kwargs, None)
        if max(len(self._forms), len(self._both)) > KINDS:
            self._forms.clear()
            self._both.clear()
        names = self._names[transformer]
        key = (id(transformer), tuple(zip(names, map(_form, args), strict=False)), _form(kwargs))
        if key not in self._both:
            self._both[key] = halves.twice_the_same(args, kwargs)
        if self._both[key] and not objects:
            return self._by_halves(transformer, compute, args, kwargs)
        return self._by_calls(transformer, compute, args, kwargs, passed_over, key, objects)

    # A call for each branch

    def _by_calls(
        self,
        transformer: torch.nn.Module,
        compute: Compute,
        args: Args,
        kwargs: Kwargs,
        passed_over: Callable[[], None],
        key: Hashable,
        objects: Sequence[Any],
    ) -> Any:
        if key in self._forms and self._forms[key] is None:
            return compute(args, kwargs, None)
        level = self._level(transformer, args, kwargs)
        if self._round.over:
            if self._round.early is not None and self._round.steps == self._steps and _same(self._round.level, level):
                raise ValueError(
                    f"parallel cfg: {self._pipeline} uses the result of a transformer call before it makes the next "
                    f"one of the step, so they cannot be made at the same time: leave out cfg. It is used by "
                    f"{self._round.early}"
                )
            self._round = Round(self.pair, self._steps, level)
        elif not self._round.calls:
            self._round = Round(self.pair, self._steps, level)
        owner = self._round.calls % self.pair.count
        for one in objects:
            if self._owners.setdefault(id(one), (one, owner))[1] != owner:
                raise ValueError(
                    f"parallel cfg: transformer calls for both branches are given the same {type(one).__name__} by "
                    f"{self._pipeline}, and may change it: leave out cfg"
                )
        self._shared += self._round.calls == 1
        mine = owner == self.pair.rank
        known = self._forms.get(key)
        result = self._computed(compute, args, kwargs, known) if mine else None
        if known is None:
            sent = None
            if mine and not isinstance(result, _Changed) and not _objects(result):
                sent = with_tensors(result, lambda one: one.to("meta"))
            known = self._forms[key] = self.pair.given(sent, owner)
            if known is None:  # the call, or its result, cannot be shared
                if not mine:
                    return compute(args, kwargs, None)
                return result.output if isinstance(result, _Changed) else result
        if not mine:
            passed_over()
            device = next(one.device for one in tensors_of([args, kwargs]))
            result = with_tensors(known, functools.partial(_missing, device=device))
        return self._round.add(result, owner)

    def _computed(self, compute: Compute, args: Args, kwargs: Kwargs, known: Any) -> Any:
        """Compute a call on this rank."""
        marks = _marks([args, kwargs]) if known is None else None
        result = with_tensors(compute(args, kwargs, None), _settled)
        if any(one.requires_grad for one in tensors_of(result)):
            raise ValueError("parallel cfg: a gradient is asked for, which is not passed on between ranks")
        if known is None:
            if marks != _marks([args, kwargs]):
                return _Changed(result)
        elif [(one.shape, one.dtype) for one in tensors_of(result)] != [
            (one.shape, one.dtype) for one in tensors_of(known)
        ]:
            raise ValueError(
                f"parallel cfg: a transformer call of {self._pipeline} has returned something else than an earlier "
                "call with arguments of the same form: leave out cfg"
            )
        return result

    def _level(self, transformer: torch.nn.Module, args: Args, kwargs: Kwargs) -> list[torch.Tensor]:
        """The noise level in the arguments of a call."""
        given = {**dict(zip(self._names[transformer], args, strict=False)), **kwargs}
        return tensors_of([value for name, value in given.items() if "timestep" in name or "sigma" in name])

    # One call for both branches

    def _by_halves(self, transformer: torch.nn.Module, compute: Compute, args: Args, kwargs: Kwargs) -> Any:
        guesses = [halves.Call(args, kwargs, halves.samples(args, kwargs), deep) for deep in (True, False)]
        plan = (id(transformer), *(guess.kind for guess in guesses))
        if plan not in self._seams:
            self._seams[plan] = self._checked(transformer, guesses)
        which, seams = self._seams[plan]
        self._shared += 1
        own_args, own_kwargs = guesses[which].part(self.pair.rank, self.pair.count)
        return halves.joined(compute(own_args, own_kwargs, self.pair), seams, self.pair)

    def _checked(self, transformer: torch.nn.Module, guesses: Sequence[halves.Call]) -> tuple[int, Any]:
        """Compare a call in halves with the whole call.

        Args:
            guesses: how it may be cut.

        Returns:
            Which of them is right, and how the halves are joined.

        Raises:
            ValueError: none is right.
        """
        inner, pair, reasons = self._inner[transformer], self.pair, []
        with outside(), torch.random.fork_rng(devices=[]):
            args, kwargs = guesses[0].part(0, 1)
            whole = inner(*args, **kwargs)
            exact = EXACT if all(one.dtype == torch.float32 for one in tensors_of(whole)) else ROUNDED
            for which, guess in enumerate(guesses):
                seams = part = None
                error = ""
                args, kwargs = guess.part(pair.rank, pair.count)
                try:
                    part = inner(*args, **kwargs)
                    seams = halves.seams(whole, part, pair.count)
                except torch.OutOfMemoryError:
                    raise
                except Exception as raised:
                    error = f"{type(raised).__name__}: {raised}"
                errors = list(filter(None, pair.all(error)))
                if not errors:
                    off = difference(halves.joined(part, seams, pair), whole)
                    if off <= exact:
                        return which, seams
                    errors = [f"the result would be off by {off:.2g}"]
                reasons.append(errors[0].partition("\n")[0])
        raise ValueError(
            f"parallel cfg: the samples of a transformer call of {self._pipeline} cannot be computed apart from each "
            f"other: leave out cfg ({reasons[0]})"
        )


class _Changed:
    """The result of a call that has changed its arguments."""

    def __init__(self, output: Any) -> None:
        self.output = output


def _nothing() -> None:
    pass


def _transformers(pipe: Any) -> list[torch.nn.Module]:
    found = [getattr(pipe, name, None) for name in NAMES]
    return list({id(one): one for one in found if isinstance(one, torch.nn.Module)}.values())


def _settled(tensor: torch.Tensor) -> torch.Tensor:
    """A result as an ordinary tensor that can be sent. Collectives return tensors that wait for their values."""
    if isinstance(tensor, AsyncCollectiveTensor):
        tensor = tensor.wait()
    return tensor.contiguous()


def _missing(form: torch.Tensor, device: torch.device) -> torch.Tensor:
    """An empty tensor. What would be computed with it shows: it holds NaN."""
    made = torch.empty(form.shape, dtype=form.dtype, device=device)
    return made.fill_(float("nan")) if form.is_floating_point() else made


def _objects(value: Any) -> list[Any]:
    """What a value has besides tensors, numbers and text, such as a cache of keys. A call may change such objects."""
    if isinstance(value, (*VALUES, torch.Tensor)):
        return []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [one for part in value for one in _objects(part)] if isinstance(value, (list, tuple)) else [value]


def _form(value: Any) -> Hashable:
    """What must be equal in two calls for their results to have the same form."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Mapping):
        return tuple((str(name), _form(one)) for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_form, value))
    return value if value is None or isinstance(value, (bool, str, int)) else type(value).__name__


def _marks(value: Any) -> list[Any]:
    """What changes if a call changes its arguments: the tensors, how often they were changed, and sizes."""
    if isinstance(value, torch.Tensor):
        return [id(value), 0 if value.is_inference() else value._version]
    if isinstance(value, Mapping):
        return [len(value), *map(_marks, value.values())]
    return [len(value), *map(_marks, value)] if isinstance(value, (list, tuple)) else []


def _same(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(
        one.shape == other.shape and torch.equal(one, other) for one, other in zip(some, others, strict=True)
    )
