"""diffusers' own parallelism for the transformers of a pipeline: context parallelism, or tensor parallelism."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch

from omni_runtime.cache.session import NAMES
from omni_runtime.parallel.degrees import Degrees


def check_class(degrees: Degrees, config: Mapping[str, Any] | None) -> None:
    """Check before the weights are loaded that diffusers can run a transformer like this.

    Args:
        config: the transformer's config.json; None if the pipeline has no transformer.

    Raises:
        ValueError: it cannot.
    """
    import diffusers

    if config is None:
        raise ValueError("parallel: this pipeline has no transformer")
    kind = str(config["_class_name"])
    found = getattr(diffusers, kind, None)
    for wanted, name, plan in (
        (degrees.splits_tokens, "ContextParallelConfig", "_cp_plan"),
        (degrees.tensor > 1, "TensorParallelConfig", "_tp_plan"),
    ):
        words = "context parallelism (ulysses, ring)" if plan == "_cp_plan" else "tensor parallelism"
        if wanted and not hasattr(diffusers, name):
            raise ValueError(f"parallel: diffusers {diffusers.__version__} has no {words}: a newer one is needed")
        if wanted and found is not None and getattr(found, plan, None) is None:
            raise ValueError(f"parallel: diffusers has no plan for {words} of {kind}; cfg=2 works without one")
    heads = config.get("num_attention_heads")
    for name, degree in (("ulysses", 1 if degrees.uneven else degrees.ulysses), ("tensor", degrees.tensor)):
        if isinstance(heads, int) and heads % degree:
            raise ValueError(f"parallel: {name}={degree} does not divide the {heads} attention heads of this {kind}")


def enable(pipe: Any, degrees: Degrees, mesh: Any, device: str) -> Callable[[Any], None]:
    """Enable diffusers' parallelism on all transformers of a pipeline.

    Args:
        mesh: the ranks.
        device: the type of their devices.

    Returns:
        A function that moves the parallelism to another mesh.

    Raises:
        ValueError: diffusers does not support it.
    """
    import diffusers
    from diffusers.hooks import tensor_parallel

    found = [getattr(pipe, name, None) for name in NAMES]
    transformers: list[Any] = list({id(one): one for one in found if isinstance(one, torch.nn.Module)}.values())
    if degrees.tensor > 1 and device not in tensor_parallel._SUPPORTED_TP_DEVICES:
        known = ", ".join(tensor_parallel._SUPPORTED_TP_DEVICES)
        raise ValueError(f"parallel: diffusers has tensor parallelism on {known}, and not on {device}")
    for transformer in transformers:
        if getattr(transformer, "_parallel_config", None) is not None:
            raise ValueError(
                f"parallel: this {type(transformer).__name__} is parallel already: leave out parallel, or its own"
            )
        with _countable(device):
            if degrees.splits_tokens:
                transformer.enable_parallelism(
                    config=diffusers.ContextParallelConfig(
                        ulysses_degree=degrees.ulysses,
                        ring_degree=degrees.ring,
                        mesh=mesh,
                        ulysses_anything=degrees.uneven and degrees.ulysses > 1,
                        ring_anything=degrees.uneven and degrees.ring > 1,
                    )
                )
            elif degrees.tensor > 1:
                transformer.enable_parallelism(config=diffusers.TensorParallelConfig(mesh=mesh["tensor"]))

    def move(mesh: Any) -> None:
        if degrees.tensor > 1:
            raise RuntimeError("the weights are shared out among ranks whose connections are broken: start them again")
        for transformer in transformers:
            config = getattr(transformer, "_parallel_config", None)
            if config is not None:
                config.setup(config._rank, config._world_size, config._device, mesh=mesh)

    return move


@contextlib.contextmanager
def _countable(device: str) -> Iterator[None]:
    """Context manager: diffusers takes a rank modulo the number of accelerators, which is 0 on the CPU."""
    if device != "cpu":
        yield
        return
    with mock.patch.object(torch.accelerator, "device_count", return_value=1):
        yield
