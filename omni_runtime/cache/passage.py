"""The residual site: what the blocks [first, last) add to the hidden states is computed or forecast.

A `Passage` holds the state of one CFG branch of one request. A forward of the transformer calls it in this order:

    begin      the forward starts
    slots      the block list hands out the blocks, or slots in their place
    enter      the input of block `first` is known: the gate decides
    leave      if computed: block `last − 1` has returned, and the residual is recorded
    forecast   if skipped: the forecast residual is added to the input of block `first`
    finish     the forward is over
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from omni_kernels import ops
from omni_kernels.patching.ahead import NEXT, Apart
from omni_runtime.cache.blocks import BlockCall, Slot, States
from omni_runtime.cache.contract import Kept
from omni_runtime.cache.forecasters import Forecaster
from omni_runtime.cache.gates import Gate, Plan, ScheduleGate, Verdict, by_image
from omni_runtime.cache.history import History, history_of
from omni_runtime.cache.lifecycle import Branch, Request
from omni_runtime.cache.models import Arguments, ModelRow
from omni_runtime.cache.offloading import fetched, released
from omni_runtime.cache.ranks import Ranks, Shard
from omni_runtime.cache.sharing import Rows
from omni_runtime.cache.signals import Signal
from omni_runtime.cache.stretches import Later, Shape, Stretch, clipped, versions_of


@dataclass(frozen=True)
class Parts:
    """A method's four choices for the blocks of one model.

    Attributes:
        first, last: the site. At a skipped step, what blocks [first, last) add to the hidden states is forecast.
        signal: what is watched to tell whether a step resembles an earlier one.
        gate: request → a fresh gate for one branch of it; raises ValueError if the request is not supported.
        forecaster: computes the missing residual.
        fitted_for: the runs that the method's numbers were fitted to, in the form of `calibration.describe`. A request
            that differs gets a warning. None if nothing was fitted.
        note: a note on the choices, for the report.
        drift_tolerance: requests replay the schedule of the first request of their kind until it has drifted farther
            than this (`omni_runtime.cache.replay`). None: each request decides for itself.
    """

    first: int
    last: int
    signal: Signal
    gate: Callable[[Request], Gate]
    forecaster: Forecaster
    fitted_for: Mapping[str, Any] | None = None
    note: str | None = None
    drift_tolerance: float | None = None


class Blocks(Protocol):
    """What a passage uses of `omni_runtime.cache.stack.Stack`."""

    parts: Parts
    row: ModelRow
    blocks: int
    calls: list[BlockCall]
    ranks: Ranks | None
    rows: Rows | None
    stretches: list[Stretch]

    def gate(self, request: Request, branch: Branch) -> Gate:
        """Return a fresh gate for a branch."""


class Passage:
    """The cached state of one CFG branch of one request, and its forwards over the blocks.

    Args:
        stack: the transformer's blocks, and the method's choices.
        request: the request.
        branch: the branch; the verdicts are recorded in it.

    Attributes:
        ran: the number of blocks that ran in the current forward.
        stepwise: whether the model does anything between its blocks in the current forward (ControlNet). If not, the
            output of the block before `first` is the input of `first`. Then the gate decides right after that block,
            and the skipped blocks are left out of the loop at once.
        first, last: the site; if the model joins its streams right before it, `joins` is set, and it is empty.
        later, later_from: the sites behind places where the model joins streams, and the first block of those.
        position: the position of the current step, for the forecasters.
        entered: the hidden states that entered block 0, until the gate has decided; None where block 0 is `first`.
    """

    __slots__ = (
        "_base",
        "_branch",
        "_by_step",
        "_calls",
        "_computing",
        "_count_noise",
        "_every_step",
        "_images",
        "_noise_tokens",
        "_rows",
        "_shard",
        "_signal",
        "_strict",
        "_using",
        "_versions",
        "encoder",
        "entered",
        "first",
        "gate",
        "hidden",
        "joins",
        "last",
        "later",
        "later_from",
        "position",
        "ran",
        "remembered",
        "stack",
        "stepwise",
    )

    def __init__(self, stack: Blocks, request: Request, branch: Branch) -> None:
        parts = stack.parts
        self.stack = stack
        self._calls = stack.calls
        self._versions: Any = None
        site, *later = clipped(stack.stretches, parts.first, parts.last)
        # If the model joins its streams right before the site, the gate decides before that; the site is a later one.
        self.joins = any(one.last == parts.first for one in stack.stretches)
        if self.joins:
            site, later = Stretch(parts.first, parts.first, False), [site, *later]
        self.first, self.last = site.first, site.last
        self._branch = branch
        self._shard = None if stack.ranks is None else Shard(stack.ranks)
        self._rows = stack.rows
        self._signal = parts.signal.fresh(self._shard)
        self._every_step = parts.signal.every_step
        self._strict = not stack.row.depths  # nobody has checked which of the streams is the noise
        self._count_noise = stack.row.noise_tokens if parts.signal.noise_only else None
        self._by_step = parts.forecaster.axis == "step"
        self.gate = stack.gate(request, branch)
        self.remembered: torch.Tensor | None = None
        add = None if stack.ranks is None else stack.ranks.add
        self.hidden: History = Shape() if self.joins else history_of(parts.forecaster, add=add)
        # If nothing uses the text stream that leaves the site, it is not forecast.
        self.encoder = history_of(parts.forecaster, add=add) if site.encoder else None
        if self.joins:
            self.encoder = Shape()
        self.later = [Later(one, parts.forecaster, add) for one in later]
        self.later_from = later[0].first if later else stack.blocks
        self.ran = 0
        self.stepwise = True
        self.entered: torch.Tensor | None = None
        self._computing: bool | None = None
        self._base: States | None = None

    def tensors(self) -> list[torch.Tensor]:
        """All tensors held between forwards."""
        held = self.gate.tensors() if self.remembered is None else [self.remembered, *self.gate.tensors()]
        held = held + self.hidden.tensors() + (self.encoder.tensors() if self.encoder else [])
        return held + [tensor for later in self.later for tensor in later.tensors()]

    def retire(self) -> None:
        """Drop all recorded state but the gate's: the branch goes on with another transformer."""
        self._clear()

    def begin(self, request: Request, arguments: Arguments, stepwise: bool) -> None:
        """Begin a forward.

        Args:
            request: the request.
            arguments: the arguments of the transformer call, by name.
            stepwise: see the attribute.
        """
        self.ran = 0
        self.stepwise = stepwise
        self._computing = self._versions = self._base = None
        for later in self.later:
            later.begin()
        self._noise_tokens = None if self._count_noise is None else self._count_noise(arguments)
        self._images = request.images
        self.position = float(request.step) if self._by_step else request.sigma
        self._signal.situate(request.sigma, arguments)
        if self._shard is not None and self._shard.reshaped(arguments):
            self.forget()  # matches no input, on any rank
        if self.stack.rows is not self._rows:  # another number of samples, although this rank may have as many
            self._rows = self.stack.rows
            self.forget()

    def record_all(self, made: Mapping[int, Kept]) -> bool:
        """Record a whole forward after it has run: the one in which the blocks were found. `begin` was called.

        Args:
            made: index of a block → its call, if it was kept.

        Returns:
            Whether all that is needed was kept. If not, nothing is recorded.
        """
        sites = [(later.first, later.last) for later in self.later]
        sites += [] if self.joins else [(self.first, self.last)]
        needed = {0} | {index for first, last in sites for index in (first, last - 1)}
        needed |= {self.first - 1} if self.joins else set()
        if not all(index in made and made[index].marks.same() for index in needed):
            return False

        def entry(index: int) -> States:
            return self._calls[index].inputs(made[index].args, made[index].kwargs)

        def exit_(index: int) -> States:
            return self._calls[index].streams(made[index].output)

        for begin, end in sites:
            entered, left = entry(begin)[0].dtype, exit_(end - 1)[0].dtype
            if entered != left:
                raise ValueError(f"the blocks from {begin} on take {entered} and return {left}: they cannot be skipped")

        decides = self.first - 1 if self.joins else self.first
        block, base = made[decides], exit_(decides) if self.joins else entry(decides)
        if self.first:
            self.entered = entry(0)[0]
        self.enter(block.block, base, self._calls[decides].arguments(block.args, block.kwargs))
        if self._signal.reads_weights:
            released(block.block)
        self.entered = None
        self.leave(*(base if self.joins else exit_(self.last - 1)), base)
        for later in self.later:
            later.record(exit_(later.last - 1), entry(later.first), self.position)
        return True

    @contextlib.contextmanager
    def skipping(self) -> Iterator[None]:
        """While open, the site is skipped, whatever the gate would say; no decision is recorded."""
        gate, decisions, remembered = self.gate, len(self._branch.decisions), self.remembered
        self.gate = ScheduleGate([0] * (self._branch.called + 1))
        try:
            yield
            self.finish()
        finally:
            self.gate, self.remembered = gate, remembered
            del self._branch.decisions[decisions:]

    @property
    def reads_arguments(self) -> bool:
        """Whether the decision needs the block that is under way, and its arguments."""
        return self._signal.reads_weights

    @property
    def skipped(self) -> bool:
        """Whether the site was skipped in the current forward."""
        return self._computing is False

    def forget(self) -> None:
        """Make the next forward a computed one."""
        self.hidden.shape = None

    def finish(self) -> None:
        """End the forward.

        A model may skip blocks itself. If it has skipped the first or the last block of the site, the recorded state
        no longer fits and is dropped.
        """
        if self._computing is False and self._base is not None:
            self._base = None
            raise RuntimeError(f"the model did not call block {self.last - 1}, the last of those that were skipped")
        missed = self._computing and not all(later.recorded for later in self.later)
        if self._computing is None or self._base is not None or missed:
            self._base = self.entered = None
            self._clear()
        if self._computing is None:
            self._branch.decide(Verdict(True, "the model passed the site over"))

    def enter(self, block: torch.nn.Module, base: Any, arguments: Arguments) -> bool:
        """Whether the blocks [first, last) run in this forward.

        Args:
            block: the block whose call is under way: block `first`, or the one before it.
            base: the input of block `first`, a pair (hidden, encoder).
            arguments: the arguments of that call, by name.
        """
        # Called once a forward, when block `first` is about to run. If the gate skips, a forecast replaces what the
        # blocks would add. If not, the input is kept, so that `leave` can record what they have added.
        hidden, encoder = base
        gate, history = self.gate, self.encoder
        self._using = ops.trusted(hidden)
        # Three cases: the shapes have changed; the gate decides without measuring; the gate has to measure.
        verdict = None
        if hidden.shape == self.hidden.shape and (history is None or encoder is None or encoder.shape == history.shape):
            plan, reason = gate.plan(self._branch.called)
            if plan is not Plan.MEASURE:
                verdict = Verdict(plan is not Plan.SKIP, reason, None, gate.accumulated)
                if plan is Plan.ANEW:
                    self._forget(hidden)
        else:
            verdict = Verdict(True, "shape changed" if len(self.hidden) else "nothing cached yet")
            self._forget(hidden)
        if verdict is None or verdict.computed or self._every_step:
            entered = hidden if self.entered is None else self.entered
            verdict = self._observe(block, arguments, hidden, entered, verdict)
        gate.settle(verdict.computed)
        self._branch.decide(verdict)
        self._computing = verdict.computed
        return verdict.computed

    def _observe(
        self,
        block: torch.nn.Module,
        arguments: Arguments,
        hidden: torch.Tensor,
        entered: torch.Tensor,
        verdict: Verdict | None,
    ) -> Verdict:
        """Observe the signal, and remember it if needed.

        Returns:
            `verdict` if it is given, otherwise the gate's verdict on the measured distances.
        """
        if self._noise_tokens is not None:
            noise = self._noise_tokens if self._shard is None else self._shard.part(self._noise_tokens)
            hidden, entered = hidden[:, :noise], entered[:, :noise]
        if hidden.dim() == 2:  # one sample, without an axis for it
            hidden, entered = hidden[None], entered[None]
        then = self.remembered if verdict is None else None
        fetching = self._signal.reads_weights and fetched(block)
        now, sums = self._signal.observe(block, arguments, hidden, entered, then, self._using)
        if verdict is None:
            verdict = Verdict(True, "nothing to compare with") if then is None else self._judged(sums, now)
        if verdict.computed or self._every_step:
            self.remembered = now
        if fetching and not verdict.computed:
            released(block)
        return verdict

    def _judged(self, sums: torch.Tensor, now: torch.Tensor) -> Verdict:
        """The gate's verdict on the sums, which have one row per sample."""
        gate = self.gate
        elements = now.numel() if self._shard is None else self._shard.add(sums)
        if self._rows is not None:
            sums, elements = self._rows.whole(sums), elements * self._rows.count
        if not gate.reads:
            return gate.keep(sums, elements, self._images)
        if self._strict and not sums[:, 0].any():
            return Verdict(True, "the watched stream has not changed at all", 0.0)
        pairs = sums.tolist()  # the only transfer to the host for this decision
        if len(pairs) != self._images:
            pairs = by_image(pairs, self._images)
        return gate.judge(pairs, elements // len(pairs))

    def check(self, base: Any, versions: Any) -> None:
        """Raise RuntimeError if the model has changed these states in place since: they are what is forecast from."""
        if versions is not None and versions != versions_of(base):
            self.hidden.clear()
            raise RuntimeError(
                f"the model changed the hidden states in place between its blocks, after block {self.first} was "
                "called: a cache of blocks cannot follow that. velocity_cache works without the blocks"
            )

    def leave(self, hidden: torch.Tensor, encoder: torch.Tensor | None, base: Any) -> None:
        """Record the result of blocks [first, last), which have run on `base`, a pair (hidden, encoder)."""
        self.hidden.record(hidden, base[0], self.position)
        if self.encoder is not None and encoder is not None:
            self.encoder.record(encoder, base[1], self.position)

    def forecast(self, base: Any) -> States:
        """The forecast of what blocks [first, last) would return for `base`, as (hidden, encoder)."""
        hidden, encoder = base
        if self.encoder is not None and encoder is not None:
            encoder = self.encoder.forecast(encoder, self.position, self._using)
        return self.hidden.forecast(hidden, self.position, self._using), encoder

    def _forget(self, hidden: torch.Tensor) -> None:
        """Drop all recorded state: the shape has changed (batch, resolution, prompt length), or the gate says so."""
        if self._shard is None:
            tokens = hidden.shape[1] if self._noise_tokens is None else self._noise_tokens
            B, *shape = hidden.shape[0], tokens, *hidden.shape[2:]
        else:
            B, *shape = self._shard.measure(hidden, self._noise_tokens)
        self.gate.enters((B if self._rows is None else B * self._rows.count, *shape))
        self._clear()

    def _clear(self) -> None:
        self.remembered = None
        self.hidden.clear()
        if self.encoder is not None:
            self.encoder.clear()
        for later in self.later:
            later.clear()

    def slots(self, blocks: Collection[torch.nn.Module], start: int) -> Iterator[Callable[..., Any]]:
        """Yield what is called in place of each of `blocks`, the first of which is block `start` of the model."""
        # Blocks before the site run. At index `decided` the gate decides: in the call of block `first`; or, if that is
        # not the first of `blocks` and the model does nothing between blocks, after the block before it has run. Then
        # the blocks of the site run or are skipped. Skipped blocks are left out of the loop at once; or, if the model
        # adds to the states between them (ControlNet), each one is replaced by a slot that returns its input.
        if start >= self.later_from:
            yield from self._later_slots(blocks, start)
            return
        first, last, end = self.first, self.last, start + len(blocks)
        after = self.joins or not (self.stepwise or not start < first < end)
        decided = first - 1 if after else first
        numbered = enumerate(blocks, start)
        for index, block in numbered:
            if index == decided and self.joins:
                yield Slot(self._run_before_join, block)
            elif index == decided:
                yield Slot(self._enter_first if index == first else self._run_before, block)
                if self._computing is False and not self.stepwise:
                    if last >= end:
                        return
                    skipped = last - index - 1
                    next(itertools.islice(numbered, skipped, skipped), None)
            elif index == 0:
                yield Slot(self._run_zeroth, block)
            elif index == first - 1:
                yield Slot(self._run_apart, block)
            elif not first <= index < last or (self._computing is not False and index != last - 1):
                self.ran += 1
                yield block
            elif index == last - 1:
                if self._computing is not False:
                    yield Slot(self._run_last, block)
                elif self.stepwise:
                    yield Slot(self._arrive, block)
            elif self.stepwise:
                yield Slot(functools.partial(self._pass_over, index), block)

    def _later_slots(self, blocks: Collection[torch.nn.Module], start: int) -> Iterator[Callable[..., Any]]:
        """As `slots`, for a list behind a place where the model joins streams. Whether its blocks run is decided."""
        for index, block in enumerate(blocks, start):
            later = next((one for one in self.later if one.first <= index < one.last), None)
            if later is not None and self._computing is False:
                yield Slot(functools.partial(self._skip_later, later, index), block)
            elif later is not None and index in (later.first, later.last - 1):
                yield Slot(functools.partial(self._run_later, later, index), block)
            else:
                self.ran += 1
                yield block

    def _skip_later(self, later: Later, index: int, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = self._calls[index]
        states = call.inputs(args, kwargs)
        if index == later.first:
            later.base, later.versions = states, versions_of(states)
        if index < later.last - 1:
            return call.output(states)
        base, later.base = later.base, None
        if base is None:
            raise RuntimeError(f"the model passed over block {later.first} in a skipped step, but not block {index}")
        self.check(base, later.versions)
        return call.output(later.forecast(base, self.position))

    def _run_later(self, later: Later, index: int, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = self._calls[index]
        if index == later.first:
            later.base = call.inputs(args, kwargs)
            later.versions = versions_of(later.base)
        output = self._run(block, args, kwargs)
        if index == later.last - 1 and later.base is not None:
            base, later.base = later.base, None
            self.check(base, later.versions)
            later.record(call.streams(output), base, self.position)
        return output

    def _run(self, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.ran += 1
        return block(*args, **kwargs)

    def _run_zeroth(self, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.entered, _ = self._calls[0].inputs(args, kwargs)
        return self._run_apart(block, *args, **kwargs) if self.first == 1 else self._run(block, args, kwargs)

    def _run_apart(self, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run block first − 1 alone.

        It must not compute the next block's norm ahead (`omni_kernels.patching.ahead`): whether that block runs is not
        decided yet.
        """
        self.ran += 1
        if NEXT not in block.__dict__:  # it computes nothing ahead anyway
            return block(*args, **kwargs)
        with Apart(block):
            return block(*args, **kwargs)

    def _run_before(self, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run block first − 1, then decide: its output is the input of block `first`."""
        call, index = self._calls[self.first - 1], self.first - 1
        if index == 0:
            self.entered, _ = call.inputs(args, kwargs)
        output = self._run_apart(block, *args, **kwargs)
        base = call.streams(output)
        computing = self.enter(block, base, call.arguments(args, kwargs) if args else kwargs)
        self.entered = None
        if not computing:
            return call.output(self.forecast(base))
        self._base = base
        return output

    def _run_before_join(self, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run block first − 1, then decide. The model makes the input of block `first` from its output."""
        call = self._calls[self.first - 1]
        if self.first == 1:
            self.entered, _ = call.inputs(args, kwargs)
        output = self._run_apart(block, *args, **kwargs)
        states = call.streams(output)
        if self.enter(block, states, call.arguments(args, kwargs) if args else kwargs):
            self.leave(*states, states)
        self.entered = None
        return output

    def _enter_first(self, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        call, alone = self._calls[self.first], self.last - self.first == 1
        base = call.inputs(args, kwargs)
        computing = self.enter(block, base, call.arguments(args, kwargs) if args else kwargs)
        self.entered = None
        if not computing and (alone or not self.stepwise):
            return call.output(self.forecast(base))
        self._base = base
        self._versions = versions_of(base)
        if not computing:
            return call.output(base)
        return self._run_last(block, *args, **kwargs) if alone else self._run(block, args, kwargs)

    def _run_last(self, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = self._run(block, args, kwargs)
        base, self._base = self._base, None
        if base is not None:
            self.check(base, self._versions)
            self.leave(*self._calls[self.last - 1].streams(output), base)
        return output

    def _pass_over(self, index: int, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Skip a block: return its input states unchanged."""
        call = self._calls[index]
        return call.output(call.inputs(args, kwargs))

    def _arrive(self, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Skip the last block of the site: return the forecast, made from the input of block `first`."""
        base, self._base = self._base, None
        self.check(base, self._versions)
        return self._calls[self.last - 1].output(self.forecast(base))
