"""Train an embedded model from scratch: `python -m benchmarks.train_emoji --model emoji-z-image --out FOLDER`.

Stages: autoencoder, latents, transformer, decoder, assemble, report. Every stage continues from the contents of the
work folder. So the same command resumes after an interruption, and more minutes continue a finished stage. If the
autoencoder is trained further, the latents are made again, and the transformer continues on these. `assemble` and
`report` can be run separately at any time, even while the transformer trains. Minutes are the training time over all
runs together.

The transformer may be trained in several runs. Each further one starts from the weights of the model folder that the
run before has made, as with `--restore`, and the optimizers start anew. These folders and their checkpoints are
OUT-run-1, WORK-run-1 and so on.

A model with a parent uses the VAE from the parent's folder, trains none, and starts from the parent's transformer. The
VAE of a model of clips keeps the encoder of one of pictures, so its autoencoder stage is empty, and the decoder stage
trains it.

On a CPU, set OMP_WAIT_POLICY=PASSIVE if other programs run at the same time.
"""

from __future__ import annotations

import argparse
import copy
import shutil
from pathlib import Path

import torch

from omni_runtime.generation.loading import EMBEDDED

from .assemble import assemble, decoder_checkpoint, latents_file, load_autoencoder, restore
from .autoencoder import train_autoencoder
from .model import Model
from .models import MODELS
from .report import write_report
from .training import Budget
from .transformer import train_transformer

STAGES = ("autoencoder", "latents", "transformer", "decoder", "assemble", "report")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_emoji", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="emoji-qwen-image", help="which model to train")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--work", type=Path, help="checkpoints and cached latents (default: OUT-work, beside OUT)")
    parser.add_argument("--parent", type=Path, help="folder of the model whose VAE and transformer it starts from")
    parser.add_argument(
        "--fresh", action="store_true", help="start from a random transformer also if there is a parent"
    )
    parser.add_argument(
        "--restore", type=Path, help="train this finished model folder on, where WORK has no checkpoints"
    )
    parser.add_argument("--side", type=int, default=64, choices=(64, 128), help="pixels per side")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto takes the accelerator if there is one")
    parser.add_argument("--minutes-vae", type=float, default=30, help="training time of the whole autoencoder")
    parser.add_argument(
        "--minutes-transformer",
        type=float,
        nargs="+",
        metavar="MINUTES",
        help="training time of the transformer at the end of each run (default: the model's)",
    )
    parser.add_argument(
        "--minutes-decoder", type=float, help="training time of the decoder alone (default: the model's)"
    )
    parser.add_argument(
        "--scenes", type=int, help="scenes whose latents the transformer trains on (default: the model's)"
    )
    parser.add_argument("--no-compile", action="store_true", help="plain fp32 instead of torch.compile in bf16")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="run only these")
    return parser.parse_args(arguments)


def choose_device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def autoencoder_stage(model: Model, options: argparse.Namespace, device: torch.device) -> None:
    if model.parent is not None:
        print(f"the autoencoder is that of {options.parent}", flush=True)
        return
    if model.autoencoder.encoder_of is not None:
        print(f"the encoder is that of {model.autoencoder.encoder_of}; the stage decoder trains the rest", flush=True)
        return
    train_autoencoder(
        model.autoencoder,
        model.autoencoder.new(),
        options.work / "autoencoder.pt",
        options.side,
        Budget(options.minutes_vae),
        device,
        compiled=not options.no_compile,
    )


def latents_stage(model: Model, options: argparse.Namespace, device: torch.device) -> None:
    """Encode the transformer's scenes with the current encoder, unless that was done already."""
    vae, trained = load_autoencoder(model, options.work, options.parent)
    file = latents_file(options.work, trained["autoencoder"]["steps"])
    if not file.exists():
        model.build_samples(model, vae, file, options.side, options.scenes, device, compiled=not options.no_compile)


def transformer_stage(model: Model, options: argparse.Namespace, device: torch.device) -> None:
    _, trained = load_autoencoder(model, options.work, options.parent)
    cached = torch.load(latents_file(options.work, trained["autoencoder"]["steps"]), map_location="cpu")
    transformer = model.new_transformer()
    if model.parent is not None and not options.fresh:
        transformer = type(transformer).from_pretrained(options.parent / "transformer", dtype=torch.float32)
    train_transformer(
        model,
        transformer,
        model.load_samples(model, cached),
        options.work / "transformer.pt",
        Budget(options.minutes_transformer),
        device,
        compiled=not options.no_compile,
    )


def decoder_stage(model: Model, options: argparse.Namespace, device: torch.device) -> None:
    if model.parent is not None:
        return
    vae, trained = load_autoencoder(model, options.work, options.parent)
    train_autoencoder(
        model.autoencoder,
        vae,
        decoder_checkpoint(options.work, trained["autoencoder"]["steps"]),
        options.side,
        Budget(model.autoencoder.decoder_minutes if options.minutes_decoder is None else options.minutes_decoder),
        device,
        decoder_only=True,
        compiled=not options.no_compile,
    )


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    options.work = options.work or options.out.with_name(options.out.name + "-work")
    device = choose_device(options.device)
    model = MODELS[options.model]
    options.parent = options.parent or (EMBEDDED / model.parent if model.parent else None)
    options.scenes = options.scenes or model.scenes
    minutes = list(options.minutes_transformer or model.transformer_minutes)
    if options.restore is not None or "transformer" not in options.stages:
        minutes = minutes[-1:]  # a run of its own, or stages of the last run alone
    made, before = options.restore, options.work
    for number, until in enumerate(minutes, 1):
        one = copy.copy(options)
        one.minutes_transformer, one.restore = until, made
        if number < len(minutes):
            one.out, one.work = (path.with_name(f"{path.name}-run-{number}") for path in (options.out, options.work))
            one.stages = [stage for stage in STAGES[:-1] if stage == "assemble" or stage in options.stages]
        if number > 1:
            take_samples_over(before, one.work)
        print(f"run {number} of {len(minutes)}, in {one.work}", flush=True)
        one_run(model, one, device)
        made, before = one.out, one.work


def take_samples_over(before: Path, work: Path) -> None:
    """Copy the encoded samples of the run before: they are the same."""
    work.mkdir(parents=True, exist_ok=True)
    for file in before.glob("latents*"):
        if not (work / file.name).exists():
            shutil.copy(file, work / file.name)


def one_run(model: Model, options: argparse.Namespace, device: torch.device) -> None:
    """The stages of one run."""
    options.work.mkdir(parents=True, exist_ok=True)
    if options.restore is not None:
        restore(model, options.restore, options.work)
    run = {
        "autoencoder": lambda: autoencoder_stage(model, options, device),
        "latents": lambda: latents_stage(model, options, device),
        "transformer": lambda: transformer_stage(model, options, device),
        "decoder": lambda: decoder_stage(model, options, device),
        "assemble": lambda: assemble(model, options.work, options.out, options.side, options.parent),
        "report": lambda: write_report(model, options.out, options.work),
    }
    for stage in STAGES:
        if stage in options.stages:
            print(f"stage {stage}", flush=True)
            run[stage]()


if __name__ == "__main__":
    main()
