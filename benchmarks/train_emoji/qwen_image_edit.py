"""`emoji-qwen-image-edit`: QwenImageEditPipeline with small configurations.

VAE and scheduler are those of emoji-qwen-image. Training starts from its transformer, which has the same shape. The
transformer gets 16 tokens of noise and 16 of the reference, packed in the same way; the loss is over the noise tokens.
The text encoder gets the instruction and, through its vision tower, the reference in 4 tokens. Both branches of
guidance get the reference; the negative branch gets the instruction " ".
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageEditPipeline
from PIL import Image
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor

from omni_runtime.generation.small_references import processor_class

from . import qwen_image
from .edit_report import write_edit_sheets
from .edits import INSTRUCTIONS, EditScene, edit_scene, listed_edits
from .model import Model
from .text import new_tokenizer
from .training import save
from .transformer import Samples, batch_encoder, batches, normalised_tokens

__all__ = ["MODEL", "build_edits", "edit_samples", "new_processor"]

EDIT_SEED = 5
EMPTY_INSTRUCTION = " "


# Text


def instruction_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer for the edit pipeline's template, whose tokens before the picture are dropped."""
    pipeline = QwenImageEditPipeline(None, None, None, None, None, None)
    prefix = pipeline.prompt_template_encode.split("<|vision_start|>")[0]
    return new_tokenizer(list(INSTRUCTIONS) * 4, prefix, pipeline.prompt_template_encode_start_idx)


def new_processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """Qwen2-VL's processor at its smallest picture size, 56x56 pixels: 4 tokens of 2x2 merged patches of 14."""
    pictures = Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, size={"shortest_edge": 56**2, "longest_edge": 56**2}
    )
    return processor_class()(pictures, tokenizer)


# Training data


def encode_instructions(
    pipeline: QwenImageEditPipeline, edits: list[EditScene], words: list[str]
) -> list[torch.Tensor]:
    """Encode instructions with their references as the pipeline does: embeddings [length, TEXT_DIM] each."""
    pictures = [Image.fromarray(edit.reference) for edit in edits]
    with torch.no_grad():
        embeddings, mask = pipeline.encode_prompt(words, pictures, device=torch.device("cpu"))
    if mask is None:
        return list(embeddings)
    return [row[kept.bool()] for row, kept in zip(embeddings, mask, strict=True)]


def build_edits(
    model: Model,
    vae: torch.nn.Module,
    file: Path,
    side: int,
    count: int,
    device: torch.device,
    compiled: bool = True,
) -> None:
    """Draw and encode `count` edits. Writes the latents of references and true edits, and the text embeddings of each
    reference with its instruction, then with the empty one."""
    tokenizer = model.new_tokenizer()
    pipeline = QwenImageEditPipeline(
        None, None, model.new_text_encoder(tokenizer), tokenizer, new_processor(tokenizer), None
    )
    encode_pictures = batch_encoder(model.autoencoder, vae, device, compiled)
    references, targets = [], []
    text: list[list[torch.Tensor]] = [[], []]
    for edits in batches(lambda index: edit_scene(EDIT_SEED, index, side), count):
        references.append(encode_pictures([edit.reference for edit in edits]))
        targets.append(encode_pictures([edit.target for edit in edits]))
        for rows, words in zip(text, ([e.instruction for e in edits], [EMPTY_INSTRUCTION] * len(edits)), strict=True):
            rows += [row.bfloat16() for row in encode_instructions(pipeline, edits, words)]
    rows = [*text[0][:count], *text[1][:count]]
    save(
        {
            "latents": torch.cat(targets)[:count],
            "references": torch.cat(references)[:count],
            "embeddings": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            "lengths": torch.tensor([len(row) for row in rows]),
            "mean": vae.config.latents_mean,
            "std": vae.config.latents_std,
        },
        file,
    )


def edit_samples(model: Model, cached: dict) -> Samples:
    """The samples from the file that `build_edits` wrote."""
    count, length = len(cached["latents"]), cached["embeddings"].shape[1]
    return Samples(
        tokens=normalised_tokens(model, cached, cached["latents"]),
        text_rows=torch.arange(2 * count).view(2, count).T,
        embeddings=cached["embeddings"],
        mask=torch.arange(length) < cached["lengths"][:, None],
        reference=normalised_tokens(model, cached, cached["references"]),
    )


# The folder's prompts


def edit_prompts(folder: Path, side: int) -> dict[str, Any]:
    """The content of prompts.json; writes the references that it names."""
    (folder / "references").mkdir(exist_ok=True)
    listed = []
    for number, edit in enumerate(listed_edits(side)):
        name = f"references/{number:02}.png"
        Image.fromarray(edit.reference).save(folder / name, optimize=True)
        listed.append({"prompt": edit.instruction, "image": name})
    return {"contact_sheet": listed, "instructions": list(INSTRUCTIONS)}


MODEL = Model(
    name="emoji-qwen-image-edit",
    pipeline=QwenImageEditPipeline,
    parent=qwen_image.MODEL.name,
    autoencoder=qwen_image.AUTOENCODER,
    new_transformer=qwen_image.new_transformer,
    new_scheduler=qwen_image.new_scheduler,
    new_tokenizer=instruction_tokenizer,
    further_parts=lambda tokenizer: {"processor": new_processor(tokenizer)},
    new_text_encoder=qwen_image.new_text_encoder,
    build_samples=build_edits,
    load_samples=edit_samples,
    pack=qwen_image.pack,
    training_forward=functools.partial(qwen_image.training_forward, pictures=2),
    logit_shift=qwen_image.logit_shift,
    block_prefixes=qwen_image.MODEL.block_prefixes,
    batch=qwen_image.MODEL.batch,
    prompts=edit_prompts,
    write_sheets=write_edit_sheets,
    defaults={"num_inference_steps": 50, "true_cfg_scale": 2.0, "negative_prompt": EMPTY_INSTRUCTION},
    pipeline_settings=lambda side: {"reference_pixels": side * side},
)
