"""CUDA graphs of transformer blocks: a block's launches are recorded once per shape, and replayed as one.

Where images are small or steps few, a GPU waits for the host, which launches up to 90 kernels a block. A recorded
block is one launch. Graphs are of single blocks: what decides which blocks run, or works between them (caches,
ControlNets), stays outside, so that computed and skipped forwards replay the same graphs.

A graph reads and writes fixed memory. The states that a block returns lie in its graph's own, from where the next
block's graph reads them without a copy; what else a block is given (timestep, rotary tables, masks) is copied into
fixed memory once a forward, as all blocks are given the same. A block is recorded anew when its weights, modules or
attention have been exchanged, and runs as ever, with the reason in the report, where a graph would not do the same:
under hooks, adapters whose scale is a number in Python, autocast, with gradients, on other devices, and after a
recording has failed. What chooses kernels and leaves no trace on the block (`torch.nn.attention.sdpa_kernel`) is
recorded as it is.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from omni_kernels.patching.engine import Forward, describe
from omni_kernels.patching.structure import dispatcher, hooked

#: Shapes of which a block's recordings are kept.
MOST_SHAPES = 8
#: Calls before a recording, in which what is compiled or allocated once is.
WARMUP = 2


class Recorder(Protocol):
    """What records and replays on one kind of device."""

    def record(self, call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], Any], Any]:
        """(what replays the call, what the call returned, in memory that each replay writes again)."""

    def busy(self) -> str | None:
        """Why nothing can be recorded or replayed now; None where it can."""

    def memory(self) -> int:
        """Bytes that recordings hold."""


class CudaGraphs:
    """Recordings as CUDA graphs (HIP graphs on ROCm), all in one pool of memory.

    Graphs of one pool may lie on each other's scratch memory, which is safe in any order only because nothing in it
    outlives a replay: what is returned is copied out of it, as the last thing that is recorded.
    """

    def __init__(self) -> None:
        self._pools: dict[torch.device, Any] = {}
        self._bytes = 0

    def record(self, call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], Any], Any]:
        """See `Recorder.record`."""
        with torch.cuda.device(device):
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            before = torch.cuda.memory_reserved()
            try:
                aside.wait_stream(here)
                with torch.cuda.stream(aside):
                    for _ in range(WARMUP):
                        returned = call()
                here.wait_stream(aside)
                torch.cuda.synchronize()
                returned = pytree.tree_map_only(torch.Tensor, torch.empty_like, returned)
                pool = self._pools.setdefault(device, None) or torch.cuda.graph_pool_handle()
                self._pools[device] = pool
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                    for out, made in zip(pytree.tree_leaves(returned), pytree.tree_leaves(call()), strict=True):
                        if isinstance(out, torch.Tensor):
                            out.copy_(made)
            finally:
                torch.cuda.set_stream(here)  # a capture that fails may leave its own
            self._bytes += max(0, torch.cuda.memory_reserved() - before)

        def replay() -> None:
            with torch.cuda.device(device):
                graph.replay()

        return replay, returned

    def busy(self) -> str | None:
        """See `Recorder.busy`."""
        return "somebody else is recording" if torch.cuda.is_current_stream_capturing() else None

    def memory(self) -> int:
        """See `Recorder.memory`."""
        return self._bytes


@dataclass
class _Recording:
    """Inputs: (fixed memory, whether it is what all blocks are given at that place)."""

    replay: Callable[[], Any]
    inputs: list[tuple[torch.Tensor, bool]]
    output: Any


class Graphs:
    """The recordings of a pipeline's blocks.

    Args:
        recorder: of the device.
        device_type: whose tensors are recorded; blocks on others run as ever.

    Attributes:
        recorded: of how many shapes each block was recorded, by name.
        reasons: why a block ran as ever the last time that it did, by name.
    """

    def __init__(self, recorder: Recorder | None = None, device_type: str = "cuda") -> None:
        self._recorder = CudaGraphs() if recorder is None else recorder
        self._device_type = device_type
        self._failed: str | None = None
        self._given: dict[Any, tuple[Callable[[], Any], Callable[[], Any], int | None]] = {}
        self._returned: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        self.recorded: dict[str, int] = {}
        self.reasons: dict[str, str] = {}

    def __str__(self) -> str:
        shapes, memory = sum(self.recorded.values()), self.memory / 1e6
        lines = [f"{len(self.recorded)} blocks recorded, {shapes} graphs, {memory:.1f} MB"]
        lines += [f"{count} blocks ran as ever: {reason}" for reason, count in Counter(self.reasons.values()).items()]
        return "\n".join(lines)

    @property
    def memory(self) -> int:
        """Bytes that the recordings hold."""
        given = [fixed for held, _, _ in self._given.values() if (fixed := held()) is not None]
        return self._recorder.memory() + sum(t.numel() * t.element_size() for t in given)

    def call_of(self, name: str, block: torch.nn.Module, call: Callable[..., Any]) -> GraphedBlock:
        """What is to be called in the place of `call`, which runs the block."""
        return GraphedBlock(self, name, block, call)

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

    def record(self, call: Callable[..., Any], leaves: Sequence[Any], structure: Any) -> _Recording:
        """A recording of a call with arguments that are flattened."""
        fixed, inputs = list(leaves), []
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                given = self._returned.get(id(leaf)) is not leaf
                fixed[place] = self.give(place, leaf) if given else leaf
                inputs.append((fixed[place], given))
        args, kwargs = pytree.tree_unflatten(fixed, structure)
        try:
            replay, output = self._recorder.record(lambda: call(*args, **kwargs), inputs[0][0].device)
        except Exception as error:
            told = str(error).partition("\n")[0]
            # What fails for one block does for the others, and each attempt costs; a stream may be left in disorder.
            self._failed = f"recording failed: {type(error).__name__}: {told}"
            raise
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._returned[id(leaf)] = leaf
        return _Recording(replay, inputs, output)

    def replay(self, recording: _Recording, leaves: Sequence[Any]) -> Any:
        """What a recorded call returns for these arguments."""
        tensors = [(place, leaf) for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        for (place, tensor), (fixed, given) in zip(tensors, recording.inputs, strict=True):
            if given:
                self.give(place, tensor)
            elif tensor is not fixed:
                fixed.copy_(tensor)
        recording.replay()
        return recording.output

    def give(self, place: int, tensor: torch.Tensor) -> torch.Tensor:
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
    """One block's call, recorded once per shape."""

    def __init__(self, graphs: Graphs, name: str, block: torch.nn.Module, call: Callable[..., Any]) -> None:
        self._graphs, self._name, self._block, self._call = graphs, name, block, call
        self._recordings: dict[Any, _Recording] = {}
        self._parts: _Parts | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output; of a recording, in memory that its next replay writes again."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        found = self._recording(leaves, structure)
        if isinstance(found, _Recording):
            return self._graphs.replay(found, leaves)
        self._graphs.reasons[self._name] = found
        return self._call(*args, **kwargs)

    def _recording(self, leaves: Sequence[Any], structure: Any) -> _Recording | str:
        """The recording for these arguments, or why there is none."""
        reason = self._graphs.refusal([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
        if reason is not None:
            return reason
        if self._parts is None or not self._parts.unchanged():
            self._recordings.clear()
            self._graphs.recorded.pop(self._name, None)
            self._parts = None
            reason = _unfit(self._block)
            if reason is not None:
                return reason
            self._parts = _Parts(self._block)
        key = structure, tuple(_meta(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        try:
            found = self._recordings.get(key)
        except TypeError:
            return "an argument is neither a tensor nor a plain value"
        if found is None:
            try:
                found = self._graphs.record(self._call, leaves, structure)
            except Exception:
                return str(self._graphs.refusal([]))
            while len(self._recordings) >= MOST_SHAPES:  # the one that was used longest ago
                del self._recordings[next(iter(self._recordings))]
        else:
            del self._recordings[key]
        self._recordings[key] = found
        self._graphs.recorded[self._name] = len(self._recordings)
        self._graphs.reasons.pop(self._name, None)
        return found


class _Parts:
    """All of a block that a recording has taken in: its modules, weights, hooks, and how it attends."""

    def __init__(self, block: torch.nn.Module) -> None:
        modules = list(block.modules())
        self._held = [held for m in modules for held in (m._parameters, m._buffers, m._modules)]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._own = vars(block)
        self._modules = modules
        self._attentions = [m for m in modules if getattr(m, "processor", None) is not None]
        self._then = self._now()
        self._places = self._addresses()

    def unchanged(self) -> bool:
        """Whether each of them is still the very same, where it was."""
        now = self._now()
        if len(now) != len(self._then) or any(a is not b for a, b in zip(now, self._then, strict=True)):
            return False
        return self._addresses() == self._places and not any(self._hooks)

    def _now(self) -> list[Any]:
        found: list[Any] = [one for held in self._held for one in held.values()]
        found += [self._own.get("forward"), *(module.training for module in self._modules)]
        for attention in self._attentions:
            processor: Any = attention.processor
            backend, parallel = (getattr(processor, name, None) for name in ("_attention_backend", "_parallel_config"))
            # Where the processor has no backend of its own, diffusers' default counts.
            registry = getattr(dispatcher(processor), "__globals__", {}).get("_AttentionBackendRegistry")
            found += [processor, backend, parallel, getattr(registry, "_active_backend", None)]
        return found

    def _addresses(self) -> list[int]:
        return [one.data_ptr() for one in self._then if isinstance(one, torch.Tensor)]


def _meta(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _nothing() -> None:
    return None


def _unfit(block: torch.nn.Module) -> str | None:
    """Why a recording of the block would not do what the block does."""
    own = vars(block).get("forward")
    if own is not None and not isinstance(own, Forward):
        return f"its forward is {describe(own)}"
    if block._forward_hooks or block._forward_pre_hooks:
        return "it is hooked"
    for name, module in block.named_modules():
        if type(module).__module__.startswith("peft."):
            return f"{name} is an adapter, whose scale is a number in Python: fuse it into the weights"
        processor = getattr(module, "processor", None)
        if isinstance(processor, torch.nn.Module) or hasattr(processor, "scale"):
            return f"{name}.processor is {type(processor).__name__}, whose scale is a number in Python"
        for key, weight in (*module._parameters.items(), *module._buffers.items()):
            if weight is not None and type(weight) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
                return f"{name}.{key} is {type(weight).__name__}, whose memory cannot be watched"
        if name and hooked(module):
            return f"{name} is hooked"
        if name and "forward" in vars(module):  # which may keep what it returns: the graph would lack the work
            return f"{name}'s forward is patched"
    return None
