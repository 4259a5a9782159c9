"""Writes the trained parts as an ordinary diffusers folder: bf16 weights, prompts, defaults, training record.

The pipeline class's `from_pretrained(folder)` loads it. `restore` makes checkpoints from such a folder, to train on.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .autoencoder import all_parameters, decoder_parameters
from .model import Model
from .training import load_ema, save

__all__ = [
    "assemble",
    "decoder_checkpoint",
    "latents_file",
    "load_autoencoder",
    "restore",
]


def load_autoencoder(model: Model, work: Path, parent: Path | None) -> tuple[torch.nn.Module, dict[str, dict]]:
    """The current VAE, with its further trained decoder if there is one, and the training of each part.

    A model with a parent has the VAE of the parent's folder, including its statistics.
    """
    vae = model.autoencoder.new()
    if model.parent is not None:
        parts = json.loads((parent / "training.json").read_text())["parts"]
        vae = type(vae).from_pretrained(parent / "vae", dtype=torch.float32)
        vae.register_to_config(_name_or_path=None)  # otherwise a directory of this machine would be saved
        return vae, {name: parts[name] for name in ("autoencoder", "decoder")}
    trained = {"autoencoder": {"steps": 0, "samples": 0, "minutes": 0.0}}
    if model.autoencoder.encoder_of is None:
        trained["autoencoder"] = load_ema(all_parameters(model.autoencoder, vae), work / "autoencoder.pt")
    decoder = decoder_checkpoint(work, trained["autoencoder"]["steps"])
    trained["decoder"] = {"steps": 0, "samples": 0, "minutes": 0.0}
    if decoder.exists():
        trained["decoder"] = load_ema(decoder_parameters(model.autoencoder, vae), decoder)
    return vae, trained


def latents_file(work: Path, autoencoder_steps: int) -> Path:
    """The file of cached latents of the encoder after this many steps."""
    return work / f"latents-{autoencoder_steps}.pt"


def decoder_checkpoint(work: Path, autoencoder_steps: int) -> Path:
    """The checkpoint of the decoder's further training, which started after this many steps of the whole VAE."""
    return work / f"decoder-{autoencoder_steps}.pt"


def assemble(model: Model, work: Path, out: Path, side: int, parent: Path | None) -> None:
    """Write the model folder from the checkpoints in `work`, with the current EMA weights."""
    vae, trained = load_autoencoder(model, work, parent)
    cached = torch.load(latents_file(work, trained["autoencoder"]["steps"]), mmap=True)
    model.autoencoder.configure(vae, cached["mean"], cached["std"])
    transformer = model.new_transformer()
    trained["transformer"] = load_ema(list(transformer.parameters()), work / "transformer.pt")
    tokenizer = model.new_tokenizer()
    pipeline = model.pipeline(
        **model.further_parts(tokenizer),
        scheduler=model.new_scheduler(),
        vae=vae.to(torch.bfloat16),
        text_encoder=model.new_text_encoder(tokenizer).to(torch.bfloat16),
        tokenizer=tokenizer,
        transformer=transformer.to(torch.bfloat16),
    )
    pipeline.save_pretrained(out)

    training = {"scenes": len(cached["latents"]), "parts": trained}
    defaults = {"height": side, "width": side, **model.defaults}
    files = {"defaults": defaults, "prompts": model.prompts(out, side), "training": training}
    if model.pipeline_settings:
        files["pipeline"] = model.pipeline_settings(side)
    for name, content in files.items():
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def restore(model: Model, folder: Path, work: Path) -> None:
    """Make checkpoints in `work` from the model folder that `assemble` wrote. Parts that have one there are left out.

    The weights are those of the folder, in bf16; EMA and raw weights are the same. The optimizers start anew.
    """
    trained = json.loads((folder / "training.json").read_text())["parts"]
    vae = type(model.autoencoder.new()).from_pretrained(folder / "vae", dtype=torch.float32)
    transformer = type(model.new_transformer()).from_pretrained(folder / "transformer", dtype=torch.float32)
    parts = {
        "autoencoder": (work / "autoencoder.pt", all_parameters(model.autoencoder, vae)),
        "decoder": (
            decoder_checkpoint(work, trained["autoencoder"]["steps"]),
            decoder_parameters(model.autoencoder, vae),
        ),
        "transformer": (work / "transformer.pt", list(transformer.parameters())),
    }
    for name, (checkpoint, parameters) in parts.items():
        part = trained[name]
        if part["steps"] and not checkpoint.exists():
            weights = [parameter.detach() for parameter in parameters]
            save(
                {
                    "parameters": weights,
                    "optimizers": None,
                    "ema": weights,
                    "step": part["steps"],
                    "samples": part["samples"],
                    "seconds": 60 * part["minutes"],
                    "loss": float("nan"),
                },
                checkpoint,
            )
