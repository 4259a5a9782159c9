"""Registers the ops: one implementation per kind of device, in torch's dispatcher and for direct calls.

An op is one typed function. `define` infers the dispatcher's schema from its signature, copies its defaults to the
implementations, registers these by device, and derives how many bytes the op has to move. It also makes the op raise
an error if a gradient is needed: the ops are for inference, and have no derivatives.

The dispatcher calls Python through a callback that costs more than an operator on a small tensor. It is needed if
something observes or transforms operators: torch.compile, autograd, dispatch modes, tensor subclasses, a profiler.
Otherwise an op calls its implementation directly (`direct`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch.compiler import is_dynamo_compiling

from omni_kernels import ascend
from omni_kernels.ascend.limits import falls_back

NAMESPACE = "omni_kernels"

# Bound once. Every step of every request uses these, at a time when they have left the processor's caches, and each
# attribute lookup would wait for memory. This saves 2 µs in all.
_Tensor, _grad_enabled, _dispatch_modes = torch.Tensor, torch.is_grad_enabled, torch._C._len_torch_dispatch_stack
_transforms, _tracing = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
_profiling = torch.autograd._profiler_enabled

# Registrations are removed when the library object is freed, so it is kept here.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

Implementation = Callable[..., Any]


@dataclass(frozen=True)
class Op:
    """What benchmarks, validation and tests need to know about one op.

    All four callables take the same arguments. `reference` is the plain-torch implementation. `launcher` runs the
    Triton kernel (also on CPU tensors with `TRITON_INTERPRET=1`). `bytes_moved` counts the bytes that cross the memory
    bus if every input is read once and every output is written once. It reads only shapes and dtypes, so tensors on
    the `meta` device are enough.
    """

    function: Callable[..., Any]
    reference: Callable[..., Any]
    launcher: Callable[..., Any]
    bytes_moved: Callable[..., int]


#: Name → op, for all defined ops.
DEFINED: dict[str, Op] = {}

#: Kind of device → op → the implementation for direct calls. Other kinds of device use the dispatcher.
DIRECT: dict[str, SimpleNamespace] = {kind: SimpleNamespace() for kind in ("cpu", "cuda", "npu")}


def define(
    function: Callable[..., Any],
    reference: Implementation,
    launch: Implementation,
    *,
    fake: Implementation | None = None,
    npu: Implementation | None = None,
    mutates: Sequence[str] = (),
) -> Callable[..., Any]:
    """Define the op `omni_kernels::<the function's name>`.

    Args:
        function: the public function. Its signature is the op's. Its body checks the arguments, and ends with a call
            of what `define` returns. If an argument may be numbers or a tensor, there is an overload `.tensor`. If the
            last argument is `out`, a second op, `<name>_into`, writes to it.
        reference: the implementation in plain torch, which stays on its inputs' device. It takes the function's
            arguments, with the same names and order, and gets its defaults. It is used on the CPU and on devices
            without a better implementation.
        launch: like reference, with the Triton kernel. It is used on NVIDIA and (through ROCm) AMD, if Triton is
            installed.
        fake: returns empty results of the right shapes and dtypes, for `torch.compile` and export. None: one result,
            contiguous, like the first tensor.
        npu: like reference, or a partial of it, with torch_npu's fused operators. If it returns `NotImplemented`, the
            reference runs.
        mutates: names of the arguments that are written to, other than `out`.

    Returns:
        The op, which takes all arguments by position. It raises RuntimeError if a gradient is needed.

    Raises:
        TypeError: an implementation does not take the function's arguments.
    """
    name, signature = function.__name__, inspect.signature(function)
    for implementation in (reference, launch, npu):
        if not isinstance(implementation, functools.partial | None):
            _take_defaults(implementation, signature)
    made = get_type_hints(function)["return"]
    if fake is None:
        fake = _nothing if made is type(None) else _as_first
    launcher = falls_back(reference, launch)
    on_gpu, on_npu = launcher if find_spec("triton") else reference, _on_npu(name, reference, launcher, npu)
    for kind, implementation in (("cpu", reference), ("cuda", on_gpu), ("npu", on_npu)):
        setattr(DIRECT[kind], name, implementation)
    keys = {"CPU": reference, "CUDA": on_gpu, "PrivateUse1": on_npu, "CompositeExplicitAutograd": reference}
    overloads = {}
    for schema in _schemas(function, mutates):
        overload, _, _ = schema.partition("(")
        base, _, variant = overload.partition(".")
        adapted = _adapted(schema)
        implementations = {key: adapted(one) for key, one in keys.items()}
        overloads[base != name, variant] = op = _registered(schema, implementations, adapted(fake))
        _library.impl(overload, _refusing_gradients(op), "Autograd", with_keyset=True)
    DEFINED[name] = Op(function, reference, launcher, _bytes_moved(signature, fake))
    return _caller(name, _chosen_by_arguments(overloads, _least(made)))


def _take_defaults(implementation: Any, signature: inspect.Signature) -> None:
    """Copy the defaults of the op's arguments to an implementation.

    Raises:
        TypeError: the implementation has other arguments than the op.
    """
    by_place = [p.name for p in inspect.signature(implementation).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    if by_place != [*signature.parameters]:
        raise TypeError(
            f"{implementation.__module__}.{implementation.__name__} takes {', '.join(by_place)}; "
            f"it must take {', '.join(signature.parameters)}, as the op does"
        )
    implementation.__defaults__ = tuple(p.default for p in signature.parameters.values() if p.default is not p.empty)


# Schemas


def _schemas(function: Callable[..., Any], mutates: Sequence[str]) -> Iterator[str]:
    """The dispatcher's schemas for an op and its overloads.

    All arguments are positional, so that calls look up nothing by name. An op that writes to an argument returns
    nothing, because torch.compile requires that. An op with an optional result returns a list.
    """
    hints = get_type_hints(function)
    made = hints.pop("return")
    if _least(made):
        made = list[torch.Tensor]
    made = None if made is type(None) else made
    either = [name for name, kind in hints.items() if {torch.Tensor, Sequence[float]} <= {*get_args(kind)}]
    into = [False, True] if "out" in hints else [False]
    for writes in into:
        for variant, kind in [("", Sequence[float]), (".tensor", torch.Tensor)] if either else [("", None)]:
            types = hints | dict.fromkeys(either, kind)
            if "out" in types:
                types |= {"out": torch.Tensor}
            if not writes:
                types.pop("out", None)
            name = function.__name__ + ("_into" if writes else "") + variant
            yield _schema(name, types, None if writes else made, [*mutates, "out"] if writes else mutates)


def _schema(name: str, types: Mapping[str, Any], made: Any, mutates: Sequence[str]) -> str:
    def prototype() -> None:
        pass

    place = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(argument, place, annotation=kind) for argument, kind in types.items()]
    prototype.__signature__ = inspect.Signature(parameters, return_annotation=made)  # type: ignore[attr-defined]
    return torch.library.infer_schema(prototype, op_name=name, mutates_args=mutates)


def _least(made: Any) -> int:
    """How many results an op returns at least, where their number varies: optional ones, or `… | Any`. Else 0."""
    first, *others = get_args(made) if get_origin(made) in (Union, UnionType) else (made,)
    if others:
        return max(1, len(get_args(first)))
    return len(get_args(made)) if any(type(None) in get_args(each) for each in get_args(made)) else 0


def _adapted(schema: str) -> Callable[[Implementation], Implementation]:
    """A function that adapts an implementation to return what its schema says."""

    def without_result(implementation: Implementation) -> Implementation:
        def run(*args: Any) -> None:
            implementation(*args)

        return run

    def as_list(implementation: Implementation) -> Implementation:
        def run(*args: Any) -> Any:
            made = implementation(*args)
            return [made] if isinstance(made, _Tensor) else [t for t in made if t is not None]

        return run

    made = schema.rpartition(" -> ")[2]
    return {"()": without_result, "Tensor[]": as_list}.get(made, lambda implementation: implementation)


# Implementations


def _registered(schema: str, by_device: Mapping[str, Implementation], fake: Implementation) -> Any:
    """Register a schema with an implementation for each dispatch key. Returns the overload."""
    name = schema.partition("(")[0]
    _library.define(schema)
    for key, implementation in by_device.items():
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    base, _, variant = name.partition(".")
    return getattr(getattr(getattr(torch.ops, NAMESPACE), base), variant or "default")


def _refusing_gradients(overload: Any) -> Implementation:
    """The op's implementation for the Autograd key: runs the op, or raises if an argument requires a gradient."""
    name = overload._schema.name.partition("::")[2].removesuffix("_into")
    arguments = [argument.name for argument in overload._schema.arguments]

    def run(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        for argument, value in zip(arguments, args, strict=False) if _grad_enabled() else ():
            for t in value if isinstance(value, list | tuple) else (value,):
                if isinstance(t, _Tensor) and t.requires_grad:
                    raise RuntimeError(
                        f"{name}: {argument} requires a gradient, and the op has none. Call it within torch.no_grad(); "
                        "to train, or to sample with gradients, take fused blocks and caches out first: "
                        "omni_kernels.unpatch(pipe)"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return run


def _on_npu(
    name: str, reference: Implementation, launcher: Implementation, npu: Implementation | None
) -> Implementation:
    """The implementation that `omni_kernels.ascend` chooses for an op. It is chosen at the op's first call."""

    @functools.cache
    def chosen() -> Implementation:
        return ascend.implementation(name, reference, launcher, npu)

    return lambda *args, **kwargs: chosen()(*args, **kwargs)


# Calls


def direct(t: torch.Tensor) -> SimpleNamespace | None:
    """The implementations that ops on `t` may call directly, by name; None if the dispatcher is needed."""
    if (
        _grad_enabled()
        or is_dynamo_compiling()
        or type(t) is not _Tensor
        or _dispatch_modes()
        or _transforms() is not None
        or _tracing() is not None
        or _profiling()
    ):
        return None
    return DIRECT.get("cpu" if t.is_cpu else "cuda" if t.is_cuda else t.device.type)  # the device's name takes 0.5 µs


def _caller(name: str, dispatched: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        ops = direct(args[0] if args[0] is not None else _first(args))
        return dispatched(*args) if ops is None else getattr(ops, name)(*args)

    return call


def _chosen_by_arguments(overloads: dict[Any, Any], least: int) -> Callable[..., Any]:
    """A function that calls the right overload: with or without `out` (the last argument), numbers or a tensor.

    Args:
        least: the least number of results if it varies, else 0. A single one is returned itself; missing ones are None.
    """
    found: list[Any] = [overloads.get((writes, variant)) for variant in ("", "tensor") for writes in (False, True)]
    plain, into, by_tensor, into_by_tensor = found

    def of_list(*args: Any) -> Any:
        made = plain(*args)
        return made[0] if least == len(made) == 1 else (*made, *[None] * (least - len(made)))

    result = of_list if least else plain

    def call(*args: Any) -> Any:
        tensor = by_tensor is not None and isinstance(args[-2], _Tensor)
        if args[-1] is None:
            return (by_tensor if tensor else result)(*args[:-1])
        (into_by_tensor if tensor else into)(*args)
        return args[-1]

    return result if into is None else call


def _first(args: Sequence[Any]) -> torch.Tensor:
    """The first tensor among the arguments of an op, including those in lists."""
    for value in args:
        for t in value if isinstance(value, list | tuple) else (value,):
            if isinstance(t, _Tensor):
                return t
    raise TypeError("there is no tensor among the arguments")


def _as_first(*args: Any) -> torch.Tensor:
    first = _first(args)
    return first.new_empty(first.shape)


def _nothing(*args: Any) -> None:
    pass


def _bytes_moved(signature: inspect.Signature, fake: Implementation) -> Callable[..., int]:
    """A function that returns the total bytes of an op's arguments and results. A number in a list counts as fp32."""

    def sized(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [sized(one) for one in value]
        if isinstance(value, _Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return value

    def size(value: Any) -> int:
        if isinstance(value, list | tuple):
            return sum(4 if isinstance(one, int | float) else size(one) for one in value)
        return value.numel() * value.element_size() if isinstance(value, _Tensor) else 0

    def bytes_moved(*args: Any, **kwargs: Any) -> int:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = [sized(value) for value in bound.arguments.values()]
        made = None if bound.arguments.get("out") is not None else fake(*given)
        return sum(map(size, (*given, made)))

    return bytes_moved
