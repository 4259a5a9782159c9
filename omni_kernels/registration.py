"""How an op gets its implementations: one for each kind of device, known to torch's dispatcher and called directly.

An op is one typed function. `define` infers the dispatcher's schema from its signature, hands its defaults on to the
implementations, registers them by device, derives how many bytes the op has to move, and refuses gradients: the ops
are for inference, and none has a formula for its derivative.

The dispatcher calls Python through a callback that costs more than an operator on a small tensor. It is needed where
somebody watches or transforms operators: torch.compile, autograd, dispatch modes, tensor subclasses, a profiler. Else
an op calls its implementation itself (`direct`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import torch
from torch.compiler import is_dynamo_compiling

from omni_kernels import ascend
from omni_kernels.ascend.limits import falls_back

NAMESPACE = "omni_kernels"

# Bound once: each step of each request asks, when none of this is in the processor's caches any more, and every lookup
# on the way is a wait for memory: 2 µs less in all.
_Tensor, _grad_enabled, _dispatch_modes = torch.Tensor, torch.is_grad_enabled, torch._C._len_torch_dispatch_stack
_transforms, _tracing = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
_profiling = torch.autograd._profiler_enabled

# Registrations live as long as the library object that made them.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

Implementation = Callable[..., Any]


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


#: Name → the op, of all that were defined.
DEFINED: dict[str, Op] = {}

#: Kind of device → op → the implementation that is called directly there. Other kinds have the dispatcher.
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
    """Make the op `omni_kernels::<the function's name>`.

    Args:
        function: what is called. Its signature is the op's; its body checks the arguments, and ends in a call of what
            this returns. Where an argument may be numbers or a tensor, there is an overload `.tensor`; where the last
            one is `out`, a second op, `<name>_into`, writes to it.
        reference: in plain torch that stays on its inputs' device. It takes the function's arguments, under their
            names and in their order, and has its defaults. It runs on the CPU and on devices without better.
        launch: as reference, with the Triton kernel: on NVIDIA and, through ROCm, AMD, where Triton is installed.
        fake: what the results look like, for `torch.compile` and export; None: as the first tensor, contiguous.
        npu: as reference, or a partial of it, with torch_npu's fused operators; `NotImplemented` leaves a call to the
            reference.
        mutates: names of the arguments that are written to, other than `out`.

    Returns:
        The op, to be called with all arguments by position. It raises RuntimeError where a gradient is wanted.

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
    results = len(get_args(made)) if schema.endswith("[]") else 0
    return _caller(name, _chosen_by_arguments(overloads, results))


def _take_defaults(implementation: Any, signature: inspect.Signature) -> None:
    """Gives an implementation the defaults of the op's arguments.

    Raises:
        TypeError: it has other arguments.
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
    """What the dispatcher is told of an op and its overloads.

    All arguments have their places, so that nothing is looked up by name at a call. An op that writes to an argument
    returns nothing, or torch.compile would not take it; one that may leave out a result returns a list.
    """
    hints = get_type_hints(function)
    made = hints.pop("return")
    if type(None) in [kind for each in get_args(made) for kind in get_args(each)]:
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


def _adapted(schema: str) -> Callable[[Implementation], Implementation]:
    """Makes an implementation return what its schema says."""

    def without_result(implementation: Implementation) -> Implementation:
        def run(*args: Any) -> None:
            implementation(*args)

        return run

    def as_list(implementation: Implementation) -> Implementation:
        def run(*args: Any) -> Any:
            made = implementation(*args)
            return made if made[-1] is not None else [t for t in made if t is not None]

        return run

    made = schema.rpartition(" -> ")[2]
    return {"()": without_result, "Tensor[]": as_list}.get(made, lambda implementation: implementation)


# Implementations


def _registered(schema: str, by_device: Mapping[str, Implementation], fake: Implementation) -> Any:
    """The overload of a schema, with an implementation for each of the dispatcher's keys."""
    name = schema.partition("(")[0]
    _library.define(schema)
    for key, implementation in by_device.items():
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    base, _, variant = name.partition(".")
    return getattr(getattr(getattr(torch.ops, NAMESPACE), base), variant or "default")


def _refusing_gradients(overload: Any) -> Implementation:
    """What runs, on every device, while gradients are recorded: the op, unless one is wanted of it."""
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
    """What `omni_kernels.ascend` chooses for an op, asked for when the op is first called there."""

    @functools.cache
    def chosen() -> Implementation:
        return ascend.implementation(name, reference, launcher, npu)

    return lambda *args, **kwargs: chosen()(*args, **kwargs)


# Calls


def direct(t: torch.Tensor) -> SimpleNamespace | None:
    """The implementations that ops on `t` may call directly, by name; None where the dispatcher is needed."""
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
    return DIRECT.get("cpu" if t.is_cpu else "cuda" if t.is_cuda else t.device.type)  # the name takes 0.5 µs


def _caller(name: str, dispatched: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        ops = direct(args[0] if args[0] is not None else _first(args))
        return dispatched(*args) if ops is None else getattr(ops, name)(*args)

    return call


def _chosen_by_arguments(overloads: dict[Any, Any], results: int) -> Callable[..., Any]:
    """Calls the overload for whether there is an `out`, the last argument, and whether the one before is a tensor.

    `results` is how many there are where some may be left out, or 0.
    """
    found: list[Any] = [overloads.get((writes, variant)) for variant in ("", "tensor") for writes in (False, True)]
    plain, into, by_tensor, into_by_tensor = found

    def of_list(*args: Any) -> tuple[torch.Tensor | None, ...]:
        made = plain(*args)
        return tuple(made) if len(made) == results else (*made, *[None] * (results - len(made)))

    def call(*args: Any) -> Any:
        tensor = by_tensor is not None and isinstance(args[-2], _Tensor)
        if args[-1] is None:
            return (by_tensor if tensor else plain)(*args[:-1])
        (into_by_tensor if tensor else into)(*args)
        return args[-1]

    if into is not None:
        return call
    return of_list if results else plain


def _first(args: Sequence[Any]) -> torch.Tensor:
    """The first tensor among the arguments of an op, some of which may be lists of them."""
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
    """Bytes of an op's tensors: of its arguments, a number of a list in fp32, and of what it makes."""

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
