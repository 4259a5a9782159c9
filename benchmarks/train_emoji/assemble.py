"""Put the trained parts together as an ordinary diffusers folder: bf16 weights, prompts, defaults, training record.

The pipeline class's `from_pretrained(folder)` is all that is needed to use it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from .autoencoder import all_parameters, decoder_parameters
from .model import Model
from .scenes import COLOURS, EMOJI, HELD_OUT_COLOURS, HELD_OUT_PAIRS, VOCABULARY, caption_of, is_held_out
from .training import load_ema

__all__ = [
    "assemble",
    "contact_sheet_prompts",
    "decoder_checkpoint",
    "held_out_prompts",
    "latents_file",
    "load_autoencoder",
]


def contact_sheet_prompts(count: int = 64) -> list[str]:
    """Every emoji by itself, every emoji on a colour, then pairs, half of them on a colour; none of them held out."""
    rng = random.Random("contact sheet")
    prompts = [caption_of((name,), article=number % 2 == 1) for number, name in enumerate(EMOJI)]
    for name in EMOJI:
        allowed = [colour for colour in COLOURS if not is_held_out((name,), colour)]
        prompts.append(caption_of((name,), rng.choice(allowed)))
    while len(prompts) < count:
        names = tuple(rng.sample(list(EMOJI), 2))
        colour = rng.choice(list(COLOURS)) if len(prompts) % 2 else None
        if not is_held_out(names, colour):
            prompts.append(caption_of(names, colour))
    return prompts[:count]


def held_out_prompts(count: int = 32) -> list[str]:
    """Compositions that training never showed: half an emoji on a colour ("a penguin on pink" first), half pairs."""
    rng = random.Random("held out")
    colours = sorted(HELD_OUT_COLOURS - {("penguin", "pink")})
    chosen = [("penguin", "pink"), *rng.sample(colours, count // 2 - 1)]
    pairs = rng.sample(sorted(tuple(sorted(pair)) for pair in HELD_OUT_PAIRS), count // 2)
    return [caption_of((name,), colour) for name, colour in chosen] + [caption_of(pair) for pair in pairs]


def load_autoencoder(model: Model, work: Path) -> tuple[torch.nn.Module, dict[str, dict]]:
    """The VAE as trained so far, with its further trained decoder if there is one, and what went into each."""
    vae = model.autoencoder.new()
    trained = {"autoencoder": load_ema(all_parameters(vae), work / "autoencoder.pt")}
    decoder = decoder_checkpoint(work, trained["autoencoder"]["steps"])
    trained["decoder"] = {"steps": 0, "samples": 0, "minutes": 0.0}
    if decoder.exists():
        trained["decoder"] = load_ema(decoder_parameters(vae), decoder)
    return vae, trained


def latents_file(work: Path, autoencoder_steps: int) -> Path:
    """Cached latents of the encoder after this many steps."""
    return work / f"latents-{autoencoder_steps}.pt"


def decoder_checkpoint(work: Path, autoencoder_steps: int) -> Path:
    """Further training of the decoder, begun after this many steps of the whole."""
    return work / f"decoder-{autoencoder_steps}.pt"


def assemble(model: Model, work: Path, out: Path, side: int) -> None:
    """Write the model folder from the checkpoints in `work`, with the EMA weights as they stand."""
    vae, trained = load_autoencoder(model, work)
    cached = torch.load(latents_file(work, trained["autoencoder"]["steps"]), mmap=True)
    model.autoencoder.configure(vae, cached["mean"], cached["std"])
    transformer = model.new_transformer()
    trained["transformer"] = load_ema(list(transformer.parameters()), work / "transformer.pt")
    tokenizer = model.new_tokenizer()
    pipeline = model.pipeline(
        scheduler=model.new_scheduler(),
        vae=vae.to(torch.bfloat16),
        text_encoder=model.new_text_encoder(tokenizer).to(torch.bfloat16),
        tokenizer=tokenizer,
        transformer=transformer.to(torch.bfloat16),
    )
    pipeline.save_pretrained(out)

    training = {"scenes": len(cached["latents"]), "parts": trained}
    defaults = {"height": side, "width": side, **model.defaults}
    prompts = {"contact_sheet": contact_sheet_prompts(), "held_out": held_out_prompts(), "vocabulary": VOCABULARY}
    for name, content in {"defaults": defaults, "prompts": prompts, "training": training}.items():
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
