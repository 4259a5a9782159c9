"""How an op enters torch's dispatcher, which is the only device registry that the package has.

`define` says in one call what an op is called, which function runs it on which device, and what its outputs look like
without running it (the fake, for `torch.compile`, export and `torch.library.opcheck`). The ops are for inference: no
gradient formula is registered.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

NAMESPACE = "omni_kernels"

# Bound once: each step of each request asks, when none of this is in the processor's caches any more, and every lookup
# on the way is a wait for memory: 2 µs less in all.
_Tensor, _grad_enabled, _dispatch_modes = torch.Tensor, torch.is_grad_enabled, torch._C._len_torch_dispatch_stack

# Registrations live as long as the library object that made them.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class Op:
    """What a benchmark, a validation run or a test has to know of one op.

    All four callables take the same arguments. `reference` is the plain-torch implementation, `launcher` runs the
    Triton kernel (also on CPU tensors under `TRITON_INTERPRET=1`), and `bytes_moved` counts what has to cross the
    memory bus when every input is read once and every output written once; it reads shapes and dtypes only, so that
    tensors on the `meta` device do.
    """

    function: Callable[..., Any]
    reference: Callable[..., Any]
    launcher: Callable[..., Any]
    bytes_moved: Callable[..., int]


def define(schema: str, *, reference: Callable[..., Any], triton: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define `omni_kernels::<schema>`, register its implementations and return the overload to call.

    `reference` runs on the CPU and on every device without a row of its own; it must be plain torch that stays on its
    inputs' device. `triton` runs on NVIDIA and, through ROCm, AMD, where Triton is installed. What runs on an
    out-of-tree device (`PrivateUse1`: Ascend) `omni_kernels.ascend` says.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    implementations = {
        "CPU": reference,
        "CUDA": triton if find_spec("triton") else reference,
        "PrivateUse1": _on_npu(name, reference, triton),
        "CompositeExplicitAutograd": reference,
    }
    for key, implementation in implementations.items():
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    base, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, NAMESPACE), base), overload or "default")


def _on_npu(name: str, reference: Callable[..., Any], triton: Callable[..., Any]) -> Callable[..., Any]:
    """What `omni_kernels.ascend` has for an op, asked for when the op is first called there."""

    @functools.cache
    def chosen() -> Callable[..., Any]:
        found: Callable[..., Any] = importlib.import_module("omni_kernels.ascend").implementation(
            name, reference, triton
        )
        return found

    return lambda *args, **kwargs: chosen()(*args, **kwargs)


def eager_on_cpu(t: torch.Tensor) -> bool:
    """Whether an op on `t` may call its plain-torch implementation straight away.

    The dispatcher would come to the same function, through a Python callback that costs more than the few operators of
    a small input.
    Whoever watches or transforms operators (compilation, dispatch modes, tensor subclasses, autograd) sees the op.
    """
    return not (is_dynamo_compiling() or not t.is_cpu or type(t) is not _Tensor or _grad_enabled() or _dispatch_modes())


def nbytes(tensors: Sequence[torch.Tensor | None]) -> int:
    """Bytes of all elements of `tensors`, of which some may be None."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
