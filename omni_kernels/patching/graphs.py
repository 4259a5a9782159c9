"""CUDA graphs of transformer blocks: their launches are recorded once per shape, and replayed as one.

Where images are small or steps few, a GPU waits for the host, which launches up to 90 kernels a block. Blocks that
follow each other are recorded together (`omni_kernels.patching.stretches`), all of a transformer's where nothing works
between them: its whole stack is then one launch. The first forward of a shape runs as ever and is traced; the second is
recorded. What decides which blocks run (caches), or adds to their states (ControlNets), stays outside and parts the
stretches: a cache that looks at what enters block 1 leaves block 0 a graph of its own, which computed and skipped
forwards replay, and the others one that computed forwards do. Where a stretch that was replayed turns out to have gone
too far, because the call of a block does not come or comes with something else, it ends there from then on; that one
time, what was computed for nothing is dropped.

A graph reads and writes fixed memory. The states that blocks return lie in it, from where the next graph reads them
without a copy; what else a stretch's first block is given (timestep, rotary tables, masks) is copied into fixed memory
that all share. Its stretches are recorded anew when a block's weights, modules or attention have been exchanged, and a
block runs as ever, with the reason in the report, where a graph would not do the same: under hooks, adapters whose
scale is a number in Python, autocast, with gradients, on other devices, and after a recording has failed. What chooses
kernels and leaves no trace on the block (`torch.nn.attention.sdpa_kernel`) is recorded as it is.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn.modules import module as _all_modules
from torch.utils import _pytree as pytree

from omni_kernels.patching import ahead
from omni_kernels.patching.recordable import Parts, unfit
from omni_kernels.patching.stretches import Block, Passing, Stretch, Trace, by_name, plain, watches_of

#: Shapes of which a block's recordings are kept.
MOST_SHAPES = 8
#: Calls before a recording, in which what is compiled or allocated once is.
WARMUP = 2


#: So often a block may be found changed, without a replay in between, before it is recorded no more.
MOST_CHANGES = 4
#: What runs a stretch: it tells each block's place and what it returns.
Run = Callable[[Callable[[int, Any], None]], None]


class Recorder(Protocol):
    """What records and replays on one kind of device."""

    def record(self, run: Run, device: torch.device) -> tuple[Callable[[], Any], list[Any]]:
        """(what replays it, what each block returned, in memory of its own that each replay writes again)."""

    def busy(self) -> str | None:
        """Why nothing can be recorded or replayed now; None where it can."""

    def memory(self) -> int:
        """Bytes that recordings hold, apart from what blocks returned."""


class CudaGraphs:
    """Recordings as CUDA graphs (HIP graphs on ROCm), all of a device in one pool of memory.

    Graphs of one pool may lie on each other's scratch memory, which is safe in any order only because nothing in it
    outlives a replay: what blocks return is copied out of it, as part of the recording.
    """

    def __init__(self) -> None:
        self._pools: dict[torch.device, _Pool] = {}

    def record(self, run: Run, device: torch.device) -> tuple[Callable[[], Any], list[Any]]:
        """See `Recorder.record`."""
        with torch.cuda.device(device):
            pool = self._pools.get(device)
            if pool is None or not pool.graphs:
                pool = self._pools[device] = _Pool(torch.cuda.graph_pool_handle(), torch.cuda.Stream())
            here, aside = torch.cuda.current_stream(), pool.stream
            likes: dict[int, Any] = {}
            try:
                aside.wait_stream(here)
                with torch.cuda.stream(aside):
                    for _ in range(WARMUP):
                        run(lambda place, output: likes.update({place: _tensors(_like, output)}))
                here.wait_stream(aside)
                torch.cuda.synchronize()
                returned = [
                    _tensors(functools.partial(torch.empty_like, device=device), likes[n]) for n in range(len(likes))
                ]
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool.handle, stream=aside, capture_error_mode="thread_local"):
                    before = torch.cuda.memory_reserved()
                    run(lambda place, output: write(returned[place], output))
                    pool.bytes += torch.cuda.memory_reserved() - before
            finally:
                torch.cuda.set_stream(here)  # a capture that fails may leave its own

        def replay() -> None:
            with torch.cuda.device(device):
                graph.replay()

        pool.graphs.add(replay)
        return replay, returned

    def busy(self) -> str | None:
        """See `Recorder.busy`."""
        return "somebody else is recording" if torch.cuda.is_current_stream_capturing() else None

    def memory(self) -> int:
        """See `Recorder.memory`."""
        return sum(pool.bytes for pool in self._pools.values() if pool.graphs)


@dataclass
class _Pool:
    """Graphs: what replays those that are alive; with the last of them the memory goes."""

    handle: Any
    stream: Any
    bytes: int = 0
    graphs: weakref.WeakSet[Callable[[], Any]] = field(default_factory=weakref.WeakSet)


def write(fixed: Any, output: Any) -> None:
    """Copy what a block returned into memory of the same structure."""
    for to, made in zip(pytree.tree_leaves(fixed), pytree.tree_leaves(output), strict=True):
        if isinstance(to, torch.Tensor):
            to.copy_(made)


def _tensors(function: Callable[[torch.Tensor], torch.Tensor], output: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, function, output)


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta")


@dataclass
class _Recording:
    """Inputs: (fixed memory, whether it is what all blocks are given at that place)."""

    replay: Callable[[], Any]
    inputs: list[tuple[torch.Tensor, bool]]
    outputs: list[Any]

    @property
    def memory(self) -> int:
        """Bytes of the outputs."""
        tensors = [leaf for leaf in pytree.tree_leaves(self.outputs) if isinstance(leaf, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(eq=False)
class _Known:
    """A stretch of one shape, from the block on that keeps it.

    Attributes:
        apart: whether all that it is given is copied, because it was given other states than those that it was recorded
            to read where another graph returns them.
    """

    stretch: Stretch
    recording: _Recording | None = None
    apart: bool = False

    def end_before(self, place: int) -> None:
        """Leave the calls from this one on to other stretches."""
        del self.stretch.calls[place:]
        self.recording = None


class Graphs:
    """The recordings of a pipeline's blocks.

    Args:
        recorder: of the device.
        device_type: whose tensors are recorded; blocks on others run as ever.

    Attributes:
        reasons: why a block ran as ever the last time that it did, by name.
    """

    def __init__(self, recorder: Recorder | None = None, device_type: str = "cuda") -> None:
        self._recorder = CudaGraphs() if recorder is None else recorder
        self._device_type = device_type
        self._failed: str | None = None
        self._blocks: list[GraphedBlock] = []
        self._given: dict[Any, tuple[Callable[[], Any], Callable[[], Any], int | None]] = {}
        self._returned: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        self._trace: Trace | None = None
        self._passing: tuple[_Known, Passing] | None = None
        self._closed: list[list[str]] = []
        self.reasons: dict[str, str] = {}

    def __str__(self) -> str:
        recorded = self.recorded
        lines = [f"{len(recorded)} blocks recorded, {len(self.stretches)} graphs, {self.memory / 1e6:.1f} MB"]
        lines += [f"{count} blocks ran as ever: {reason}" for reason, count in Counter(self.reasons.values()).items()]
        traced = {call.block.name for known in self._known() for call in known.stretch.calls}
        waiting = len(traced - {*recorded, *self.reasons})
        return "\n".join(
            [*lines, f"{waiting} blocks will be recorded when they are called so again"] if waiting else lines
        )

    @property
    def stretches(self) -> list[list[str]]:
        """The blocks of each graph, by name, in order; once they are closed, what they were."""
        return self._closed or [
            [call.block.name for call in known.stretch.calls] for known in self._known() if known.recording
        ]

    @property
    def recorded(self) -> dict[str, int]:
        """In how many graphs each block is, by name."""
        return dict(Counter(name for names in self.stretches for name in names))

    @property
    def memory(self) -> int:
        """Bytes that the recordings hold."""
        given = [fixed for held, _, _ in self._given.values() if (fixed := held()) is not None]
        own = sum(known.recording.memory for known in self._known() if known.recording)
        return self._recorder.memory() + own + sum(t.numel() * t.element_size() for t in given)

    def _known(self) -> Iterable[_Known]:
        return (known for block in self._blocks for known in block.known.values())

    def call_of(self, name: str, block: torch.nn.Module, call: Callable[..., Any]) -> GraphedBlock:
        """What is to be called in the place of `call`, which runs the block."""
        self._closed = []
        graphed = GraphedBlock(self, name, block, call)
        self._blocks.append(graphed)
        return graphed

    def refusal(self, tensors: Sequence[torch.Tensor]) -> str | None:
        """Why a call cannot be recorded or replayed now."""
        if torch.is_grad_enabled():
            return "gradients are enabled"
        devices = {t.device for t in tensors}
        if any(device.type != self._device_type for device in devices):
            return f"it is not on {self._device_type}"
        if len(devices) != 1:
            return f"it is on {len(devices)} devices"
        if torch.is_autocast_enabled(self._device_type):
            return "autocast is on"
        if _all_modules._global_forward_hooks or _all_modules._global_forward_pre_hooks:
            return "all modules are hooked"
        return self._failed or self._recorder.busy()

    def run(self, block: GraphedBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the block returns; of a recording, in memory that its next replay writes again."""
        if self._passing is not None:
            begun, passing = self._passing
            if passing.next(block, args, kwargs):
                if passing.over:
                    self._passing = None
                return passing.output
            self._passing = None
            begun.end_before(passing.at)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        reason = self.refusal([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]) or block.unfit()
        if reason is None and not all(isinstance(leaf, torch.Tensor) or plain(leaf) for leaf in leaves):
            reason = "an argument is neither a tensor nor a plain value"
        trace, self._trace = self._trace, None
        if reason is None:
            if trace is not None and trace.follow(block, args, kwargs):
                return self._traced(trace, block, args, kwargs)
            key = structure, torch.is_inference_mode_enabled(), *map(_meta, leaves)
            known = self._fit(block, key)
            if known is None:
                while len(block.known) >= MOST_SHAPES:
                    _drop(block, next(iter(block.known)))
                trace = Trace(block, args, kwargs)
                block.known[key] = _Known(trace.stretch)
                return self._traced(trace, block, args, kwargs)
            if self._replay(known, leaves, structure) and known.recording is not None:
                outputs = known.recording.outputs
                if len(outputs) > 1:
                    self._passing = known, Passing(known.stretch, outputs, args, kwargs)
                return outputs[0] if isinstance(outputs[0], torch.Tensor) else _tensors(lambda t: t, outputs[0])
            reason = self._failed
        self.reasons[block.name] = str(reason)
        return block.call(*args, **kwargs)

    def forget(self, block: Block | None = None) -> None:
        """Drop all that was recorded, or what a block is in."""
        if block is None:
            self._trace = self._passing = None
        for one in self._blocks:
            for key, known in list(one.known.items()):
                if block is None or any(call.block is block for call in known.stretch.calls):
                    _drop(one, key)

    def close(self) -> None:
        """Drop all, the blocks too; only the report is left."""
        self._closed = self.stretches
        self.forget()
        self._blocks.clear()
        self._given.clear()

    def _traced(self, trace: Trace, block: GraphedBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the block returns, which runs as ever, as the last one of a trace."""
        self.reasons.pop(block.name, None)
        given = watches_of(args, kwargs)
        try:
            output = block.call(*args, **kwargs)
        except BaseException:
            begun = trace.stretch.calls[0].block.known  # half a forward would part the stretch there
            for key in [key for key, known in begun.items() if known.stretch is trace.stretch]:
                _drop(trace.stretch.calls[0].block, key)
            raise
        if torch.is_inference_mode_enabled():  # nobody counts what is written
            return output
        if not all(given[name].knows(value) for name, value in by_name(args, kwargs).items()):
            block.refused = "it writes to what it is given"
            self.forget(block)
        elif trace.returned(output):
            self._trace = trace
        return output

    def _fit(self, block: GraphedBlock, key: Any) -> _Known | None:
        """The stretch from the block on that is known for a shape, if all of its blocks are as they were."""
        known = block.known.get(key)
        for call in [] if known is None else known.stretch.calls[1:]:
            call.block.unfit()  # which has it forgotten
        if key not in block.known:
            return None
        known = block.known[key] = block.known.pop(key)  # the one that was used last
        return known

    def _replay(self, known: _Known, leaves: Sequence[Any], structure: Any) -> bool:
        """Run a stretch with these arguments, recorded now if it was not; False where that failed."""
        tensors = [(place, leaf) for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        recording = known.recording
        if recording is not None and not all(
            given or tensor is fixed for (_, tensor), (fixed, given) in zip(tensors, recording.inputs, strict=True)
        ):
            # What another graph returns is not ours to write.
            known.apart, known.recording = True, None
        if known.recording is None:
            try:
                known.recording = self._record(known, leaves, structure)
            except Exception as error:
                told = str(error).partition("\n")[0]
                # What fails once does for others, and each attempt costs; a stream may be left in disorder.
                self._failed = f"recording failed: {type(error).__name__}: {told}"
                return False
        for (place, tensor), (_, given) in zip(tensors, known.recording.inputs, strict=True):
            if given:
                self._give(place, tensor)
        known.recording.replay()
        for call in known.stretch.calls:
            call.block.changes = 0
            self.reasons.pop(call.block.name, None)
        return True

    def _record(self, known: _Known, leaves: Sequence[Any], structure: Any) -> _Recording:
        fixed, inputs = list(leaves), []
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                given = known.apart or self._returned.get(id(leaf)) is not leaf
                fixed[place] = self._give(place, leaf) if given else leaf
                inputs.append((fixed[place], given))
        args, kwargs = pytree.tree_unflatten(fixed, structure)
        alike = {call.block.module for call in known.stretch.calls if call.block.uncompiled}

        def run(keep: Callable[[int, Any], None]) -> None:
            with ahead.together(alike):
                known.stretch.run(args, kwargs, keep)

        replay, outputs = self._recorder.record(run, inputs[0][0].device)
        for leaf in pytree.tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor):
                self._returned[id(leaf)] = leaf
        return _Recording(replay, inputs, outputs)

    def _give(self, place: int, tensor: torch.Tensor) -> torch.Tensor:
        """The fixed memory of the argument at this place, for such tensors, which now holds this one."""
        key = place, torch.is_inference_mode_enabled(), _meta(tensor)
        held, source, version = self._given.get(key, (_nothing, _nothing, None))
        fixed = held()
        if fixed is not None and source() is tensor and version is not None and version == self._version(tensor):
            return fixed
        if fixed is None:
            fixed = torch.empty_like(tensor)
            self._given = {key: kept for key, kept in self._given.items() if kept[0]() is not None}
        fixed.copy_(tensor)
        # Recordings hold the fixed memory: it goes with the last that reads it.
        self._given[key] = weakref.ref(fixed), weakref.ref(tensor), self._version(tensor)
        return fixed

    def _version(self, tensor: torch.Tensor) -> int | None:
        """How often it has been written to in place; None where nobody counts that: of what a replay writes, too."""
        return None if tensor.is_inference() or self._returned.get(id(tensor)) is tensor else tensor._version


class GraphedBlock:
    """One block's call.

    Attributes:
        call: what runs the block.
        module: the block.
        uncompiled: whether `call` is the block's own.
        known: the stretches that begin with it, by shape, the one that was used last at the end.
        refused: why it cannot be recorded, as a call of it has shown.
        changes: how often it was found changed since it was last replayed.
    """

    def __init__(self, graphs: Graphs, name: str, block: torch.nn.Module, call: Callable[..., Any]) -> None:
        self.name, self.call = name, call
        self.module = block
        self.uncompiled = call == block._call_impl
        self.known: dict[Any, _Known] = {}
        self.refused: str | None = None
        self.changes = 0
        self._graphs = graphs
        self._parts: Parts | str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output."""
        return self._graphs.run(self, args, kwargs)

    def unfit(self) -> str | None:
        """Why the block cannot be recorded. Where it is no longer what it was, its recordings are dropped."""
        if self.refused is None and not (isinstance(self._parts, Parts) and self._parts.unchanged()):
            then, self._parts = self._parts, unfit(self.module) or Parts(self.module)
            if then is not None and then != self._parts:
                self._graphs.forget(self)
                self.changes += 1
                if self.changes == MOST_CHANGES:
                    self.refused = "it keeps changing"
        return self._parts if isinstance(self._parts, str) else self.refused


def _drop(block: Block, key: Any) -> None:
    """Let go of a stretch, and of its recording now, whatever it hangs on."""
    block.known.pop(key).recording = None


def _meta(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), leaf


def _nothing() -> None:
    return None
