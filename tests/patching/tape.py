"""A stand-in for CUDA graphs: what a call read and returned stays where it lay, and a replay uses only that."""

import torch
from torch.utils import _pytree as pytree

from omni_kernels.patching.graphs import Recorded


class Tape:
    """Stands for CUDA graphs on the CPU: fixed inputs, fixed outputs, and 1000 bytes each."""

    def __init__(self):
        self.attempts = self.records = self.replays = 0
        self.failure = None

    def record(self, call, device):
        assert device.type == "cpu"
        self.attempts += 1
        if self.failure is not None:
            raise self.failure
        self.records += 1
        returned = pytree.tree_map_only(torch.Tensor, torch.clone, call())

        def replay():
            self.replays += 1
            for fixed, new in zip(pytree.tree_leaves(returned), pytree.tree_leaves(call()), strict=True):
                fixed.data.copy_(new)  # a graph writes where no version counter sees it

        for fixed in pytree.tree_leaves(returned):
            fixed.fill_(float("nan"))  # a graph that was only recorded has computed nothing
        return Recorded(replay, returned, 1000)

    def busy(self):
        return None
