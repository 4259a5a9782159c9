"""A stand-in for CUDA graphs: what a call read and returned stays where it lay, and a replay uses only that."""

import contextlib
import weakref

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from omni_kernels.patching.graphs import write


class _Log(TorchDispatchMode):
    """Notes the operators that run, and what they return."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        self.operators.append((function, args, kwargs or {}, output))
        return output


def rewrite(fixed, output):
    """As `write`, unseen by version counters."""
    with torch.no_grad():
        write(pytree.tree_map_only(torch.Tensor, lambda t: t.data, fixed), output)


class Tape:
    """Stands for CUDA graphs on the CPU: replays run the same operators on the same memory, and no Python.

    Args:
        operators: False runs the Python again instead: where blocks are compiled, or to see what they call.
    """

    def __init__(self, operators=True):
        self.operators = operators
        self.alive = weakref.WeakSet()
        self.attempts = self.records = self.replays = 0
        self.failure = None

    def record(self, run, device):
        assert device.type == "cpu"
        self.attempts += 1
        if self.failure is not None:
            raise self.failure
        self.records += 1
        kept = {}
        run(lambda place, output: kept.update({place: pytree.tree_map_only(torch.Tensor, torch.empty_like, output)}))
        returned = [kept[place] for place in range(len(kept))]
        with _Log() if self.operators else contextlib.nullcontext() as log:
            run(lambda place, output: write(returned[place], output))

        def replay():
            self.replays += 1
            if log is None:
                run(lambda place, output: rewrite(returned[place], output))
                return
            for function, args, kwargs, output in log.operators:
                again = function(*args, **kwargs)
                for there, now in zip(pytree.tree_leaves(output), pytree.tree_leaves(again), strict=True):
                    if isinstance(there, torch.Tensor) and there.data_ptr() != now.data_ptr():
                        there.data.copy_(now)  # a graph writes where no version counter sees it

        for fixed in pytree.tree_leaves(returned):
            if isinstance(fixed, torch.Tensor):
                fixed.data.fill_(float("nan"))  # a graph that was only recorded has computed nothing
        self.alive.add(replay)
        return replay, returned

    def busy(self):
        return None

    def memory(self):
        return 1000 * len(self.alive)
