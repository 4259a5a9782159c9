"""Results of transformer calls that a pipeline holds before all ranks have theirs.

Between the two calls of a step, the first result is there on one rank only. The pipeline gets a `Pending` tensor on
every rank: the result itself where it is there, and where it is missing a tensor of its shape that is filled in place
later. Until then it holds NaN.

What the pipeline does with it before that goes through `__torch_function__`, on every rank alike:

- its shape, dtype and the like are answered;
- a view of it is pending, too;
- an elementary computation (a cast, a sum with another tensor) is made at once where the result is there, and made
  again where it was missing, when it comes. What it returns is pending, too, as long as results are missing;
- everything else is a use. It asks the `Round` first, which then exchanges the results early.

A used tensor is made an ordinary one, so later code does not meet this class.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from omni_runtime.cache.contract import tensors_of
from omni_runtime.cache.output import with_tensors

_TENSOR = torch.Tensor
#: What may be asked of a tensor without its values.
FACTS = frozenset(
    [
        *(
            getattr(_TENSOR, name).__get__
            for name in (
                "shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad_fn", "is_leaf", "is_cuda",
                "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes",
            )
        ),
        *(
            getattr(_TENSOR, name)
            for name in (
                "size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_floating_point",
                "is_complex", "is_contiguous", "is_inference", "storage_offset", "get_device", "__len__", "__hash__",
            )
        ),
        torch.is_floating_point,
        torch.is_complex,
        torch.numel,
        torch.is_inference,
    ]
)  # fmt: skip
#: Names of functions and methods whose result depends on nothing but their arguments, and that change none of them.
PURE = frozenset(
    [
        "__getitem__", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze",
        "permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "narrow", "select", "chunk",
        "split", "split_with_sizes", "tensor_split", "unbind", "expand", "expand_as", "detach", "alias", "contiguous",
        "clone", "to", "float", "half", "bfloat16", "double", "type_as", "cat", "concat", "stack", "add", "sub",
        "subtract", "mul", "multiply", "div", "divide", "true_divide", "neg", "negative", "rsub", "square", "sqrt",
        "lerp", "where", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__",
        "__rtruediv__", "__rdiv__", "__neg__", "__pos__",
    ]
)  # fmt: skip
#: The getters of attributes that are views.
VIEWS = frozenset(getattr(_TENSOR, name).__get__ for name in ("T", "mT"))


class Use(Protocol):
    """What a pending tensor asks when it is used."""

    @property
    def missing(self) -> bool:
        """Whether results are missing that may be used now."""

    def used(self, what: str) -> None:
        """A pending tensor is used; afterwards all of them hold their values."""


class Pending(torch.Tensor):
    """A tensor whose values may be missing yet."""

    _omni_batch: Batch

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See the module."""
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if func in FACTS:
                return func(*args, **kwargs)
        batch = next(one._omni_batch for one in tensors_of([args, kwargs]) if isinstance(one, Pending))
        if batch.open and ((getattr(func, "__name__", "") in PURE and "out" not in kwargs) or func in VIEWS):
            return batch.computed(func, args, kwargs)
        batch.use(getattr(func, "__name__", str(func)))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


class Batch:
    """The pending tensors of one round, and what was computed with them.

    Args:
        use: is asked when one of them is used.

    Attributes:
        open: whether they are pending.
    """

    def __init__(self, use: Use) -> None:
        self.open = True
        self._use = use
        self._alive: list[weakref.ref[Pending]] = []
        #: The storages of the tensors that are to be filled.
        self._empty: set[int] = set()
        self._later: list[_Later] = []

    def wrap(self, value: Any, empty: bool) -> Any:
        """A result whose tensors are pending.

        Args:
            value: the result.
            empty: whether its tensors are to be filled later.
        """

        def pending(tensor: torch.Tensor) -> torch.Tensor:
            if empty:
                self._empty.add(_storage(tensor))
            return self._pending(tensor)

        return with_tensors(value, pending)

    def _pending(self, tensor: torch.Tensor) -> Pending:
        one = tensor.as_subclass(Pending)
        one._omni_batch = self
        self._alive.append(weakref.ref(one))
        return one

    def computed(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The result of an elementary computation, pending."""
        given = tensors_of([args, kwargs])
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            storages = {_storage(one) for one in given}
            made = [one for one in tensors_of(result) if _storage(one) not in storages]
            if made and not self._use.missing:  # all results are there, and now they are used
                self.use(getattr(func, "__name__", str(func)))
                return result
            if made and any(_storage(one) in self._empty for one in given):
                others = [one for one in tensors_of([_plain(args), _plain(kwargs)]) if _storage(one) not in self._empty]
                versions = list(map(_version, others))
                self._later.append(_Later(func, _plain(args), _plain(kwargs), _plain(result), others, versions))
                self._empty.update(map(_storage, made))
            return with_tensors(result, self._pending)

    def filled(self) -> None:
        """The tensors have their values: compute what was computed without them.

        Raises:
            RuntimeError: what such a computation was given besides them has been changed since.
        """
        for one in self._later:
            if one.versions != list(map(_version, one.others)):
                raise RuntimeError(
                    f"a tensor that {one.func.__name__} was given together with the result of a transformer call was "
                    "changed in place before the branches of guidance were exchanged: leave out cfg"
                )
            made = tensors_of(one.func(*one.args, **one.kwargs))
            for old, new in zip(tensors_of(one.result), made, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        self._later.clear()
        self._empty.clear()

    def use(self, what: str) -> None:
        """One of them is used: make all of them ordinary tensors with their values."""
        if self.open:
            self.open = False
            self._use.used(f"{what}{_place()}" if self._use.missing else what)
        for reference in self._alive:
            one = reference()
            if one is not None:
                del one._omni_batch
                one.__class__ = torch.Tensor  # type: ignore[assignment]
        self._alive.clear()


@dataclass(frozen=True)
class _Later:
    """A computation to be made again, and the tensors in it that must not have changed until then."""

    func: Callable[..., Any]
    args: Any
    kwargs: Any
    result: Any
    others: list[torch.Tensor]
    versions: list[int]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _plain(value: Any) -> Any:
    """The same, with ordinary tensors that share their values with the pending ones."""
    if type(value) is dict:
        return {key: _plain(one) for key, one in value.items()}
    return with_tensors(value, lambda tensor: tensor.as_subclass(torch.Tensor))


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _place() -> str:
    """Where the code under way was called from outside of torch and this package, as text."""
    frame = sys._getframe(1)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("torch", "omni_runtime", "omni_kernels"):
            return f" ({frame.f_globals.get('__name__')}, line {frame.f_lineno})"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
