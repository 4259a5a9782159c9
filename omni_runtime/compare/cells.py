"""Cells of a comparison: one image of one run, for one prompt and seed, written to disk as soon as it is made.

A cell is three files, named after the prompt, the seed and a digest of everything that the image depends on: the
picture as PNG (a video as lossless animated WebP) with its settings inside, the final latents as .npy (float32), and a
JSON record of what was computed and how long it took. The record is written last, with digests of the other files. So a
cell without its record counts as missing, and damage is detected. An existing cell is not made again. Any change makes
another cell: a setting, a weight or, for our own caches, a line of the caches or kernels.

Pictures are what the pipeline returns to its user, with 8 bits per channel. PNG and WebP keep them exactly, so a cell
that is read from disk has the same measures as when it was made.

Every run is watched in the same way, also one with another library's cache. A hook on a projection of each block counts
the blocks that really ran, for caches that skip whole blocks and for those that skip within them. A transformer forward
counts as computed if all of its blocks ran.
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
from omni_runtime.cache.contract import module_lists
from omni_runtime.cache.report import CacheReport
from omni_runtime.generation import video
from omni_runtime.generation.checks import finite_number
from omni_runtime.generation.omni import Omni
from omni_runtime.generation.request import GenerationRequest
from omni_runtime.generation.result import NotANumberError, OmniResult, identified, jsonable, png

PACKAGES = ("omni-kernels", "diffusers", "transformers", "torch")

#: The sources that an image of our caches depends on; the rest of the package only shows and measures it.
SOURCES = ("omni_kernels", "omni_runtime/cache")

#: Names, within a block, of the module that runs whenever the block does: its (self-)attention's output projection.
PROJECTIONS = ("attn.to_out.0", "attention.to_out.0", "attn1.to_out.0", "proj_out")

SAMPLES = 32  # how many values of each weight the fingerprint reads


@dataclass(frozen=True)
class Run:
    """One column of a comparison: a cache with its configuration, or plain sampling.

    Attributes:
        name: the name that is shown.
        backend: the cache backend; None for plain sampling.
        config: the backend's configuration.
        steps: denoising steps.
        method: runs of the same method are one line in the plots; by default the result of `method_of`.
        install: for a cache that is not a backend of this package: a function that takes the pipeline and returns a
            context manager, which installs the cache while it is open. `backend` and `config` then only describe the
            cache. They are part of the identity of its cells, so they must hold all its settings and the other
            library's version.
    """

    name: str
    backend: str | None = None
    config: Mapping[str, Any] | None = None
    steps: int = 50
    method: str | None = None
    install: Callable[[Any], AbstractContextManager[Any]] | None = None


@dataclass(frozen=True)
class Cell:
    """One image or video, on disk.

    Attributes:
        path: the PNG or WebP file; the latents and the record are in the same directory.
        record: prompt, seed, seconds, forwards, blocks, branches, sitting, ...: see `make`.
        made_now: whether this call made the cell; False if it was on disk already.
    """

    path: Path
    record: Mapping[str, Any]
    made_now: bool

    @property
    def frames(self) -> list[Any]:
        """The frames (PIL) of the video, read from disk; one for a picture."""
        return frames_of(self.path)

    @property
    def image(self) -> Any:
        """The picture (PIL), or the first frame of the video."""
        return self.frames[0]

    @property
    def latents(self) -> torch.Tensor | None:
        """The final latents; None if the pipeline does not expose them."""
        path = self.path.with_suffix(".npy")
        return torch.from_numpy(np.load(path)) if ".npy" in self.record["sha256"] else None


def frames_of(path: Path) -> list[Any]:
    """The frames (PIL, RGB) of a cell's WebP, or the picture of its PNG."""
    if path.suffix in video.SUFFIXES:
        return video.read_frames(path)
    from PIL import Image

    with Image.open(path) as image:
        return [image.convert("RGB")]


def complete_config(run: Run, pipe: Any) -> Any:
    """Return the run's configuration with all defaults, including those from the model's directory.

    For plain sampling and for a run with `install`, it is `run.config` unchanged.

    Raises:
        ValueError: the configuration is wrong, or its decision is "replay", which a comparison cannot use.
        TypeError: a value has the wrong type.
        PatchConflictError: the pipeline already has a different patch.
    """
    if run.install is not None or run.backend is None:
        return run.config
    with Omni(pipe, cache_backend=run.backend, cache_config=run.config) as omni:
        omni.check_steps(run.steps)
        if omni.cache_config.get("decision") == "replay":
            raise ValueError(f"{run.name}: a comparison makes each image by itself, so there is nothing to replay")
        return omni.cache_config


def identity(run: Run, config: Any, pipe: Any, request: GenerationRequest, fingerprint: str) -> dict[str, Any]:
    """Return everything that a cell's image depends on, ready for JSON.

    `config` is `complete_config(run, pipe)` and `fingerprint` is `fingerprint_of(pipe)`. Both are arguments, because
    they are the same for many requests.
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


def path_of(directory: Path, cell: Mapping[str, Any], suffix: str = ".png") -> Path:
    """Return the path of the picture of the cell with this `identity`, whether it exists or not.

    `suffix` is ".webp" for a pipeline of videos.
    """
    digest = hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:16]
    words = re.sub(r"\W+", "-", (cell["prompt"] or "image").lower()).strip("-")[:40].strip("-") or "image"
    kind = re.sub(r"\W+", "-", cell["cache_backend"] or f"{cell['steps']} steps")
    return directory / f"{words}-seed{cell['seed']}-{kind}-{digest}{suffix}"


def find(path: Path) -> Cell | None:
    """Return the cell whose picture is at `path`; None if it is missing, incomplete or damaged.

    A directory in the place of one of the files is set aside.

    Warns:
        files.DamagedFileWarning: a file of the cell is damaged, so the cell has to be made again.
    """
    places = [path.with_suffix(suffix) for suffix in (".json", path.suffix, ".npy")]
    for place in places:
        if place.is_dir():
            files.set_aside(place, "it is a directory", "and the picture is made again")
    if not places[0].exists():
        return None  # not made, or interrupted: the record is written last
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
    """Describe the first wrong or missing entry of a cell's record in a few words; None if there is none."""
    for key, right in _RECORD.items():
        if key not in record or not right(record[key]):
            return f"{key} is {reprlib.repr(record[key]) if key in record else 'missing'}"
    return None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and finite_number(value) and value >= 0


def _branch(value: Any) -> bool:
    """Whether `value` has the form {"computed": "1101...", "measured": [number or None, ...]}."""
    if not isinstance(value, dict) or not isinstance(value.get("computed"), str):
        return False
    computed, measured = value["computed"], value.get("measured")
    return (
        set(computed) <= {"0", "1"}
        and isinstance(measured, list)
        and len(measured) == len(computed)
        and all(one is None or finite_number(one) for one in measured)
    )


#: The required keys of a cell's record: key → a function that checks its value.
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
    "sha256": lambda value: isinstance(value, dict) and value.keys() - {".npy"} in ({".png"}, {".webp"}),
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
    """Make the image of `request` under `run`, and write the cell to `path`.

    `reference_seconds` is the time of the same prompt and seed's reference in this sitting, if the reference was made
    in another one; else None.

    The record holds:
        prompt, seed, steps
        seconds: of the whole request; timings: of its parts
        forwards: computed transformer forwards; blocks: transformer blocks that ran, None for an unknown transformer
        branches: name → {"computed": "1101...", one character per step; "measured": per step, the value that was
            compared with the threshold, or None}
        notes: the notes of the cache's report; sitting: when and where the cell was made
        reference_seconds: as given
        sha256: the digest of each of its other files, by suffix: ".png" or ".webp" and, if there are latents, ".npy"

    Raises:
        ValueError: the pipeline returns several images, or the latents are not finite.
        TypeError: the pipeline does not return PIL images.
        files.WriteError: a file cannot be written; the cell then does not exist.
    """
    result, watch = _generated(run, pipe, request, on_step)
    made = result.images if result.frames is None else result.frames
    if len(made) != 1:
        raise ValueError(f"a comparison is of single images; the pipeline returned {len(made)}")
    for image in made if result.frames is None else made[0]:
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
    if result.frames is None:
        contents = {path.suffix: png(made[0], settings)}
    else:
        contents = {path.suffix: video.encode(path.suffix, made[0], settings, settings.get("frame_rate") or video.FPS)}
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
    """Return the seconds that the image of `request` takes under `run`. The image is not kept."""
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

    Steps and latents come from the pipeline's own `callback_on_step_end`, if it has one and the caller does not use it.

    Attributes:
        latents: of the last step; None if the pipeline does not expose them.
        calls: for each step, the number of blocks that ran in each call.
        arguments: additional arguments for the pipeline's call.
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
        """The number of blocks that ran in the whole request; None for an unknown transformer."""
        return sum(map(sum, self.calls)) if self._projections else None

    @property
    def forwards(self) -> int:
        """The number of forwards in which every block ran."""
        return sum(self._computed(blocks) for step in self.calls for blocks in step)

    def branches(self) -> dict[str, dict[str, Any]]:
        """Return the computed steps for each call of a step, by its place in the step. A missing call was skipped."""
        if not self.arguments:
            return {}  # the ends of the steps are unknown
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
    """Return for each block the projection that shows whether it runs; an empty list for an unknown transformer."""
    lists = [blocks for path, blocks in module_lists(transformer).items() if "refiner" not in path]
    blocks = [dict(block.named_modules()) for one in lists for block in one]
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
    """Return a digest of the pipeline's components.

    It covers their classes and configs, and the name, shape, dtype and a few values of every weight. A fine-tuned
    model, a LoRA or another scheduler gives another digest. The weights are not read completely.
    """
    digest = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        config: Any = getattr(component, "config", None) or {}
        config = jsonable(config.to_dict() if hasattr(config, "to_dict") else config)
        config = {key: value for key, value in config.items() if not key.startswith("_")}  # where it was loaded from
        digest.update(json.dumps([name, type(component).__name__, config], sort_keys=True, default=str).encode())
        if isinstance(component, torch.nn.Module):
            # Sorted by name: a library that replaces a module and restores it moves it to the end of its siblings.
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
    """Return a digest of the sources of caches and kernels. If they change, cells are made again."""
    root = Path(__file__).parents[2]
    files = sorted(file for part in SOURCES for file in (root / part).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions of the packages that images depend on."""
    return {name: metadata.version(name) for name in PACKAGES}


def sitting(pipe: Any) -> dict[str, Any]:
    """Describe when and where cells are made. Times of one sitting are comparable; those of several are not always."""
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
