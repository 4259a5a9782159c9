"""A simulated `npu` device in pure Python on the CPU: tensors on `npu:0`, and a log of the operators that ran there.

    simulated_npu.install()                  # once per process; cannot be undone
    with simulated_npu.log() as calls: ...   # the operators that ran, and whether the host read from the device
    with simulated_npu.fused(): ...          # torch_npu's fused operators exist, with their schemas

A tensor on the device wraps one on the CPU, and every operator on it is intercepted here. Operators of packages run the
kernel that they registered for `PrivateUse1`, others run the CPU's. As on a real device, mixing its tensors with
tensors of the host (except for numbers) or with generators of the host is an error. The simulation shows where
operators run and what the host reads. It shows nothing about speed or the rounding of other kernels. Generators,
autocast and more than one device are missing.
"""

from __future__ import annotations

import contextlib
import json
import time
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

SCHEMAS = Path(__file__).parent / "npu" / "torch_npu_schemas.json"

#: Operators whose result the host has to wait for, besides copies to the host.
HOST_READS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
}
#: Operators that may mix tensors of the host and of the device.
MIXED = {
    "aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::index", "aten::index_put_", "aten::_index_put_impl_",
}  # fmt: skip
#: Operators that torch would run as an empty tensor and an operator that resizes it.
FACTORIES = ("arange", "arange.start", "arange.start_step", "fft_fftfreq", "fft_rfftfreq", "linspace", "randperm")
PRIVATE = torch._C.DispatchKey.PrivateUse1


@dataclass(frozen=True)
class Call:
    """One operator that ran: its name, how many bytes went to the host, and whether the host waited for it."""

    name: str
    to_host: int = 0
    waits: bool = False


class Log(list[Call]):
    """The operators that ran, in order."""

    @property
    def names(self) -> list[str]:
        return [call.name for call in self]

    @property
    def reads(self) -> list[Call]:
        """The operators whose result the host read or waited for."""
        return [call for call in self if call.to_host or call.waits]


_logs: list[Log] = []


@contextlib.contextmanager
def log() -> Iterator[Log]:
    """Log the operators that run on the device while open."""
    calls = Log()
    _logs.append(calls)
    try:
        yield calls
    finally:
        _logs[:] = [one for one in _logs if one is not calls]


class _Memory:
    """Counts the bytes of the storages of tensors on the device."""

    def __init__(self) -> None:
        self.holders: Counter[int] = Counter()
        self.allocated = self.peak = 0

    def hold(self, tensor: NpuTensor) -> None:
        storage = tensor.raw.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if not self.holders[pointer]:
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
        self.holders[pointer] += 1
        weakref.finalize(tensor, self.release, pointer, size).atexit = False

    def release(self, pointer: int, size: int) -> None:
        self.holders[pointer] -= 1
        if not self.holders[pointer]:
            del self.holders[pointer]
            self.allocated -= size


MEMORY = _Memory()


class NpuTensor(torch.Tensor):
    """A tensor on `npu:0`; `raw` is the CPU tensor with its values."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor, requires_grad: bool = False) -> NpuTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            layout=raw.layout, device=torch.device("npu", 0), requires_grad=requires_grad,
        )  # fmt: skip
        made.raw = raw
        MEMORY.hold(made)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **options: Any) -> str:
        return f"NpuTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def __deepcopy__(self, memo: Any) -> NpuTensor:
        return NpuTensor(self.raw.clone(), self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return NpuTensor, (self.raw.detach(), self.requires_grad)


def _on_npu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "npu"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, NpuTensor)]
    device = kwargs.get("device")
    stays = bool(ours) if device is None else _on_npu(device)
    if name == "aten::copy_":
        stays = isinstance(args[0], NpuTensor)
    _tell(name, args, ours, stays)
    if ours and name not in MIXED and any(type(t) is torch.Tensor and t.dim() and t.is_cpu for t in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found npu:0 and cpu! ({func})")
    if kwargs.get("generator") is not None:
        raise RuntimeError("Expected a 'npu' device type for generator but found 'cpu'")
    if func.namespace != "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "PrivateUse1"):
        return func._op_dk(PRIVATE, *args, **kwargs)
    if name == "aten::pin_memory":
        return args[0]
    mine = {id(t.raw): t for t in ours}
    args, kwargs = pytree.tree_map_only(NpuTensor, lambda t: t.raw, (args, kwargs))
    args, kwargs = pytree.tree_map_only(torch.device, _host, (args, kwargs))
    if isinstance(kwargs.get("device"), str):
        kwargs["device"] = _host(torch.device(kwargs["device"]))
    made = func(*args, **kwargs)
    if any(t.raw.shape != t.shape for t in ours):
        raise NotImplementedError(f"{func} has resized a tensor, which one that wraps another cannot be")

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return mine[id(value)] if id(value) in mine else NpuTensor(value) if stays else value

    return pytree.tree_map(wrapped, made)


def _host(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "npu" else device


def _tell(name: str, args: Any, ours: list[NpuTensor], stays: bool) -> None:
    if not _logs:
        return
    copies = name in ("aten::_to_copy", "aten::copy_", "aten::_copy_from") and bool(ours) and not stays
    source = next((t for t in reversed(ours)), None)
    moved = source.numel() * source.element_size() if source is not None else 0
    waits = bool(ours) and name in HOST_READS
    call = Call(name, moved if copies or name == "aten::_local_scalar_dense" else 0, waits or copies)
    for calls in _logs:
        calls.append(call)


class Event:
    """A time mark. The simulated device is never behind the host."""

    def __init__(self, enable_timing: bool = False, **options: Any) -> None:
        self.timed, self.at = enable_timing, None

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        assert self.at is not None, "the event was not recorded"

    def elapsed_time(self, end: Event) -> float:
        assert self.timed, "the event was made without timing"
        return (end.at - self.at) * 1e3


class Stream:
    """The only stream."""

    def __init__(self, device: Any = None, priority: int = 0, **options: Any) -> None: ...

    @property
    def device(self) -> torch.device:
        return torch.device("npu", 0)

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        event = event or Event()
        event.record(self)
        return event


def _module() -> types.ModuleType:
    """The part of torch.npu that is used."""
    npu: Any = types.ModuleType("torch.npu")
    only = Stream()
    npu.Event, npu.Stream = Event, Stream
    npu.current_stream = npu.default_stream = lambda device=None: only
    npu.stream = contextlib.nullcontext
    npu.device = lambda device: contextlib.nullcontext()
    npu.set_stream = npu.set_device = lambda one: None
    npu.is_available = npu.is_initialized = npu.is_bf16_supported = lambda: True
    npu._is_in_bad_fork = lambda: False
    npu.device_count, npu.current_device = (lambda: 1), (lambda: 0)
    npu.init = npu._lazy_init = npu.empty_cache = lambda: None
    npu.synchronize = lambda device=None: None
    npu.manual_seed = npu.manual_seed_all = lambda seed: None
    npu.get_rng_state = lambda device=None: torch.zeros(0, dtype=torch.uint8)
    npu.set_rng_state = lambda state, device=None: None
    npu.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    npu.get_device_name = lambda device=None: "simulated NPU"
    npu.get_device_properties = lambda device=None: types.SimpleNamespace(cube_core_num=0, total_memory=1 << 36)
    npu.memory_allocated = lambda device=None: MEMORY.allocated
    npu.max_memory_allocated = lambda device=None: MEMORY.peak

    def reset_peak_memory_stats(device: Any = None) -> None:
        MEMORY.peak = MEMORY.allocated

    npu.reset_peak_memory_stats = reset_peak_memory_stats
    return npu


def _factory(name: str) -> Callable[..., Any]:
    base, _, overload = name.partition(".")
    func = getattr(getattr(torch.ops.aten, base), overload or "default")
    return lambda *args, **kwargs: _run(func, args, kwargs)


_libraries: list[torch.library.Library] = []


def install() -> None:
    """Register the device with torch; this cannot be undone."""
    if _libraries:
        return
    backend_registration._setup_privateuseone_for_python_backend("npu", backend_module=_module())
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _libraries.extend((every, aten))
    every.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")

    # torch.tensor and torch.as_tensor call these two without __torch_dispatch__, so the fallback does not see them.
    def copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
        _tell("aten::_copy_from", (source, target), [t for t in (source,) if isinstance(t, NpuTensor)],
              isinstance(target, NpuTensor))  # fmt: skip
        raw = [t.raw if isinstance(t, NpuTensor) else t for t in (source, target)]
        raw[1].copy_(raw[0])
        return target

    def empty_strided(size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None,
                      pin_memory: Any = None) -> Any:  # fmt: skip
        return NpuTensor(torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype()))

    for factory in FACTORIES:
        aten.impl(factory, _factory(factory), "PrivateUse1")
    aten.impl("_copy_from", copy_from, "PrivateUse1")
    aten.impl("empty_strided", empty_strided, "PrivateUse1")


def schemas(version: str) -> dict[str, str]:
    """The schemas of the used operators in this version of torch_npu, by operator."""
    return json.loads(SCHEMAS.read_text(encoding="utf-8"))["versions"][version]["schemas"]


def _npu_rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    assert gamma.dtype == x.dtype, "γ has x's dtype"
    assert 2 <= x.dim() <= 8, "x has 2 to 8 dimensions"
    wide = x.float()
    rstd = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (wide * rstd * gamma).to(x.dtype), rstd


def _npu_rotary_mul(
    x: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str = "half", rotate: torch.Tensor | None = None
) -> torch.Tensor:
    B, S, N, D = x.shape
    assert rotate is None, "not played here"
    assert x.dtype == r1.dtype == r2.dtype, "all have one dtype"
    assert r1.shape == r2.shape, "r1 and r2 have one shape"
    assert D % 2 == 0, "pairs"
    assert D < 896, "D is less than 896"
    if rotary_mode == "interleave":
        assert B * N < 1000, "B·N is less than 1000"
        assert r1.shape == (1, S, 1, D), "1S1D for BSND"
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        assert rotary_mode == "half", "two modes"
        assert max(B, N) < 1000, "B and N are less than 1000"
        assert r1.shape in ((1, S, 1, D), (B, S, 1, D)), "1S1D or BS1D for BSND"
        a, b = x.chunk(2, -1)
        turned = torch.cat((-b, a), -1)
    return r1 * x + r2 * turned


def _npu_swiglu(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    assert x.is_contiguous(), "x is contiguous"
    assert x.numel(), "x is not empty"
    a, b = (x if x.dtype is torch.float16 else x.float()).chunk(2, dim)
    return (a / (1 + (-a).exp()) * b).to(x.dtype)


def _npu_gelu(x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate=approximate)


#: The operators, with their documented conditions as asserts, and their precision: see `omni_kernels.ascend`.
FUSED: dict[str, Callable[..., Any]] = {
    "npu_rms_norm": _npu_rms_norm,
    "npu_rotary_mul": _npu_rotary_mul,
    "npu_swiglu": _npu_swiglu,
    "npu_gelu": _npu_gelu,
}


@contextlib.contextmanager
def fused(version: str | None) -> Iterator[None]:
    """While open, torch_npu's fused operators exist with this version's schemas; with None, there are none."""
    from omni_kernels.ascend import operators

    operators.fused.cache_clear()
    try:
        with torch.library._scoped_library("npu", "FRAGMENT") as library:
            for name, schema in schemas(version).items() if version else ():
                library.define(schema)
                library.impl(name, _on_raw(FUSED[name]), "PrivateUse1")
            yield
    finally:
        operators.fused.cache_clear()


def _on_raw(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        assert all(isinstance(t, NpuTensor) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        args, kwargs = pytree.tree_map_only(NpuTensor, lambda t: t.raw, (args, kwargs))
        return pytree.tree_map_only(torch.Tensor, NpuTensor, function(*args, **kwargs))

    return run
