"""The transformer calls of several requests, made in as few forwards as possible.

Calls of the same form are joined (`omni_runtime.serving.merging`). The first batch of each structure is checked: its
calls are made alone, too, and must give the same. If they do not, calls of that structure are always made alone. Under
a cache of blocks, the same check shows which arguments of the blocks have an entry for each sample
(`omni_runtime.cache.together`).

If a batched forward raises an error, its calls are made alone, so that only the requests at fault get the error.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from omni_kernels.patching import Patch
from omni_runtime.cache.contract import tensors_of
from omni_runtime.cache.lifecycle import CURRENT, Branch, Request
from omni_runtime.cache.stack import Part, Stack, difference
from omni_runtime.cache.together import Arguments, Axes
from omni_runtime.serving.merging import Joined, Merger, cuts, samples, split

Kept = TypeVar("Kept", set[Hashable], dict[Any, Any])

#: A call in a batch may differ from the same call alone by this share of its result, in fp32 and in other dtypes.
EXACT, ROUNDED = 1e-4, 0.05
#: So many structures are remembered.
STRUCTURES = 256
#: Tensors of more bytes are not compared: calls with two of them are made alone.
LARGEST = 1 << 20


@dataclass(eq=False)
class Call:
    """One transformer call that a request waits for.

    Attributes:
        transformer, args, kwargs: the call.
        stack, request, branch: under a cache of blocks, what its forward works on; None otherwise.
        modes: torch's settings of the thread that makes the call (gradients, autocast).
        result, error: what became of it.
        ran: the number of blocks that ran, under a cache of blocks.
        batch: the number of samples in the forward that made it.
    """

    transformer: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stack: Stack | None = None
    request: Request | None = None
    branch: Branch | None = None
    modes: Modes = field(default_factory=lambda: Modes.here())
    result: Any = None
    error: BaseException | None = None
    ran: int = 0
    batch: int = 0


@dataclass(frozen=True)
class Modes:
    """Torch's settings of a thread that a forward depends on."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype], ...]

    @classmethod
    def here(cls) -> Modes:
        """Those of this thread."""
        on = [(kind, torch.get_autocast_dtype(kind)) for kind in _kinds_of_device() if torch.is_autocast_enabled(kind)]
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), tuple(on))

    @contextlib.contextmanager
    def set(self) -> Iterator[None]:
        """Context manager: this thread has these settings."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            yield


@functools.cache
def _kinds_of_device() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


class _Shared:
    """Stands for a sampling while a forward runs that may serve several of them (`Stack.take`)."""

    def __init__(self) -> None:
        self.passage: Any = None
        self.taken: dict[Any, Any] = {}


@dataclass(frozen=True)
class _Known:
    """What the check of a structure has shown.

    Attributes:
        joins: whether its calls are joined.
        cuts: how the result is split.
        axes: which arguments of the blocks have an entry for each sample; None without a cache of blocks.
    """

    joins: bool
    cuts: Any = None
    axes: Axes | None = None


class Forwards:
    """Makes the calls of requests; all in one thread.

    Args:
        max_batch: the most samples in one forward.

    Attributes:
        made: the number of forwards.
        samples: the number of samples in them.
        sizes: number of samples → how many forwards had so many.
        checks: the number of further forwards, for checks.
    """

    def __init__(self, max_batch: int) -> None:
        self._max_batch = max_batch
        self._mergers: dict[torch.nn.Module, Merger] = {}
        self._known: dict[Any, _Known] = {}
        #: Forms of calls that are always made alone, or whose texts are not padded.
        self._apart: set[Hashable] = set()
        self._unpadded: set[Hashable] = set()
        self._widths: dict[Any, torch.Size] = {}
        self._same = _Same()
        self.made = self.samples = self.checks = 0
        self.sizes: Counter[int] = Counter()

    def group(self, calls: Sequence[Call]) -> list[Call]:
        """The first call, and those that may be made together with it."""
        first, *others = calls
        group, count = [first], samples(first.args, first.kwargs)
        form = self._form(first, count)
        if form is None:
            return group
        for call in others:
            further = samples(call.args, call.kwargs)
            if count + further <= self._max_batch and self._form(call, further) == form:
                group.append(call)
                count += further
        return group

    def run(self, calls: Sequence[Call]) -> None:
        """Make the calls of one group. Each gets its result or its error."""
        if len(calls) > 1:
            joined, key = self._join(calls)
            known = self._checked(calls, key)
            if calls[0].result is not None or calls[0].error is not None:
                calls = [call for call in calls if call.result is None and call.error is None]
            elif known.joins:
                with contextlib.suppress(Exception):
                    self._together(calls, known, joined)
                    return
        for call in calls:
            self._alone(call)

    def _merger(self, transformer: torch.nn.Module) -> Merger:
        if transformer not in self._mergers:
            self._mergers[transformer] = Merger(tuple(inspect.signature(transformer.forward).parameters))
        return self._mergers[transformer]

    def _form(self, call: Call, count: int) -> Hashable:
        """What calls that are made together have in common; None if the call is made alone."""
        stack = call.stack
        if not count or (stack is not None and (stack.ranks or stack.stepwise(call.args, call.kwargs) is None)):
            return None
        form, exact = self._forms(call, count)
        merger = self._merger(call.transformer)
        if form in self._unpadded:
            form = exact
        elif stack is not None and not merger.unpadded(merger.by_name(call.args, call.kwargs)):
            form = form if stack.keeps_text_apart else exact
        elif stack is not None:
            # The model pads texts itself, to a multiple of some length. What a cache keeps must have the same shape in
            # every forward, so calls are joined only if their states have the same shape alone.
            width = self._widths.get(exact)
            form = None if width is None else (form, width)
        return None if form in self._apart else form

    def _forms(self, call: Call, count: int) -> tuple[Hashable, Hashable]:
        """The form of a call whose texts may be padded, and that of one whose texts are as they are."""
        merger = self._merger(call.transformer)
        given = merger.by_name(call.args, call.kwargs)
        kind = call.transformer, call.stack, call.modes, merger.structure(given, count)
        return (
            (kind, merger.form(given, count, self._same)),
            (kind, merger.form(given, count, self._same, padded=False)),
        )

    def _join(self, calls: Sequence[Call]) -> tuple[Joined, tuple[Any, ...]]:
        """The joined call, and the key under which its check is known."""
        first, merger = calls[0], self._merger(calls[0].transformer)
        givens = [(merger.by_name(call.args, call.kwargs), samples(call.args, call.kwargs)) for call in calls]
        joined = merger.join(givens)
        present = tuple(name for name, value in joined.kwargs.items() if value is not None)  # a mask may have come in
        return joined, (first.transformer, first.stack, first.modes, merger.structure(*givens[0]), present)

    def _checked(self, calls: Sequence[Call], key: tuple[Any, ...]) -> _Known:
        """What is known of the structure of these calls. If nothing is, two of them are made in both ways."""
        if key in self._known:
            return self._known[key]
        merger = self._merger(calls[0].transformer)
        lengths = [merger.lengths(merger.by_name(call.args, call.kwargs)) for call in calls]
        # Two whose texts are of unequal length, if there are any.
        place = next((place for place, length in enumerate(lengths) if length != lengths[0]), 1)
        pair = calls[0], calls[place]
        joined, own = self._join(pair)
        if own != key:
            return _Known(False)
        known = _Known(False)
        with contextlib.suppress(Exception):
            known = self._check(pair, joined)
        first, count = calls[0], samples(calls[0].args, calls[0].kwargs)
        if known.joins:
            _bounded(self._known)[key] = known
        elif lengths[place] != lengths[0]:  # these forms alone: others of the structure may be joined
            _bounded(self._unpadded).add(self._forms(first, count)[0])
        else:
            _bounded(self._apart).add(self._form(first, count))
        return known

    def _check(self, calls: Sequence[Call], joined: Joined) -> _Known:
        """Make the calls together and alone, without a cache, and compare."""
        first = calls[0]
        batch = Arguments()
        output = self._plain(first, (), joined.kwargs, batch)
        alone = []
        for call in calls:
            arguments = Arguments()
            alone.append((self._plain(call, call.args, call.kwargs, arguments), arguments))
        self.checks += 1 + len(calls)
        total, count = sum(joined.counts), joined.counts[0]
        how = cuts(output, alone[0][0], total, count)
        made = split(output, how, joined.counts)
        exact = EXACT if all(one.dtype == torch.float32 for one in tensors_of(alone[0][0])) else ROUNDED
        for one, (expected, _) in zip(made, alone, strict=True):
            if not difference(one, expected) <= exact:
                return _Known(False)
        if first.stack is None:
            for call, (result, _) in zip(calls, alone, strict=True):
                call.result, call.batch = result, samples(call.args, call.kwargs)
            return _Known(True, how)
        # The one whose text is as long as those of the batch, so that only the number of samples differs.
        place = joined.texts.index(max(joined.texts)) if joined.texts else 0
        axes = Axes(first.stack.calls, batch.seen, alone[place][1].seen, total, joined.counts[place])
        return _Known(True, how, axes)

    def _plain(self, call: Call, args: Any, kwargs: Any, arguments: Arguments) -> Any:
        """A forward without a cache, in which the arguments of the blocks are kept if there is a stack."""
        with self._modes(call), self._lists(call.stack) as shared:
            shared.passage = arguments
            return call.transformer(*_fresh(args), **_fresh(kwargs))

    def _count(self, size: int) -> None:
        self.made += 1
        self.samples += size
        self.sizes[size] += 1

    def _alone(self, call: Call) -> None:
        call.batch = samples(call.args, call.kwargs)
        self._count(call.batch)
        try:
            with self._modes(call), self._lists(call.stack) as shared:
                args, kwargs = _fresh(call.args), _fresh(call.kwargs)
                if call.stack is None:
                    call.result = call.transformer(*args, **kwargs)
                    return
                stack: Any = call.stack
                call.result, call.ran = stack.forward(shared, call.request, call.branch, call.transformer, args, kwargs)
            self._note_width(call)
        except BaseException as error:
            call.error = error

    def _note_width(self, call: Call) -> None:
        """Remember the shape of the states that a cache keeps of a call with unpadded texts."""
        merger = self._merger(call.transformer)
        kept = None if call.branch is None else call.branch.kept
        if kept is None or kept.hidden.shape is None or not merger.unpadded(merger.by_name(call.args, call.kwargs)):
            return
        _, exact = self._forms(call, samples(call.args, call.kwargs))
        _bounded(self._widths)[exact] = kept.hidden.shape[1:]

    def _together(self, calls: Sequence[Call], known: _Known, joined: Joined) -> None:
        first, total = calls[0], sum(joined.counts)
        if first.stack is None or known.axes is None:
            with self._modes(first):
                output = first.transformer(**joined.kwargs)
            ran = [0] * len(calls)
        else:
            with self._modes(first), self._lists(first.stack) as shared, _undone_if_it_fails(calls):
                stepwise = any(first.stack.stepwise(call.args, call.kwargs) for call in calls)
                output, ran = first.stack.forward_together(
                    shared, _parts(calls, joined), known.axes, stepwise, first.transformer, joined.kwargs
                )
        made = split(output, known.cuts, joined.counts)
        self._count(total)
        for call, result, blocks in zip(calls, made, ran, strict=True):
            call.result, call.ran, call.batch = result, blocks, total

    @contextlib.contextmanager
    def _lists(self, stack: Stack | None) -> Iterator[Any]:
        """Context manager: the transformer iterates over lists that the stack decides about."""
        shared: Any = _Shared()
        if stack is None:
            yield shared
            return
        seams, former = Patch(), CURRENT.set(shared)
        try:
            stack.take(shared, seams)
            yield shared
        finally:
            seams.release()
            CURRENT.reset(former)

    def _modes(self, call: Call) -> contextlib.AbstractContextManager[None]:
        return call.modes.set()


def _bounded(kept: Kept) -> Kept:
    """The same set or dict, emptied if it is full."""
    if len(kept) >= STRUCTURES:
        kept.clear()
    return kept


def _parts(calls: Sequence[Call], joined: Joined) -> list[Part]:
    parts = []
    for place, call in enumerate(calls):
        assert call.request is not None
        assert call.branch is not None
        text = joined.texts[place] if joined.texts else None
        parts.append(Part(call.request, call.branch, call.args, call.kwargs, joined.rows(place), text))
    return parts


@contextlib.contextmanager
def _undone_if_it_fails(calls: Sequence[Call]) -> Iterator[None]:
    """Context manager: if it raises, no decision of these calls is recorded, and what was cached is dropped."""
    before = []
    for call in calls:
        branch: Any = call.branch
        gate = None if branch.kept is None else copy.copy(branch.kept.gate)
        before.append((branch, branch.kept, gate, len(branch.decisions)))
    try:
        yield
    except BaseException:
        for branch, kept, gate, decisions in before:
            del branch.decisions[decisions:]
            branch.kept = kept
            if kept is not None:
                kept.gate = gate
                kept.retire()
        raise


def _fresh(value: Any) -> Any:
    """The same with lists and dicts of its own, because a forward may change those that it is given."""
    if type(value) in (list, tuple):
        return type(value)(_fresh(one) for one in value)
    return {key: _fresh(one) for key, one in value.items()} if type(value) is dict else value


class _Same:
    """Gives equal tensors the same key. Each tensor is compared once, which may wait for the device."""

    def __init__(self) -> None:
        self._keys: dict[tuple[int, int, bool], tuple[torch.Tensor, int]] = {}
        self._kinds: dict[int, torch.Tensor] = {}
        self._numbers = itertools.count()

    def __call__(self, tensor: torch.Tensor, rows: bool) -> int:
        """The key. With `rows`, one row stands for all of them if they are equal."""
        if tensor.is_inference() or tensor.nbytes > LARGEST:  # its changes are not counted, or it costs too much
            return -id(tensor)
        name = id(tensor), tensor._version, rows
        if name not in self._keys:
            if len(self._keys) >= STRUCTURES:
                self._keys.clear()
                self._kinds.clear()
            own = tensor[:1] if rows and len(tensor) > 1 and bool((tensor == tensor[:1]).all()) else tensor
            self._keys[name] = tensor, self._kind(own)
        return self._keys[name][1]

    def _kind(self, tensor: torch.Tensor) -> int:
        for number, one in self._kinds.items():
            like = (one.shape, one.dtype, one.device) == (tensor.shape, tensor.dtype, tensor.device)
            if like and torch.equal(one, tensor):
                return number
        number = next(self._numbers)
        self._kinds[number] = tensor.clone()
        return number
