"""The way of an op through torch's dispatcher, which a GPU takes, on the CPU: to time what the host has to do there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch._library.simple_registry import singleton

from omni_kernels import registration
from omni_kernels.registration import NAMESPACE


@contextlib.contextmanager
def through_dispatcher() -> Iterator[None]:
    """While open, ops take the way that they take on a GPU."""
    with mock.patch.object(registration, "_straight", False):
        yield


@contextlib.contextmanager
def nothing_computed() -> Iterator[None]:
    """As `through_dispatcher`, where an op allocates its outputs, and leaves them as they are."""
    with through_dispatcher(), torch.library._scoped_library(NAMESPACE, "IMPL") as library:
        packets = (getattr(getattr(torch.ops, NAMESPACE), name) for name in dir(getattr(torch.ops, NAMESPACE)))
        for packet in (one for one in packets if isinstance(one, torch._ops.OpOverloadPacket)):
            for overload in packet.overloads():
                name = packet._qualified_op_name + ("" if overload == "default" else f".{overload}")
                fake = singleton.find(name).fake_impl.kernel
                if fake is not None:
                    library.impl(name.partition("::")[2], fake, "CPU", allow_override=True)
        yield
