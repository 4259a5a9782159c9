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
that all share. All is recorded anew when a block's weights, modules or attention have been exchanged, and a block runs
as ever, with the reason in the report, where a graph would not do the same: under hooks, adapters whose scale is a
number in Python, autocast, with gradients, on other devices, and after a recording has failed. What chooses kernels
and leaves no trace on the block (`torch.nn.attention.sdpa_kernel`) is recorded as it is.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils import _pytree as pytree

from omni_kernels.patching import ahead
from omni_kernels.patching.recordable import Parts, unfit
from omni_kernels.patching.stretches import Passing, Stretch, Trace, Watch, states_of, watches

#: Shapes of which a block's recordings are kept.
MOST_SHAPES = 8
#: Calls before a recording, in which what is compiled or allocated once is.
WARMUP = 2


class Recorded(NamedTuple):
    """What replays a call, what the call returned, in memory that each replay writes again, and the bytes it holds."""

    replay: Callable[[], Any]
    returned: Any
    memory: int


class Recorder(Protocol):
    """What records and replays on one kind of device."""

    def record(self, call: Callable[[], Any], device: torch.device) -> Recorded:
        """A recording of the call."""

    def busy(self) -> str | None:
        """Why nothing can be recorded or replayed now; None where it can."""


class CudaGraphs:
    """Recordings as CUDA graphs (HIP graphs on ROCm), each in a pool of memory of its own.

    Graphs of one pool may lie on each other's scratch memory, and so on what another returned.
    """

    def record(self, call: Callable[[], Any], device: torch.device) -> Recorded:
        """See `Recorder.record`."""
        with torch.cuda.device(device):
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            try:
                aside.wait_stream(here)
                with torch.cuda.stream(aside):
                    for _ in range(WARMUP):
                        call()
                here.wait_stream(aside)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                    before = torch.cuda.memory_reserved()
                    returned = call()
                    memory = torch.cuda.memory_reserved() - before
            finally:
                torch.cuda.set_stream(here)  # a capture that fails may leave its own

        def replay() -> None:
            with torch.cuda.device(device):
                graph.replay()

        return Recorded(replay, returned, memory)

    def busy(self) -> str | None:
        """See `Recorder.busy`."""
        return "somebody else is recording" if torch.cuda.is_current_stream_capturing() else None


@dataclass
class _Recording:
    """Inputs: (fixed memory, whether it is what all blocks are given at that place); made: watches of the outputs."""

    replay: Callable[[], Any]
    inputs: list[tuple[torch.Tensor, bool]]
    outputs: list[Any]
    made: list[Sequence[Watch | None]]
    memory: int


@dataclass(eq=False)
class _Known:
    """A stretch of one shape, from the block on that keeps it."""

    stretch: Stretch
    recording: _Recording | None = None

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
        self.modules: list[GraphedBlock] = []
        self._given: dict[Any, tuple[Callable[[], Any], Callable[[], Any], int | None]] = {}
        self._returned: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        self._trace: Trace | None = None
        self._passing: tuple[_Known, Passing] | None = None
        self.reasons: dict[str, str] = {}

    def __str__(self) -> str:
        lines = [f"{len(self.recorded)} blocks recorded, {len(self.stretches)} graphs, {self.memory / 1e6:.1f} MB"]
        lines += [f"{count} blocks ran as ever: {reason}" for reason, count in Counter(self.reasons.values()).items()]
        return "\n".join(lines)

    @property
    def stretches(self) -> list[list[str]]:
        """The blocks of each graph, by name, in order."""
        return [[call.block.name for call in known.stretch.calls] for known in self._known() if known.recording]

    @property
    def recorded(self) -> dict[str, int]:
        """In how many graphs each block is, by name."""
        return dict(Counter(name for names in self.stretches for name in names))

    @property
    def memory(self) -> int:
        """Bytes that the recordings hold."""
        given = [fixed for held, _, _ in self._given.values() if (fixed := held()) is not None]
        own = sum(known.recording.memory for known in self._known() if known.recording)
        return own + sum(t.numel() * t.element_size() for t in given)

    def _known(self) -> Iterable[_Known]:
        return (known for block in self.modules for known in block.known.values())

    def call_of(self, name: str, block: torch.nn.Module, call: Callable[..., Any]) -> GraphedBlock:
        """What is to be called in the place of `call`, which runs the block."""
        graphed = GraphedBlock(self, name, block, call)
        self.modules.append(graphed)
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
        key = (
            structure,
            torch.is_inference_mode_enabled(),
            *(_meta(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves),
        )
        try:
            hash(key)
        except TypeError:
            reason = reason or "an argument is neither a tensor nor a plain value"
        trace, self._trace = self._trace, None
        if reason is None:
            if trace is not None and trace.follow(block, args, kwargs):
                return self._traced(trace, block, args, kwargs)
            known = self._fit(block, key)
            if known is None:
                trace = Trace(block, args, kwargs)
                while len(block.known) >= MOST_SHAPES:
                    del block.known[next(iter(block.known))]
                block.known[key] = _Known(trace.stretch)
                return self._traced(trace, block, args, kwargs)
            recording = self._recording(known, leaves, structure)
            if recording is not None:
                for call in known.stretch.calls:
                    self.reasons.pop(call.block.name, None)
                self._replay(recording, leaves)
                if len(recording.outputs) > 1:
                    self._passing = known, Passing(known.stretch, recording.outputs, recording.made, args, kwargs)
                return recording.outputs[0]
            reason = self._failed
        self.reasons[block.name] = str(reason)
        return block.call(*args, **kwargs)

    def forget(self) -> None:
        """Drop all that was traced and recorded."""
        self._trace = self._passing = None
        for block in self.modules:
            block.forget()

    def _traced(self, trace: Trace, block: GraphedBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the block returns, which runs as ever, as the last one of a trace."""
        try:
            output = block.call(*args, **kwargs)
        except BaseException:
            self.forget()  # half a forward would part the stretch there
            raise
        # Nobody counts what is written in inference mode.
        if trace.returned(output) and not torch.is_inference_mode_enabled():
            self._trace = trace
        return output

    def _fit(self, block: GraphedBlock, key: Any) -> _Known | None:
        """The stretch from the block on that is known for a shape, up to a block that cannot be recorded now."""
        known = block.known.get(key)
        if known is None:
            return None
        for place, call in enumerate(known.stretch.calls[1:], 1):
            if call.block.unfit() is not None:
                known.end_before(place)
                break
        if key in block.known:  # else all was forgotten
            known = block.known[key] = block.known.pop(key)  # the one that was used last
            return known
        return None

    def _recording(self, known: _Known, leaves: Sequence[Any], structure: Any) -> _Recording | None:
        """The recording of a stretch for these arguments; None where it failed."""
        if known.recording is None:
            try:
                known.recording = self._record(known.stretch, leaves, structure)
            except Exception as error:
                told = str(error).partition("\n")[0]
                # What fails once does for others, and each attempt costs; a stream may be left in disorder.
                self._failed = f"recording failed: {type(error).__name__}: {told}"
        return known.recording

    def _record(self, stretch: Stretch, leaves: Sequence[Any], structure: Any) -> _Recording:
        fixed, inputs = list(leaves), []
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                given = self._returned.get(id(leaf)) is not leaf
                fixed[place] = self._give(place, leaf) if given else leaf
                inputs.append((fixed[place], given))
        args, kwargs = pytree.tree_unflatten(fixed, structure)
        alike = {call.block.module for call in stretch.calls if call.block.uncompiled}

        def run() -> list[Any]:
            with ahead.together(alike):
                return stretch.run(args, kwargs)

        replay, outputs, memory = self._recorder.record(run, inputs[0][0].device)
        for leaf in pytree.tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor):
                self._returned[id(leaf)] = leaf
        return _Recording(replay, inputs, outputs, [watches(states_of(output)) for output in outputs], memory)

    def _replay(self, recording: _Recording, leaves: Sequence[Any]) -> None:
        """Run what was recorded with these arguments."""
        tensors = [(place, leaf) for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        for (place, tensor), (fixed, given) in zip(tensors, recording.inputs, strict=True):
            if given:
                self._give(place, tensor)
            elif tensor is not fixed:
                fixed.copy_(tensor)
        recording.replay()

    def _give(self, place: int, tensor: torch.Tensor) -> torch.Tensor:
        """The fixed memory of the argument at this place, for such tensors, which now holds this one."""
        key = place, _meta(tensor)
        held, source, version = self._given.get(key, (_nothing, _nothing, None))
        fixed = held()
        if fixed is not None and source() is tensor and version is not None and version == self._version(tensor):
            return fixed
        if fixed is None:
            fixed = torch.empty_like(tensor)
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
    """

    def __init__(self, graphs: Graphs, name: str, block: torch.nn.Module, call: Callable[..., Any]) -> None:
        self.name, self.call = name, call
        self.known: dict[Any, _Known] = {}
        self.module = block
        self.uncompiled = call == block._call_impl
        self._graphs = graphs
        self._parts: Parts | str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output."""
        return self._graphs.run(self, args, kwargs)

    def forget(self) -> None:
        """Drop what is known of the block."""
        self.known.clear()
        self._parts = None

    def unfit(self) -> str | None:
        """Why the block cannot be recorded. Where it is no longer what it was, all that was recorded is forgotten."""
        parts = self._parts
        if not isinstance(parts, Parts) or not parts.unchanged():
            now = unfit(self.module) or Parts(self.module)
            if parts is not None and parts != now:
                self._graphs.forget()
            self._parts = now
        return self._parts if isinstance(self._parts, str) else None


def _meta(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _nothing() -> None:
    return None
