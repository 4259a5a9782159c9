"""Cells of a comparison: one image of one run, for one prompt and seed, kept on disk as soon as it is made.

A cell is three files, named after the prompt, the seed and a digest of everything that the image depends on: the
picture as PNG with its settings inside, the final latents as .npy (float32), and a JSON record of what was computed and
how long it took. The record is written last, with digests of the others, so that a cell is there wholly or not at all,
and damage is seen. A cell that is there is not made again; whatever is changed, be it a setting, a weight or, for our
own caches, a line of the caches or kernels, is another cell.

Pictures are what the pipeline returns to its user, 8 bits a channel, and PNG keeps them exactly: what is measured of a
cell that was found on disk is what was measured when it was made.

Every run is watched in the same way, whoever installed its cache: a hook on a projection of each block counts the
blocks that really ran, under caches that skip whole blocks and under those that skip within them, and a transformer
forward counts as computed where all of them did.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import platform
import re
import reprlib
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omni_kernels.device import describe
from omni_runtime import files
from omni_runtime.cache.models import MODELS
from omni_runtime.cache.report import CacheReport
from omni_runtime.generation.checks import finite_number
from omni_runtime.generation.omni import Omni
from omni_runtime.generation.request import GenerationRequest
from omni_runtime.generation.result import NotANumberError, OmniResult, identified, jsonable, png

PACKAGES = ("omni-kernels", "diffusers", "transformers", "torch")

#: The sources that an image of our caches depends on; the rest of the package only shows and measures it.
SOURCES = ("omni_kernels", "omni_runtime/cache")

#: What runs where a block does, by where it lies in the block: the projection of its (self-)attention's output.
PROJECTIONS = ("attn.to_out.0", "attention.to_out.0", "proj_out")

SAMPLES = 32  # values that the fingerprint reads of each weight


@dataclass(frozen=True)
class Run:
    """One column of a comparison: a cache with its configuration, or plain sampling.

    Attributes:
        name: as it is shown.
        backend: the cache backend; None for plain sampling.
        config: its configuration.
        steps: denoising steps.
        method: runs of one method are one line in the plots; by default what `method_of` says.
        install: for a cache that is not a backend of this package: pipeline → a context manager that has it installed
            while it is open. `backend` and `config` then only say what it is; they belong to the identity of its cells,
            so let them hold all its settings and the other library's version.
    """

    name: str
    backend: str | None = None
    config: Mapping[str, Any] | None = None
    steps: int = 50
    method: str | None = None
    install: Callable[[Any], AbstractContextManager[Any]] | None = None


@dataclass(frozen=True)
class Cell:
    """One image, on disk.

    Attributes:
        path: of the PNG; the latents and the record lie beside it.
        record: prompt, seed, seconds, forwards, blocks, branches, sitting, ...: see `make`.
        made_now: it was not there before.
    """

    path: Path
    record: Mapping[str, Any]
    made_now: bool

    @property
    def image(self) -> Any:
        """The picture (PIL), read from disk."""
        from PIL import Image

        with Image.open(self.path) as image:
            image.load()
            return image

    @property
    def latents(self) -> torch.Tensor | None:
        """The final latents; None of a pipeline that does not show them."""
        path = self.path.with_suffix(".npy")
        return torch.from_numpy(np.load(path)) if ".npy" in self.record["sha256"] else None


def complete_config(run: Run, pipe: Any) -> Any:
    """The run's configuration with all defaults filled in, and what the model's directory brings; None without one.

    Raises:
        ValueError, TypeError, PatchConflictError: what `Omni` raises for it.
    """
    if run.install is not None or run.backend is None:
        return run.config
    with Omni(pipe, cache_backend=run.backend, cache_config=run.config) as omni:
        omni.check_steps(run.steps)
        if omni.cache_config.get("decision") == "replay":
            raise ValueError(f"{run.name}: a comparison makes each image by itself, so there is nothing to replay")
        return omni.cache_config


def identity(run: Run, config: Any, pipe: Any, request: GenerationRequest, fingerprint: str) -> dict[str, Any]:
    """Everything that a cell's image depends on, fit for JSON.

    `config` is `complete_config(run, pipe)`, `fingerprint` is `fingerprint_of(pipe)`: both hold for many requests.
    """
    return {
        "weights": fingerprint,
        "pipeline": type(pipe).__name__,
        "prompt": request.prompt,
        "seed": request.seed,
        "steps": run.steps,
        "arguments": {k: identified(v) for k, v in sorted(request.arguments.items()) if k != "num_inference_steps"},
        "cache_backend": run.backend,
        "cache_config": jsonable(config),
        "installed": run.install is not None,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": pipe._execution_device.type,
        "versions": versions(),
        "sources": sources_digest() if run.backend is not None and run.install is None else None,
    }


def path_of(directory: Path, cell: Mapping[str, Any]) -> Path:
    """Where the PNG of the cell with this `identity` is, or would be."""
    digest = hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:16]
    words = re.sub(r"\W+", "-", (cell["prompt"] or "image").lower()).strip("-")[:40].strip("-") or "image"
    kind = re.sub(r"\W+", "-", cell["cache_backend"] or f"{cell['steps']} steps")
    return directory / f"{words}-seed{cell['seed']}-{kind}-{digest}.png"


def find(path: Path) -> Cell | None:
    """The cell whose PNG is at `path`; None if it is not there, or not whole.

    One that is damaged, in any of its files, is told of (`files.DamagedFileWarning`), for it is made again. What lies
    in the place of a file and is none is set aside.
    """
    places = [path.with_suffix(suffix) for suffix in (".json", ".png", ".npy")]
    for place in places:
        if place.is_dir():
            files.set_aside(place, "it is a directory", "and the picture is made again")
    if not places[0].exists():
        return None  # never made, or not to its end: the record is written last
    try:
        record = files.read_object(places[0])
        wrong = _wrong_in(record)
        if wrong:
            raise ValueError(f"{places[0]} is damaged: {wrong}")
        for suffix, digest in record["sha256"].items():
            file = path.with_suffix(suffix)
            if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
                raise ValueError(f"{file} is {'damaged' if file.is_file() else 'missing'}")
    except ValueError as error:
        warnings.warn(f"{error}; the picture is made again", files.DamagedFileWarning, stacklevel=2)
        return None
    return Cell(path, record, made_now=False)


def _wrong_in(record: Mapping[str, Any]) -> str | None:
    """What a cell's record has that no record has, in a few words."""
    for key, right in _RECORD.items():
        if key not in record or not right(record[key]):
            return f"{key} is {reprlib.repr(record[key]) if key in record else 'missing'}"
    return None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and finite_number(value) and value >= 0


def _branch(value: Any) -> bool:
    """{"computed": "1101...", "measured": [number or None, ...]}"""
    if not isinstance(value, dict) or not isinstance(value.get("computed"), str):
        return False
    computed, measured = value["computed"], value.get("measured")
    return (
        set(computed) <= {"0", "1"}
        and isinstance(measured, list)
        and len(measured) == len(computed)
        and all(one is None or finite_number(one) for one in measured)
    )


#: What a cell's record must have: key → whether a value is one.
_RECORD: dict[str, Callable[[Any], bool]] = {
    "prompt": lambda value: value is None or isinstance(value, str),
    "seed": lambda value: isinstance(value, int),
    "steps": _whole,
    "seconds": lambda value: finite_number(value) and value > 0,
    "forwards": _whole,
    "blocks": lambda value: value is None or _whole(value),
    "branches": lambda value: isinstance(value, dict) and all(map(_branch, value.values())),
    "notes": lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    "sitting": lambda value: isinstance(value, dict),
    "reference_seconds": lambda value: value is None or (finite_number(value) and value > 0),
    "sha256": lambda value: isinstance(value, dict) and ".png" in value and value.keys() <= {".png", ".npy"},
}


def make(
    run: Run,
    pipe: Any,
    request: GenerationRequest,
    path: Path,
    sitting: Mapping[str, Any],
    on_step: Any = None,
    reference_seconds: float | None = None,
) -> Cell:
    """Make the image of `request` under `run`, and keep it at `path`.

    `reference_seconds` is what the reference of the same prompt and seed takes in this sitting, where it was made in
    another.

    Its record:
        prompt, seed, steps
        seconds: of the whole request; timings: its parts
        forwards: transformer forwards computed; blocks: transformer blocks run, None for an unknown transformer
        branches: name → {"computed": "1101...", one character per step; "measured": per step, what was held against the
            threshold, or None}
        notes: what the cache had to say; sitting: when and where it was made
        reference_seconds: as given
        sha256: the digest of each of its other files, by suffix: ".png" and, where there are latents, ".npy"

    Raises:
        ValueError: several images; latents that are not numbers.
        TypeError: no picture.
        files.WriteError: a file that could not be written; there is no such cell then.
    """
    result, watch = _generated(run, pipe, request, on_step)
    if len(result.images) != 1:
        raise ValueError(f"a comparison is of single images; the pipeline returned {len(result.images)}")
    (image,) = result.images
    if not hasattr(image, "convert"):
        raise TypeError(f'a comparison needs pictures, not {type(image).__name__}: leave output_type at "pil"')
    record = {
        "prompt": request.prompt,
        "seed": request.seed,
        "steps": run.steps,
        "seconds": result.timings.total,
        "timings": result.timings.to_dict(),
        "forwards": watch.forwards if result.cache is None else result.cache.forwards,
        "blocks": watch.blocks,
        "branches": watch.branches() if result.cache is None else _branches(result.cache),
        "notes": [] if result.cache is None else list(result.cache.notes),
        "sitting": dict(sitting),
        "reference_seconds": reference_seconds,
    }
    settings = {key: value for key, value in result.settings.items() if key not in watch.arguments}
    settings |= {"run": run.name, "cache_backend": run.backend}
    if run.install is not None:
        settings["cache_config"] = jsonable(run.config)
    contents = {".png": png(image, settings)}
    if watch.latents is not None:
        latents = watch.latents.float().cpu().numpy()
        if not np.isfinite(latents).all():
            raise NotANumberError(f"{run.name}: the final latents are not finite numbers: no picture is made of them")
        buffer = io.BytesIO()
        np.save(buffer, latents)
        contents[".npy"] = buffer.getvalue()
    record["sha256"] = {suffix: hashlib.sha256(content).hexdigest() for suffix, content in contents.items()}
    for suffix, content in contents.items():
        files.write(path.with_suffix(suffix), content)
    files.write(path.with_suffix(".json"), json.dumps(record))
    return Cell(path, record, made_now=True)


def seconds_of(run: Run, pipe: Any, request: GenerationRequest) -> float:
    """How long the image of `request` takes under `run`; nothing is kept."""
    result, _ = _generated(run, pipe, request, None)
    return result.timings.total


def _generated(run: Run, pipe: Any, request: GenerationRequest, on_step: Any) -> tuple[OmniResult, _Watch]:
    watch = _Watch(pipe, request.arguments)
    arguments = request.arguments | {"num_inference_steps": run.steps} | watch.arguments
    backend, config = (None, None) if run.install is not None else (run.backend, run.config)
    foreign = contextlib.nullcontext() if run.install is None else run.install(pipe)
    with watch, foreign, Omni(pipe, cache_backend=backend, cache_config=config) as omni:
        return omni.run(GenerationRequest(request.prompt, request.seed, arguments), on_step), watch


# What the pipeline does meanwhile


class _Watch:
    """While open, counts the transformer's calls and blocks step by step, and keeps the latents of the last step.

    Steps and latents come through the pipeline's own `callback_on_step_end`, where it has one that the caller leaves
    free.

    Attributes:
        arguments: what the pipeline is to be called with besides.
    """

    def __init__(self, pipe: Any, given: Mapping[str, Any]) -> None:
        self.latents: torch.Tensor | None = None
        self.calls: list[list[int]] = [[]]  # blocks run, by step and call
        self.arguments: dict[str, Any] = {}
        if "latents" in getattr(pipe, "_callback_tensor_inputs", ()) and "callback_on_step_end" not in given:
            self.arguments["callback_on_step_end"] = self._step_ended
            self.arguments["callback_on_step_end_tensor_inputs"] = ["latents"]
        self._transformer = getattr(pipe, "transformer", None)
        self._projections = projections(self._transformer)
        self._hooks: list[Any] = []

    def __enter__(self) -> _Watch:
        if self._transformer is not None:
            self._hooks.append(self._transformer.register_forward_pre_hook(self._called))
        self._hooks += [one.register_forward_pre_hook(self._block_runs) for one in self._projections]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def blocks(self) -> int | None:
        """Blocks run in the whole request."""
        return sum(map(sum, self.calls)) if self._projections else None

    @property
    def forwards(self) -> int:
        """Forwards in which every block ran."""
        return sum(self._computed(blocks) for step in self.calls for blocks in step)

    def branches(self) -> dict[str, dict[str, Any]]:
        """Computed steps by the order of the calls within a step; a call that a step does without was skipped."""
        if not self.arguments:
            return {}  # where steps end is not known
        steps = [step for step in self.calls if step or step is not self.calls[-1]]
        masks = [
            "".join("1" if call < len(step) and self._computed(step[call]) else "0" for step in steps)
            for call in range(max(map(len, steps), default=0))
        ]
        return {str(call): {"computed": mask, "measured": [None] * len(mask)} for call, mask in enumerate(masks)}

    def _computed(self, blocks: int) -> bool:
        return blocks >= len(self._projections)

    def _called(self, module: Any, arguments: Any) -> None:
        self.calls[-1].append(0)

    def _block_runs(self, module: Any, arguments: Any) -> None:
        if self.calls[-1]:
            self.calls[-1][-1] += 1

    def _step_ended(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.latents = tensors["latents"].detach().clone()
        self.calls.append([])
        return {}


def projections(transformer: Any) -> list[torch.nn.Module]:
    """The projection that tells of every block whether it runs; none of a transformer whose blocks are not known."""
    row = MODELS.get(type(transformer).__name__)
    if row is None:
        return []
    blocks = [dict(block.named_modules()) for one in row.lists for block in getattr(transformer, one.name)]
    found = [block[name] for block in blocks for name in PROJECTIONS if name in block]
    return found if len(found) == len(blocks) else []


def _branches(report: CacheReport) -> dict[str, dict[str, Any]]:
    branches = {}
    for name, branch in report.branches.items():
        measured = [d.distance if d.accumulated is None else d.accumulated for d in branch.decisions]
        branches[name] = {
            "computed": "".join("1" if d.computed else "0" for d in branch.decisions),
            "measured": [None if m is None or not np.isfinite(m) else float(f"{m:.5g}") for m in measured],
        }
    return branches


# What an image depends on


def fingerprint_of(pipe: Any) -> str:
    """A digest of the pipeline's components: their classes and configs, and of every weight its name, shape, dtype and
    a few values. A fine-tuned model, a LoRA or another scheduler has another one; the weights are not read whole."""
    digest = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        config: Any = getattr(component, "config", None) or {}
        config = jsonable(config.to_dict() if hasattr(config, "to_dict") else config)
        config = {key: value for key, value in config.items() if not key.startswith("_")}  # where it was loaded from
        digest.update(json.dumps([name, type(component).__name__, config], sort_keys=True, default=str).encode())
        if isinstance(component, torch.nn.Module):
            # By name: a library that takes a module's place and gives it back leaves it last among its siblings.
            for weight_name, weight in sorted(component.state_dict().items()):
                digest.update(f"{weight_name} {tuple(weight.shape)} {weight.dtype}".encode())
                digest.update(_some_values(weight))
    return digest.hexdigest()


def _some_values(weight: torch.Tensor) -> bytes:
    if weight.device.type == "meta" or not weight.numel():
        return b""
    flat = weight.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
    return flat[places.to(flat.device)].cpu().double().numpy().tobytes()


@functools.cache
def sources_digest() -> str:
    """A digest of the sources of caches and kernels: cells are made anew when these change."""
    root = Path(__file__).parents[2]
    files = sorted(file for part in SOURCES for file in (root / part).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of the packages that images depend on."""
    return {name: metadata.version(name) for name in PACKAGES}


def sitting(pipe: Any) -> dict[str, Any]:
    """When and where cells are made: times of one sitting compare well, of several not always."""
    device = pipe._execution_device
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": _processor() if device.type == "cpu" else describe(device).name,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", file.read_text(encoding="utf-8")) if file.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()
