"""From a command's options to the model and its requests. Wrong input is reported before anything runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from omni_kernels.patching import PatchConflictError
from omni_runtime.cli.options import UsageError
from omni_runtime.generation import loading
from omni_runtime.generation.omni import ENVIRONMENT_VARIABLE, Omni
from omni_runtime.generation.request import GenerationRequest
from omni_runtime.progress import StepBar


@contextmanager
def wrong_input() -> Iterator[None]:
    """Context manager: errors about wrong input become a `UsageError`. The pipeline must not run inside it."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, PatchConflictError) as error:
        raise UsageError(str(error) or type(error).__name__) from error


def settle(options: argparse.Namespace) -> None:
    """Silence the libraries that are imported from here on, and choose the number of threads."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if options.quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with wrong_input():
        on_cpu = loading.resolve_device(options.device).type == "cpu"
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    elif on_cpu and options.model in loading.embedded_models():
        torch.set_num_threads(1)


def make_omni(options: argparse.Namespace, **how: Any) -> Omni:
    """Return an `Omni` for the options' model, without loading its weights. `how` is passed on to `Omni`."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    given = {name: getattr(options, name) for name in ("revision", "variant") if getattr(options, name) is not None}
    return Omni(options.model, dtype=options.dtype, device=options.device, **how, **given)


def speed_of(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Omni` for the options that say what makes the model faster."""
    layers = {key: getattr(options, key) for key in ("min_width", "edge_steps") if getattr(options, key) is not None}
    if layers and options.quantize is None:
        raise UsageError("--min-width and --edge-steps belong to --quantize: give it, too")
    quantize = {"dtype": options.quantize, **layers} if layers else options.quantize
    how: dict[str, Any] = {"fuse": options.fuse or None, "compile": options.compile, "quantize": quantize}
    wish = wish_of(options)
    if options.cache_backend is not None or options.cache_config is not None:
        if wish and options.cache_backend != "auto":
            raise UsageError(f"--{next(iter(wish))} chooses the cache by itself: leave --cache-backend out")
        if wish and options.cache_config is not None:
            raise UsageError(f"--{next(iter(wish))} and --cache-config cannot be combined")
    elif wish or not os.environ.get(ENVIRONMENT_VARIABLE):
        how["cache_backend"] = "auto"
    if options.cache_backend is not None:
        how["cache_backend"] = options.cache_backend
    how["cache_config"] = wish or options.cache_config
    return how


def wish_of(options: argparse.Namespace) -> dict[str, Any]:
    """The configuration of the cache `auto` that the options ask for; empty if they ask for nothing."""
    given = {name: getattr(options, name) for name in ("quality", "speedup", "psnr")}
    return {name: value for name, value in given.items() if value is not None}


def gpus_of_workers(options: argparse.Namespace, option: str) -> bool | None:
    """Whether each of several processes with the model has a GPU; None: if there are any.

    Raises:
        UsageError: Ray is not installed, or the device is one of several. `option` is what asks for the processes.
    """
    from omni_runtime.serving import local_ray

    if not local_ray.installed():
        raise UsageError(f"{option}: {local_ray.NEEDED}")
    kind, _, index = options.device.partition(":")
    if index:
        raise UsageError(f"--device {options.device}: each process has a device of its own: give --device {kind}")
    return None if kind == "auto" else kind != "cpu"


def threads_of_workers(options: argparse.Namespace) -> int | None:
    """The CPU threads of each of several processes with the model; None: a share of the CPUs."""
    if options.threads is None and options.model in loading.embedded_models():
        return 1
    threads: int | None = options.threads
    return threads


def request_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of every request, besides its prompt and seed."""
    width, height = options.size or (None, None)
    images = options.image or []
    if dict(options.set).get("output_type", "pil") != "pil":
        raise UsageError("images are written as PNG, videos as MP4 or WebP: output_type cannot be set")
    return {
        "negative_prompt": options.negative_prompt,
        "image": images[0] if len(images) == 1 else images or None,
        "num_inference_steps": options.steps,
        "width": width,
        "height": height,
        **dict(options.set),
    }


def texts(given: str) -> list[str]:
    """Return the prompt itself, or the lines of a file if `given` is one.

    Raises:
        UsageError: `given` looks like a file that does not exist, or the file is not UTF-8 or has no prompts.
    """
    path = Path(given)
    if len(given) >= 256 or not path.is_file():
        if given.endswith(".txt") or (
            any(mark in given for mark in {"/", os.sep}) and not any(map(str.isspace, given))
        ):
            raise UsageError(f"no file {given!r}: a prompt that looks like a file name must be in a file")
        return [given]
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{given} is not UTF-8: {error.reason} at byte {error.start}") from None
    found = [line for line in lines if line]
    if not found:
        raise UsageError(f"{given} has no prompts: it must have one per line")
    return found


def with_seeds(
    options: argparse.Namespace, omni: Omni, prompts: Sequence[tuple[str, Path | None]], seeds: Sequence[int]
) -> list[GenerationRequest]:
    """Return a request for every prompt with every seed, checked against the pipeline."""
    arguments = request_arguments(options)
    return [
        request
        for prompt, image in prompts
        for seed in seeds
        for request in omni.prepare(prompt, seed=seed, **arguments | ({} if image is None else {"image": image}))
    ]


def prompts_and_images(
    options: argparse.Namespace, count: int, given: Sequence[str] | None = None
) -> list[tuple[str, Path | None]]:
    """Return the prompts, each with its own picture if an embedded model has one for it."""
    from omni_runtime.compare import comparison

    if not given:
        return own_prompts(options, comparison.prompts_of(options.model, count))
    prompts: list[tuple[str, Path | None]] = []
    for one in given:
        if one == "@model":
            prompts += comparison.prompts_of(options.model, None)
        elif one.startswith("@"):
            known_set = comparison.PROMPT_SETS.get(one[1:])
            if known_set is None:
                known = ", ".join(f"@{name}" for name in ("model", *comparison.PROMPT_SETS))
                raise UsageError(f"there is no prompt set {one!r}; the sets are {known}")
            prompts += [(text, None) for text in known_set]
        else:
            prompts += [(text, None) for text in texts(one)]
    return prompts


def own_prompts(options: argparse.Namespace, found: Sequence[tuple[str, Path | None]]) -> list[tuple[str, Path | None]]:
    """Return the model's own prompts and pictures. If the options give a picture, their own pictures are left out."""
    from omni_runtime.compare import comparison

    if not found:
        sets = " or ".join(f"@{name}" for name in comparison.PROMPT_SETS)
        raise UsageError(f"{options.model} has no prompts of its own: give --prompts, such as {sets}")
    return [(prompt, None if options.image else image) for prompt, image in found]


def make_directory(path: Path) -> None:
    """Create the output directory before the first image, so that a failure is reported as wrong input."""
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(f"cannot write into {path}")


def bar(options: argparse.Namespace, label: str, steps: int, note: str = "") -> AbstractContextManager[StepBar | None]:
    """Return the progress bar of one request; an empty context with --quiet."""
    return nullcontext() if options.quiet else StepBar(label, sys.stderr, steps, note)
