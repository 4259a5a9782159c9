"""Figures for the model card, made from a model folder: `python -m benchmarks.train_emoji --stages report --out
FOLDER`.

Writes figures.json, contact_sheet.png, and README.md from cards/<model>.md there; held_out_sheet.png goes to the work
folder.

PSNR is the mean over pictures of 10 log10(1 / mse) on floats in [0, 1]. The bend of a trajectory is the relative change
of the guided velocity, the input of scheduler.step, from one step to the next: |v_t - v_(t-1)| / |v_(t-1)| (2-norms).
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from omni_runtime.generation.loading import find, load

from .autoencoder import TEST_SEED, psnr, reconstruction_psnr
from .model import Model
from .scenes import EMOJI, asset_directory, package_names

__all__ = [
    "caption_sheets",
    "contact_sheet",
    "generate",
    "listed_requests",
    "load_pipeline",
    "measure",
    "summary",
    "write_report",
]

COMPARISON_SEEDS = (0, 1)
BATCH = 16


def generate(
    pipeline: Any,
    prompts: list[str],
    seeds: list[int],
    defaults: dict,
    images: list[Image.Image] | None = None,
    **changes: object,
) -> list[np.ndarray]:
    """One float picture [side, side, 3] or clip [frames, side, side, 3] in [0, 1] per prompt (and reference), each from
    the noise of its seed."""
    pictures = []
    for start in range(0, len(prompts), BATCH):
        chosen = prompts[start : start + BATCH]
        settings = {**defaults, **changes}
        if "negative_prompt" in settings:
            settings["negative_prompt"] = [settings["negative_prompt"]] * len(chosen)
        if images is not None:
            settings["image"] = images[start : start + BATCH]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + BATCH]]
        output = pipeline(prompt=chosen, generator=generators, output_type="np", **settings)
        pictures += list(output.frames if hasattr(output, "frames") else output.images)
    return pictures


def contact_sheet(pictures: list[np.ndarray], captions: list[str], columns: int = 8) -> Image.Image:
    """Pictures in a grid with their captions below, in 256 colours to keep the file small."""
    side, breadth = pictures[0].shape[:2]
    width, height = max(breadth, 96) + 8, side + 30
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = number % columns * width, number // columns * height
        sheet.paste(Image.fromarray((picture * 255).round().astype(np.uint8)), (left + (width - breadth) // 2, top + 2))
        words, lines = caption.split(), [""]
        for word in words:
            if len(lines[-1]) + len(word) >= 19:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        draw.multiline_text(
            (left + width / 2, top + side + 3),
            "\n".join(lines[:2]),
            "black",
            anchor="ma",
            align="center",
            font_size=9,
            spacing=1,
        )
    return sheet.quantize(256)


def unknown_scenes(model: Model, count: int, side: int) -> list[np.ndarray]:
    """Samples of Twemoji outside the vocabulary (no skin tones, no flags), which are not in training."""
    stems = [
        stem
        for stem, name in sorted(package_names().items())
        if stem not in EMOJI.values()
        and "skin tone" not in name
        and not stem.startswith("1f1")
        and (asset_directory() / f"{stem}.png").exists()
    ]
    rng = random.Random("unknown")
    return [model.autoencoder.draw(rng, rng.choice(stems), side) for _ in range(count)]


def summary(values: torch.Tensor) -> dict[str, float]:
    return {
        "mean": round(values.mean().item(), 2),
        "std": round(values.std().item(), 2),
        "percentile_5": round(values.quantile(0.05).item(), 2),
    }


@contextlib.contextmanager
def recorded_velocities(pipeline: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the model output of each scheduler.step, [batch, tokens * channels], in the order of the calls."""
    velocities: list[torch.Tensor] = []
    original = pipeline.scheduler.step

    @functools.wraps(original)
    def recording_step(model_output: torch.Tensor, *args: object, **kwargs: object) -> object:
        velocities.append(model_output.float().flatten(1))
        return original(model_output, *args, **kwargs)

    pipeline.scheduler.step = recording_step
    try:
        yield velocities
    finally:
        del pipeline.scheduler.step


def bend_of(velocities: list[torch.Tensor], steps: int) -> list[float]:
    """Relative change of the velocity at each step except the first, mean over pictures; takes whole runs."""
    runs = [torch.stack(velocities[start : start + steps]) for start in range(0, len(velocities), steps)]
    changes = [(run[1:] - run[:-1]).norm(dim=2) / run[:-1].norm(dim=2) for run in runs]
    return [round(value, 4) for value in torch.cat(changes, dim=1).mean(1).tolist()]


def load_pipeline(model: Model, folder: Path) -> Any:
    """The folder's pipeline as `Omni` loads it, in fp32."""
    pipeline = load(find(str(folder)), torch.float32, torch.device("cpu"), {})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def listed_requests(folder: Path, name: str) -> tuple[list[str], list[Image.Image] | None]:
    """The prompts of a list in prompts.json, and their reference pictures, if there are any."""
    listed = json.loads((folder / "prompts.json").read_text())[name]
    if isinstance(listed[0], str):
        return listed, None
    return [one["prompt"] for one in listed], [Image.open(folder / one["image"]).convert("RGB") for one in listed]


def measure(model: Model, pipeline: Any, folder: Path) -> dict:
    """All figures of the card, measured with the shipped (bf16) weights in fp32."""
    defaults = json.loads((folder / "defaults.json").read_text())
    side = defaults["height"]

    restore = functools.partial(reconstruction_psnr, model.autoencoder, pipeline.vae)
    count = model.samples_measured
    known = [model.autoencoder.sample(TEST_SEED, index, side)[1] for index in range(count)]
    reconstruction = {
        "unseen_scenes": summary(restore(known)),
        "emoji_outside_the_vocabulary": summary(restore(unknown_scenes(model, count, side))),
    }
    prompts, images = listed_requests(folder, "contact_sheet")
    compared = model.prompts_measured
    spread = [number * len(prompts) // compared for number in range(compared)]
    chosen = [i for i in spread for _ in COMPARISON_SEEDS]
    stacked = functools.partial(
        generate,
        pipeline,
        [prompts[i] for i in chosen],
        list(COMPARISON_SEEDS) * compared,
        defaults,
        [images[i] for i in chosen] if images else None,
    )
    with recorded_velocities(pipeline) as velocities:
        reference = torch.from_numpy(np.stack(stacked()))
    per_picture = reference.shape[-3:]  # the frames of a clip count one by one
    bend = bend_of(velocities, defaults["num_inference_steps"])
    fewer_steps = {
        str(steps): summary(
            psnr(
                torch.from_numpy(np.stack(stacked(num_inference_steps=steps))).reshape(-1, *per_picture),
                reference.reshape(-1, *per_picture),
            )
        )
        for steps in (25, 13)
    }
    sizes = {
        "folder_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "transformer_parameters": sum(p.numel() for p in pipeline.transformer.parameters()),
        "vae_parameters": sum(p.numel() for p in pipeline.vae.parameters()),
        "text_encoder_parameters": sum(p.numel() for p in pipeline.text_encoder.parameters()),
    }
    return {
        "reconstruction_psnr_db": reconstruction,
        "fewer_steps_psnr_db": fewer_steps,
        "comparison": {
            "prompts": compared,
            "seeds": list(COMPARISON_SEEDS),
            "reference_steps": defaults["num_inference_steps"],
        },
        "velocity_change_per_step": {"mean": round(float(np.mean(bend)), 4), "largest": max(bend), "steps": bend},
        "sizes": sizes,
        "training": json.loads((folder / "training.json").read_text()),
    }


def caption_sheets(model: Model, pipeline: Any, folder: Path, work: Path) -> dict:
    """Write contact_sheet.png into the model folder, and held_out_sheet.png (unseen scenes) into `work`."""
    defaults = json.loads((folder / "defaults.json").read_text())
    for file, name in {folder / "contact_sheet.png": "contact_sheet", work / "held_out_sheet.png": "held_out"}.items():
        prompts, _ = listed_requests(folder, name)
        pictures = generate(pipeline, prompts, list(range(len(prompts))), defaults)
        contact_sheet(pictures, prompts).save(file, optimize=True)
    return {}


def write_card(model: Model, folder: Path, figures: dict) -> None:
    """Write README.md from the model's template. $name is replaced by a figure: the name is its path in `figures`, with
    underscores between the parts and instead of dots."""

    def flat(prefix: str, value: object) -> dict[str, object]:
        if isinstance(value, dict):
            return {
                k: v for key, part in value.items() for k, v in flat(f"{prefix}_{key}" if prefix else key, part).items()
            }
        return {prefix.replace(".", "_"): f"{value:,}" if isinstance(value, int) else value}

    template = string.Template((Path(__file__).parent / "cards" / f"{model.name}.md").read_text())
    (folder / "README.md").write_text(template.substitute(flat("", figures)))


def write_report(model: Model, folder: Path, work: Path) -> None:
    """Write the sheets, figures.json and the card; needs only the model folder."""
    pipeline = load_pipeline(model, folder)
    further = model.write_sheets(model, pipeline, folder, work)
    figures = measure(model, pipeline, folder) | further
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    write_card(model, folder, figures)
