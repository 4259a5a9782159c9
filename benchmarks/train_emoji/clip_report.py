"""Figures for the card of a model of clips: contact sheets, the VAE on the frames that its latents keep and on those in
between, and how often the motion is the one that the caption names.

The motion is seen by a rule of thumb, from where and how large the emoji is in the first and the last frame. A pixel
belongs to it if it differs from the background, a plane that is fitted to the frame's border. The rule is checked on
true clips. It cannot see turns.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from omni_runtime.generation import video

from .autoencoder import TEST_SEED, reconstruction_psnr
from .clips import MOTIONS, clip
from .model import Model
from .report import contact_sheet, generate, listed_requests, summary

__all__ = ["clip_sheets", "seen_motion"]

KEPT = 4  # every fourth frame is one that a latent keeps
COLUMNS = 8
BORDER = 2  # pixels
DIFFERENT = 0.12  # of the range of a channel
MOVED, GROWN = 0.12, 1.4  # of the side; times the area


def emoji_in(frame: np.ndarray) -> np.ndarray:
    """Where a float frame [side, side, 3] shows something else than a graded background: [side, side], True there."""
    side = len(frame)
    y, x = np.mgrid[:side, :side] / side
    ground = np.stack([np.ones_like(x), x, y], -1).reshape(-1, 3)
    pixels = frame.reshape(-1, 3)
    inner = np.zeros((side, side), bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    chosen = ~inner.reshape(-1)
    for _ in range(3):  # an emoji at the border must not tilt the plane
        plane = ground @ np.linalg.lstsq(ground[chosen], pixels[chosen], rcond=None)[0]
        off = np.abs(pixels - plane).max(-1)
        chosen = ~inner.reshape(-1) & (off < max(DIFFERENT, np.median(off[chosen])))
    return (off > DIFFERENT).reshape(side, side)


def seen_motion(frames: np.ndarray) -> str | None:
    """The motion that a float clip [frames, side, side, 3] shows; None for none, or a turn, or no emoji."""
    first, last = emoji_in(frames[0]), emoji_in(frames[-1])
    if min(first.sum(), last.sum()) < 0.01 * first.size:
        return None
    ratio = last.sum() / first.sum()
    down, across = (np.argwhere(last).mean(0) - np.argwhere(first).mean(0)) / len(first)
    if max(abs(down), abs(across)) >= MOVED:
        if abs(across) > abs(down):
            return "moves right" if across > 0 else "moves left"
        return "moves down" if down > 0 else "moves up"
    if ratio >= GROWN:
        return "grows"
    return "shrinks" if ratio <= 1 / GROWN else None


def motion_in(caption: str) -> str:
    """The motion that a caption names."""
    return next(motion for motion in MOTIONS if f" {motion} " in caption)


def right_motions(clips: list[np.ndarray], captions: list[str]) -> dict[str, int]:
    """How many clips show the motion of their caption, of those that name another motion than a turn."""
    checked = [
        (frames, motion)
        for frames, caption in zip(clips, captions, strict=True)
        if (motion := motion_in(caption)) != "turns"
    ]
    return {"right": sum(seen_motion(frames) == motion for frames, motion in checked), "of": len(checked)}


def playing_sheet(clips: list[np.ndarray]) -> bytes:
    """Clips in a grid, as animated WebP."""
    count, frames, side = len(clips), len(clips[0]), len(clips[0][0])
    sheet = np.ones((frames, -(-count // COLUMNS) * side, COLUMNS * side, 3), np.float32)
    for number, frames_of_clip in enumerate(clips):
        top, left = number // COLUMNS * side, number % COLUMNS * side
        sheet[:, top : top + side, left : left + side] = frames_of_clip
    pictures = [Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in sheet]
    return video.webp(pictures, video.FPS, exact=False)


def clip_sheets(model: Model, pipeline: Any, folder: Path, work: Path) -> dict:
    """Write contact_sheet.png (first, middle and last frames) and contact_sheet.webp into the model folder, and
    held_out_sheet, the same of unseen combinations, into `work`; return the figures."""
    defaults = json.loads((folder / "defaults.json").read_text())
    side = defaults["height"]
    figures = {}
    for place, name in ((folder / "contact_sheet", "contact_sheet"), (work / "held_out_sheet", "held_out")):
        prompts, _ = listed_requests(folder, name)
        clips = generate(pipeline, prompts, list(range(len(prompts))), defaults)
        stills = [np.concatenate([one[0], one[len(one) // 2], one[-1]], axis=1) for one in clips]
        contact_sheet(stills, prompts, columns=4).save(place.with_suffix(".png"), optimize=True)
        place.with_suffix(".webp").write_bytes(playing_sheet(clips))
        figures[name] = right_motions(clips, prompts)
    true = [clip(TEST_SEED, index, side) for index in range(model.samples_measured)]
    figures["true_clips"] = right_motions(
        [pixels / 255 for _, pixels in true], [content.caption for content, _ in true]
    )
    frames = reconstruction_psnr(model.autoencoder, pipeline.vae, [pixels for _, pixels in true])
    by_frame = frames.unflatten(0, (len(true), -1))
    between = [number for number in range(by_frame.shape[1]) if number % KEPT]
    return {
        "motion": figures,
        "frames_psnr_db": {
            "kept": summary(by_frame[:, ::KEPT].flatten()),
            "between": summary(by_frame[:, between].flatten()),
        },
    }
