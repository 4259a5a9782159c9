"""What a model computes again though nothing of it has changed: once instead, the same bits.

- Qwen-Image: the modulation of a timestep, for both branches of guidance. That of a block and stream is a product with
  6 D² weights; a forward of 60 blocks with D = 3072 reads 13.6 GB of them in bf16. The branches' forwards follow one
  another with the same latents and the same timestep, which is known without asking the device: it is the one that
  diffusers' pipeline is at, and its scheduler has made no step in between.
- Z-Image: the refined caption, once per request: what the refiner makes of the same tensors of text while the scheduler
  has the same timesteps.

Everything is told apart by identity: a result is taken again only for the very tensors, unchanged in place, that it was
made of, and only in a call of the pipeline itself. It is kept until the next is made: of Qwen-Image 12 B D values a
block, of Z-Image the caption's states. Modules that somebody hooks, and forwards that are compiled, recorded or
differentiated, compute as ever. Weights, and scales of adapters, must not change within a request.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any, NamedTuple

import torch

from omni_kernels.device import capturing
from omni_kernels.patching.engine import InstanceMethod, Patch, PatchConflictError
from omni_kernels.patching.structure import hooked, shadowed


class Reuse:
    """What a patch lets a pipeline reuse; prints as lines.

    Attributes:
        names: the parts that are computed once.
        left_alone: reasons by the names of those that are not.
        taken: how often a result was taken instead of being computed.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.left_alone: dict[str, str] = {}
        self.taken = 0

    def __str__(self) -> str:
        lines = [f"{name}: once" for name in self.names]
        lines += [f"{name}: left alone: {reason}" for name, reason in self.left_alone.items()]
        return "\n".join(lines) or "nothing that could be reused"


def compute_once(pipe: Any, patch: Patch) -> Reuse:
    """Let the pipeline's transformers reuse what they can, through `patch`."""
    reuse = Reuse()
    running = functools.partial(_runs, pipe, inspect.unwrap(type(pipe).__call__).__code__)
    for component, model in (getattr(pipe, "components", None) or vars(pipe)).items():
        row = RULES.get(type(model).__name__)
        if row is None:
            continue
        what, replace = row
        name = f"{component}: {what}"
        if not type(pipe).__module__.startswith("diffusers.pipelines."):
            reason = f"{type(pipe).__name__} is not one of diffusers' own, of which is known what they give to a step"
            reuse.left_alone[name] = reason
            continue
        part = Patch()
        try:
            replace(pipe, model, part, reuse, running)
        except PatchConflictError as error:
            part.undo()
            reuse.left_alone[name] = str(error)
        else:
            patch.take_over(part)
            reuse.names.append(name)
    return reuse


def _runs(pipe: Any, code: CodeType) -> bool:
    """Whether a call of `pipe`, whose code this is, is under way in this thread."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("self") is pipe:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class _Given(NamedTuple):
    """A tensor that something was made of: of what it is a view, how, and how often that had been written to."""

    root: torch.Tensor
    version: int
    view: tuple[Any, ...]

    @classmethod
    def of(cls, t: torch.Tensor) -> _Given:
        root = t if t._base is None else t._base
        return cls(root, t._version, (t.shape, t.stride(), t.storage_offset(), t.dtype))

    def same(self, other: _Given) -> bool:
        return self.root is other.root and self.version == other.version and self.view == other.view


class _Memo:
    """One result, with what it was made of."""

    def __init__(self, reuse: Reuse) -> None:
        self._reuse = reuse
        self._kept: tuple[torch.Tensor, int] | None = None
        self._given: list[_Given] = []
        self._values: tuple[Any, ...] = ()

    def take(self, given: Sequence[torch.Tensor], values: tuple[Any, ...], make: Callable[[], torch.Tensor]) -> Any:
        """What `make` returns, or has returned for these tensors, which are `_usable`, and equal values."""
        now = [_Given.of(t) for t in given]
        if self._kept is not None and self.is_kept(self._kept[0]) and self._made_of(now, values):
            self._reuse.taken += 1
            return self._kept[0]
        self._kept = None  # before the next is made: there are never two
        made = make()
        self._given, self._values, self._kept = now, values, (made, made._version)
        return made

    def _made_of(self, given: Sequence[_Given], values: tuple[Any, ...]) -> bool:
        if len(given) != len(self._given) or values != self._values:
            return False
        return all(a.same(b) for a, b in zip(given, self._given, strict=True))

    def is_kept(self, t: torch.Tensor) -> bool:
        """Whether `t` is the result that is kept, unchanged."""
        return self._kept is not None and t is self._kept[0] and t._version == self._kept[1]


def _usable(module: torch.nn.Module, given: Sequence[torch.Tensor | None]) -> bool:
    """Whether what `module` makes of these tensors may stand for what it would make of them again."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    if any(t is None or t.is_inference() for t in given):  # whose changes in place nobody counts
        return False
    if module._forward_hooks or module._forward_pre_hooks or any(capturing(t) for t in given if t is not None):
        return False
    return not any(hooked(part) for part in module.modules() if part is not module)


# Qwen-Image


class _Timestep:
    """The embedding of a pipeline's timestep: the very same tensor for as long as it is at that step."""

    def __init__(self, pipe: Any, reuse: Reuse, running: Callable[[], bool]) -> None:
        self._pipe = pipe
        self._running = running
        self._memo = _Memo(reuse)
        self._latents: torch.Tensor | None = None
        self._at: tuple[Any, Any] = None, None

    def take_in(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward of the layer that is given the latents, which comes first."""
        self._latents = args[0] if args else None
        return type(module).forward(module, *args, **kwargs)

    def embed(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward of the embedding, of (timestep, guidance if any, states, condition)."""

        def make() -> Any:
            return type(module).forward(module, *args, **kwargs)

        latents, self._latents = self._latents, None
        if kwargs or len(args) < 3:  # which is not how the transformer calls it
            return make()
        timestep, *guidance, states, condition = args
        now = getattr(self._pipe, "_current_timestep", None)
        step = getattr(self._pipe.scheduler, "_step_index", None)
        if now is not self._at[0]:
            self._at = now, step
        given: list[Any] = [now, latents, *guidance, *([] if condition is None else [condition])]
        # Behind the scheduler's step it is somebody else who calls, from a callback.
        if step != self._at[1] or not _usable(module, given) or not self._running():
            return make()
        # Which step it is tells the timestep; of it and of the states, then, no more than the form counts.
        form = timestep.shape, timestep.dtype, timestep.device, states.dtype
        return self._memo.take(given, form, make)


class _Modulation:
    """The modulation of one block and stream: the very same tensor for the same embedding."""

    def __init__(self, reuse: Reuse) -> None:
        self._memo = _Memo(reuse)

    def __call__(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        def make() -> Any:
            return type(module).forward(module, *args, **kwargs)

        return make() if kwargs or not _usable(module, args) else self._memo.take(args, (), make)


def _qwen_image(pipe: Any, transformer: Any, patch: Patch, reuse: Reuse, running: Callable[[], bool]) -> None:
    timestep = _Timestep(pipe, reuse, running)
    patch.set_forward(transformer.img_in, timestep.take_in)
    patch.set_forward(transformer.time_text_embed, timestep.embed)
    for block in transformer.transformer_blocks:
        if isinstance(block._compiled_call_impl, InstanceMethod):
            raise PatchConflictError("its blocks are compiled or recorded, through another pipeline that shares it")
        for modulation in (block.img_mod, block.txt_mod):
            patch.set_forward(modulation, _Modulation(reuse))


# Z-Image


class _Caption:
    """The caption's refiner, all of whose layers run where its first is called, or none."""

    def __init__(self, pipe: Any, transformer: Any, reuse: Reuse, running: Callable[[], bool]) -> None:
        self._pipe = pipe
        self._running = running
        self._layers = list(transformer.context_refiner)
        self._patchify = transformer.patchify_and_embed
        self._memo = _Memo(reuse)
        self._captions: list[torch.Tensor] = []

    def patchify(self, images: Any, captions: Sequence[torch.Tensor], *sizes: int) -> Any:
        """The transformer's method that is given the captions' tensors, which comes before the refiner."""
        self._captions = list(captions)
        return self._patchify(images, captions, *sizes)

    def refine(self, number: int, states: torch.Tensor, *others: Any) -> Any:
        """The call of one of the layers; all are called with the same but for the states."""
        layer = self._layers[number]
        if self._memo.is_kept(states):
            return states
        captions, self._captions = self._captions, []
        given: list[Any] = [getattr(self._pipe.scheduler, "timesteps", None), *captions]
        usable = captions and all(_usable(each, given) and not shadowed(each) for each in self._layers)
        if number > 0 or not usable or not self._running():
            return layer._call_impl(states, *others)

        def make() -> Any:
            made = states
            for each in self._layers:
                made = each._call_impl(made, *others)
            return made

        return self._memo.take(given, (), make)


def _z_image(pipe: Any, transformer: Any, patch: Patch, reuse: Reuse, running: Callable[[], bool]) -> None:
    if any(layer._compiled_call_impl is not None for layer in transformer.context_refiner):
        raise PatchConflictError("its layers are compiled, or another pipeline's reuse holds them")
    caption = _Caption(pipe, transformer, reuse, running)
    patch.set_method(transformer, "patchify_and_embed", caption.patchify)
    for number, layer in enumerate(caption._layers):
        patch.set_method(layer, "_compiled_call_impl", functools.partial(caption.refine, number))


#: Transformer class → what is computed once, and what sees to it.
RULES: dict[str, tuple[str, Callable[[Any, Any, Patch, Reuse, Callable[[], bool]], None]]] = {
    "QwenImageTransformer2DModel": ("a timestep's modulation", _qwen_image),
    "ZImageTransformer2DModel": ("a request's refined caption", _z_image),
}
