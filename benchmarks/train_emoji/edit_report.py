"""Figures for the edit model's card: a contact sheet of edits next to the true ones, and the number of correct edits,
also at other guidance scales.

An edit is correct under two conditions. First, the result is nearest in PSNR to the true edit, compared with the true
results of all other instructions on the same reference, and with the unchanged reference. Second, its PSNR to the true
edit is at most BOUND_DB below that of the true edit's reconstruction by the VAE, which is the best that the model could
reach.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .autoencoder import TEST_SEED, psnr, reconstruct
from .edits import EDITS, INSTRUCTIONS, LISTED_PER_KIND, EditScene, edit_scene, every_result, listed_edits
from .model import Model
from .report import contact_sheet, generate

__all__ = ["is_nearest", "write_edit_sheets"]

BOUND_DB = 8.0
PER_KIND = 24
GUIDANCE_SCALES, GUIDED_PER_KIND = (1.0, 1.5, 2.0, 3.0, 4.0), 8


def as_floats(picture: np.ndarray) -> np.ndarray:
    """uint8 [side, side, 3] to floats in [0, 1]."""
    return picture.astype(np.float32) / 255.0


def psnr_of(picture: np.ndarray, *others: np.ndarray) -> torch.Tensor:
    """PSNR in dB of one float picture against each of the others."""
    stacked = torch.from_numpy(np.stack(others))
    return psnr(torch.from_numpy(picture).expand_as(stacked), stacked)


def is_nearest(result: np.ndarray, edit: EditScene) -> bool:
    """Whether no other instruction's true result is nearer to this float picture than the edit's own true result."""
    to_target = psnr_of(result, as_floats(edit.target))
    others = [as_floats(other) for words, other in every_result(edit.drawing).items() if words != edit.instruction]
    return bool((psnr_of(result, *others) <= to_target).all())


def edited(pipeline: Any, edits: list[EditScene], defaults: dict) -> list[np.ndarray]:
    references = [Image.fromarray(edit.reference) for edit in edits]
    return generate(pipeline, [edit.instruction for edit in edits], list(range(len(edits))), defaults, references)


def measured(model: Model, pipeline: Any, edits: list[EditScene], defaults: dict) -> dict:
    """How many edits are nearest and how many are correct, and the mean PSNR in dB of results and reconstructions."""
    targets = torch.from_numpy(np.stack([as_floats(edit.target) for edit in edits]))
    results = edited(pipeline, edits, defaults)
    distances = psnr(torch.from_numpy(np.stack(results)), targets)
    restored = reconstruct(model.autoencoder, pipeline.vae, [edit.target for edit in edits])
    reachable = psnr(restored.permute(0, 2, 3, 1), targets)
    nearest = torch.tensor([is_nearest(result, edit) for result, edit in zip(results, edits, strict=True)])
    right = nearest & (distances >= reachable - BOUND_DB)
    return {
        "nearest": int(nearest.sum()),
        "right": int(right.sum()),
        "psnr_db": round(distances.mean().item(), 2),
        "autoencoder_db": round(reachable.mean().item(), 2),
    }


def measure_edits(model: Model, pipeline: Any, defaults: dict) -> dict:
    """The figures of each kind and, except the mean PSNR, of all kinds together."""
    side = defaults["height"]
    figures = {
        kind: measured(
            model, pipeline, [edit_scene(TEST_SEED, index, side, kind) for index in range(PER_KIND)], defaults
        )
        for kind in EDITS
    }
    return {
        "bound_db": BOUND_DB,
        "instructions": len(INSTRUCTIONS),
        "of_each": PER_KIND,
        "of_all": PER_KIND * len(EDITS),
        "all": {name: sum(of_kind[name] for of_kind in figures.values()) for name in ("nearest", "right")},
        **figures,
    }


def measure_guidance(model: Model, pipeline: Any, defaults: dict) -> dict:
    """The figures at several guidance scales, over other edits than those of `measure_edits`, of all kinds."""
    edits = [
        edit_scene(TEST_SEED, PER_KIND + index, defaults["height"], kind)
        for kind in EDITS
        for index in range(GUIDED_PER_KIND)
    ]
    by_scale = {
        f"{scale:g}": measured(model, pipeline, edits, defaults | {"true_cfg_scale": scale})
        for scale in GUIDANCE_SCALES
    }
    return {"of_all": len(edits), **by_scale}


def write_edit_sheets(model: Model, pipeline: Any, folder: Path, work: Path) -> dict:
    """Write contact_sheet.png, with a row of (reference, result, true edit) triples per kind; return the figures."""
    defaults = json.loads((folder / "defaults.json").read_text())
    edits = listed_edits(defaults["height"])
    cells = [
        cell
        for edit, result in zip(edits, edited(pipeline, edits, defaults), strict=True)
        for cell in (
            (as_floats(edit.reference), edit.name),
            (result, edit.instruction),
            (as_floats(edit.target), "true edit"),
        )
    ]
    contact_sheet(*map(list, zip(*cells, strict=True)), columns=3 * LISTED_PER_KIND).save(
        folder / "contact_sheet.png", optimize=True
    )
    return {
        "edits": measure_edits(model, pipeline, defaults),
        "guidance": measure_guidance(model, pipeline, defaults),
    }
