"""The options of the commands of `omni`."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from omni_runtime.parallel import degrees

DEFAULT_MODEL = "emoji-qwen-image"
#: The presets of `omni_runtime.cache.presets`, which imports torch. A test checks that they are equal.
PRESETS = ("exact", "high", "balanced", "fast")
#: Exit codes: wrong input, and a batch of which some rows failed.
WRONG_INPUT, SOME_FAILED = 2, 3
#: Errors whose message says all, by name: their modules import torch.
EXPECTED = ("NotANumberError", "RankError", "ServerError", "DeviceFailedError", "WorkersFailedError")


class UsageError(Exception):
    """Wrong input. Only its message is shown to the user."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"omni: error: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Like argparse, but report unknown options before missing ones, which may be the same option misspelt."""
        self._check_names(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def _check_names(self, arguments: Sequence[str]) -> None:
        for word in arguments:
            if word == "--" or (self._subparsers and not word.startswith("-")):  # the rest belongs to the command
                return
            name = word.partition("=")[0]
            if (
                re.match(r"--?[A-Za-z]", word)
                and not re.search(r"\s", name)
                and name not in self._option_string_actions
            ):
                self.error(f"unknown option {name}{_nearest(name, self._option_string_actions)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {close[0]}?" if close else ""


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    root = _Parser(prog="omni", description="Diffusion pipelines with step caches.", allow_abbrev=False)
    root.add_argument("--version", action="version", version=f"omni {metadata.version('omni-kernels')}")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    model = _model_options()
    _add_generate(commands, model)
    _add_batch(commands, model)
    _add_compare(commands, model)
    _add_calibrate(commands, model)
    _add_explain(commands, model)
    _add_inspect(commands, model)
    _add_serve(commands)
    for name, about in (
        ("backends", "list the cache backends, or the keys of one with their defaults"),
        ("models", "list the embedded models and the transformers that caches know"),
    ):
        listing = commands.add_parser(name, help=about, description=f"{about.capitalize()}.", allow_abbrev=False)
        if name == "backends":
            listing.add_argument("name", nargs="?", metavar="NAME", help="list the keys of this backend")
        listing.add_argument("--json", action="store_true", help="print one JSON document with all keys")
        listing.set_defaults(module="listings", command=name)
    return root


def _add_model(options: argparse.ArgumentParser) -> None:
    """Options that say which model, and where it runs."""
    model = options.add_argument_group("model")
    model.add_argument(
        "--model", default=DEFAULT_MODEL, help="embedded model, directory or hub id (default: %(default)s)"
    )
    model.add_argument("--device", default="auto", help="cpu, cuda, npu, ... (default: the accelerator, if any)")
    model.add_argument("--dtype", default="auto", help="default: float32 on the CPU, bfloat16 elsewhere")
    model.add_argument("--revision", help="branch, tag or commit of a hub model")
    model.add_argument("--variant", help="variant of the weight files, such as fp16")
    model.add_argument(
        "--threads",
        type=_whole,
        metavar="N",
        help="CPU threads (default: 1 for an embedded model on the CPU, which is too small for more; else torch's own)",
    )


def _model_options() -> argparse.ArgumentParser:
    """Options that generate, compare and calibrate share."""
    options = argparse.ArgumentParser(add_help=False)
    _add_model(options)
    request = options.add_argument_group("request")
    request.add_argument(
        "--negative-prompt", type=text_of, metavar="TEXT", help="what the image should not show; turns guidance on"
    )
    request.add_argument(
        "--image", action="append", type=Path, metavar="FILE", help="picture to start from; repeat for more references"
    )
    request.add_argument("--size", type=_size, metavar="N|WxH", help="pixels: width and height, or one for both")
    request.add_argument(
        "--set",
        action="append",
        type=_setting,
        default=[],
        metavar="KEY=JSON",
        help="any other argument of the pipeline, such as true_cfg_scale=4; repeatable",
    )
    options.add_argument("--json", action="store_true", help="print one JSON document instead of the summary")
    options.add_argument("--quiet", action="store_true", help="show no progress")
    return options


def _add_generate(commands: Any, shared: argparse.ArgumentParser) -> None:
    about = "make images or videos, and write them as PNG, MP4 or animated WebP, with their settings inside"
    command = commands.add_parser(
        "generate", help=about, description=f"{about.capitalize()}.", parents=[shared], allow_abbrev=False
    )
    command.set_defaults(module="generate", command="generate")
    command.add_argument(
        "--prompt", action="append", type=text_of, required=True, metavar="TEXT", help="repeat for more images"
    )
    command.add_argument("--steps", type=_whole, metavar="N", help="denoising steps (default: the model's own)")
    command.add_argument(
        "--seed", type=_seed, metavar="N", help="makes the same images again (default: random; it is printed)"
    )
    _add_speed(command)
    command.add_argument(
        "--parallel",
        type=_degrees,
        metavar="NAME=N,...",
        help="share the work among the ranks that torchrun has started: ulysses, ring, cfg, tensor, uneven, such as "
        "ulysses=2,cfg=2 for four of them",
    )
    _add_rate(command)
    command.add_argument(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="PATH",
        help="a directory, or a file: .png, for videos .mp4 or .webp (default: out)",
    )


def _add_rate(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--fps",
        type=_rate,
        metavar="N",
        help="frames per second of videos (default: the request's frame_rate, else 16)",
    )


def _add_batch(commands: Any, shared: argparse.ArgumentParser) -> None:
    about = "make the images or videos of a file of rows, several at once, on one or more workers"
    command = commands.add_parser(
        "batch",
        help=about,
        description=f"{about.capitalize()}. A row of a .jsonl file is a JSON object with arguments of `generate` "
        "(prompt, seed, num_inference_steps, image, cache_backend, ...) and an id, which may be left out; a .txt file "
        "has a prompt on each line. All rows are checked first. Options are for rows that do not have the argument. "
        "Writes the files, and results.jsonl with a line for each row. A row that fails does not stop the others; the "
        "exit code is then 3. What was made is not made again, unless the row, the model or the cache has changed.",
        parents=[shared],
        allow_abbrev=False,
    )
    command.set_defaults(module="batch", command="batch")
    command.add_argument("rows", type=Path, metavar="ROWS", help="a .jsonl or .txt file")
    command.add_argument("--steps", type=_whole, metavar="N", help="denoising steps (default: the model's own)")
    command.add_argument("--seed", type=_seed, metavar="N", help="default: one that follows from the row's content")
    _add_speed(command)
    _add_rate(command)
    command.add_argument(
        "--workers",
        type=_whole,
        default=1,
        metavar="N",
        help="processes that have the model, on a GPU each if there are any; more than 1 need Ray. They are of this "
        "machine, or of the Ray cluster that $RAY_ADDRESS names (default: 1)",
    )
    command.add_argument(
        "--in-flight",
        type=_whole,
        default=8,
        metavar="N",
        help="rows that a worker runs at once, with shared forwards; 1 gives the same bits as `generate` "
        "(default: %(default)s)",
    )
    command.add_argument("--retry-failed", action="store_true", help="make the rows again that have failed")
    command.add_argument("--fresh", action="store_true", help="make all rows again")
    command.add_argument("--out", type=Path, default=Path("out/batch"), metavar="DIR", help="default: %(default)s")


def _add_compare(commands: Any, shared: argparse.ArgumentParser) -> None:
    about = "run the same prompts and seeds under several caches, and measure each against no cache"
    command = commands.add_parser(
        "compare",
        help=about,
        description=f"{about.capitalize()}. Writes report.html, contact_sheet.png, results.json and a PNG of each "
        "image, and prints a table: transformer forwards computed (NFE), time, speedup, PSNR (mean ± standard "
        "deviation, 5th percentile), SSIM. It always runs without a cache, and with fewer steps, too. "
        "Images in the output directory that were made with the same settings are not made again.",
        parents=[shared],
        allow_abbrev=False,
    )
    command.set_defaults(module="compare", command="compare")
    command.add_argument(
        "--prompts",
        "--prompt",
        action="append",
        metavar="TEXT|FILE",
        help="a prompt, a file with one per line, or a set: @model (all prompts of the embedded model), @general, "
        "@edit; repeatable (default: six of @model)",
    )
    command.add_argument("--seeds", type=_seeds, default=[0, 1], metavar="N,N", help="default: 0,1")
    command.add_argument("--steps", type=_whole, default=50, metavar="N", help="default: %(default)s")
    command.add_argument(
        "--run",
        action="append",
        default=[],
        metavar="NAME=BACKEND:JSON",
        help="a cache to compare; repeatable; name and JSON may be left out (default: several that the model can have)",
    )
    command.add_argument(
        "--fewer-steps",
        action="append",
        type=_whole,
        metavar="N",
        help="plain sampling with N steps; repeatable (default: a half and a third)",
    )
    command.add_argument("--fresh", action="store_true", help="make all images again")
    command.add_argument("--out", type=Path, default=Path("out/compare"), metavar="DIR", help="default: %(default)s")


def _add_calibrate(commands: Any, shared: argparse.ArgumentParser) -> None:
    about = "fit the numbers of a cache method to a model"
    command = commands.add_parser(
        "calibrate",
        help=about,
        description=f"{about.capitalize()}. For tea_cache it fits a polynomial, and for mag_cache ratios, to full "
        "runs. For a schedule of velocity_cache it samples with one schedule after the other. For precision it "
        "quantises one group of layers after the other, and writes which are left as they are. The file is saved in "
        "the user's data directory, where the model finds it. With --out, give the file to the method's key "
        "(coefficients, mag_ratios, calibration), or put it into the model's directory as METHOD.json "
        "(velocity_cache.json for a schedule). Calibrate with the steps, size and scheduler that you will use.",
        parents=[shared],
        allow_abbrev=False,
    )
    command.set_defaults(module="calibrate", command="calibrate")
    command.add_argument(
        "method",
        type=lambda name: "schedule" if name == "velocity_cache" else name,
        choices=["tea_cache", "mag_cache", "schedule", "precision"],
        metavar="METHOD",
        help="tea_cache, mag_cache, schedule or precision; velocity_cache means schedule",
    )
    command.add_argument(
        "--prompts",
        "--prompt",
        action="append",
        metavar="TEXT|FILE",
        help="a prompt, a file with one per line, or a set: @model (all prompts of the embedded model), @general, "
        "@edit; repeatable (default: 24 of @model; for a schedule, 4 that benchmarks.quality does not compare on)",
    )
    command.add_argument("--seeds", type=_seeds, metavar="N,N", help="default: 0; for a schedule, 1000,1001")
    command.add_argument("--steps", type=_whole, metavar="N", help="denoising steps (default: the model's own)")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="default: in the user's data directory, where the model finds it"
    )
    schedule = command.add_argument_group("schedule")
    schedule.add_argument(
        "--budgets",
        type=_budgets,
        metavar="N,N",
        help="computed steps, a schedule for each (default: 64, 50, 34, 26, 20 and 16 percent of the steps)",
    )
    schedule.add_argument(
        "--held-out",
        action="append",
        metavar="TEXT|FILE",
        help="prompts to measure the schedules on, like --prompts (default: 8 others of @model; with --prompts, every "
        "fourth of them, which the search then leaves out); their seeds follow the largest of --seeds",
    )
    schedule.add_argument(
        "--tries", type=_whole, metavar="N", help="largest number of schedules to sample per budget (default: 30)"
    )
    schedule.add_argument("--batch", type=_whole, metavar="N", help="largest number of images in one call (default: 8)")
    schedule.add_argument("--fresh", action="store_true", help="discard the samples of an interrupted search")
    layers = command.add_argument_group("precision")
    layers.add_argument("--quantize", choices=["int8", "fp8", "mxfp8"], help="default: int8")
    layers.add_argument("--psnr", type=_decibels, metavar="N", help="wanted mean PSNR in dB (default: 40)")
    layers.add_argument("--min-width", type=_whole, metavar="N", help="narrower layers are left out (default: 512)")


def _add_explain(commands: Any, shared: argparse.ArgumentParser) -> None:
    about = "say what each preset would do for a model: steps, speed and PSNR to expect, and what that rests on"
    command = commands.add_parser(
        "explain",
        help=about,
        description=f"{about.capitalize()}. Loads no weights.",
        parents=[shared],
        allow_abbrev=False,
    )
    command.set_defaults(module="explain", command="explain")
    command.add_argument("--steps", type=_whole, metavar="N", help="denoising steps (default: the model's own)")
    _add_wish(command)


def _add_inspect(commands: Any, shared: argparse.ArgumentParser) -> None:
    about = "show where a model's blocks are, which of them are fused, and which caches work with it"
    command = commands.add_parser(
        "inspect",
        help=about,
        description=f"{about.capitalize()}. Runs two steps with each cache.",
        parents=[shared],
        allow_abbrev=False,
    )
    command.set_defaults(module="inspect", command="inspect")
    command.add_argument("--prompt", type=text_of, metavar="TEXT", help="default: one of the model's own, or 'a cat'")


def _add_wish(command: argparse.ArgumentParser) -> None:
    """Options that say what is wanted of the cache `auto`."""
    wish = command.add_mutually_exclusive_group()
    wish.add_argument(
        "--quality",
        choices=PRESETS,
        help="exact: nothing is skipped; high, balanced, fast: about a half, a third, a quarter of the steps are "
        "computed (default: balanced); see `omni explain`",
    )
    wish.add_argument("--speedup", type=_factor, metavar="N", help="so many times the speed, instead of --quality")
    wish.add_argument("--psnr", type=_decibels, metavar="N", help="so many dB to the full run, instead of --quality")


def _add_speed(command: argparse.ArgumentParser) -> None:
    """Options that say what makes the model faster."""
    _add_wish(command)
    command.add_argument(
        "--cache-backend",
        metavar="NAME",
        help="a method instead, see `omni backends`; none for no cache (default: $DIFFUSION_CACHE_BACKEND, else auto)",
    )
    command.add_argument("--cache-config", metavar="JSON", help='such as {"rel_l1_thresh": 0.2}')
    command.add_argument("--fuse", action="store_true", help="run transformer blocks fused")
    command.add_argument("--compile", choices=["regional"], help="compile each transformer block separately")
    command.add_argument(
        "--quantize", choices=["int8", "fp8", "mxfp8"], help="run wide linear layers of the blocks in 8 bits"
    )
    command.add_argument(
        "--min-width", type=_whole, metavar="N", help="with --quantize: narrower layers stay as they are (default: 512)"
    )
    command.add_argument(
        "--edge-steps",
        type=_pair,
        metavar="FIRST,LAST",
        help="with --quantize: so many of the first and last steps run with the layers' own weights (default: 0,0)",
    )


def _add_serve(commands: Any) -> None:
    about = "serve a model over HTTP: OpenAI's API of images and videos, and a page in the browser"
    command = commands.add_parser(
        "serve",
        help=about,
        description=f"{about.capitalize()}. Requests that overlap share forwards. SIGTERM lets requests finish, a "
        "second one does not. Logs are JSON lines on stderr. Needs the extra `serve`.",
        allow_abbrev=False,
    )
    command.set_defaults(module="serve", command="serve", quiet=True)
    _add_model(command)
    _add_speed(command)
    where = command.add_argument_group("server")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    where.add_argument("--port", type=_port, default=8000, metavar="N", help="0 for any free one (default: 8000)")
    where.add_argument("--name", help="what clients call the model (default: the last part of its own name)")
    where.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="clients must send it; repeat for more (default: $OMNI_API_KEY, which other users of this machine cannot "
        "see in the list of processes; else no key)",
    )
    where.add_argument(
        "--replicas",
        type=_replicas,
        metavar="N|MIN-MAX|auto",
        help="processes that have the model, on a GPU each if there are any, on this machine or on the Ray cluster "
        "that $RAY_ADDRESS names. A range: as many as the requests need; auto: from 1 to the number of GPUs. Limits of "
        "pictures at once are for each. Needs the extra `ray` (default: the model is in the server's own process)",
    )
    where.add_argument("--no-page", action="store_true", help="show no page at /")
    where.add_argument(
        "--drain-seconds",
        type=_seconds,
        metavar="N",
        help="how long SIGTERM lets requests finish (default: 30)",
    )
    where.add_argument("--debug", action="store_true", help="write tracebacks to stderr")
    limits = command.add_argument_group("limits")
    for name, default, what in (
        ("max-batch", 8, "pictures in one forward"),
        ("in-flight", 16, "pictures that are computed at once"),
        ("queue", 256, "pictures that wait; further requests get 429"),
        ("max-n", 10, "pictures in one request"),
        ("max-steps", 100, "denoising steps"),
        ("max-side", 2048, "pixels of a side"),
        ("max-pixels", 2048 * 2048, "pixels of a picture"),
        ("max-frames", 257, "frames of a video"),
        ("max-prompt", 4000, "characters of a prompt"),
        ("max-body", 32 << 20, "bytes of a request"),
        ("max-held", 1 << 30, "bytes of bodies and reference pictures of all requests, those that wait included"),
        ("max-connections", 1024, "connections, within three quarters of the process's file descriptors"),
    ):
        limits.add_argument(f"--{name}", type=_whole, metavar="N", help=f"most {what} (default: {default})")
    limits.add_argument(
        "--memory",
        type=_gibibytes,
        metavar="GIB",
        help="most memory that the pictures in flight hold, in GiB; others wait (default: no limit)",
    )
    for name, seconds, what in (
        ("deadline", 600, "that a request may take"),
        ("header-seconds", 10, "until the head of a request must have arrived"),
        ("body-seconds", 60, "until its body must have arrived"),
        ("write-seconds", 60, "after which a client that reads nothing of its answer is cut off"),
    ):
        limits.add_argument(f"--{name}", type=_seconds, metavar="N", help=f"seconds {what} (default: {seconds})")


def text_of(argument: str) -> str:
    """Read an argument as UTF-8, even if the environment's encoding lacks some of its characters."""
    try:
        return argument if argument.isprintable() else os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"must be UTF-8, not {argument!r}") from None


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a port from 0 to 65535, not {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, not {text!r}")
    return seconds


def _gibibytes(text: str) -> int:
    size = _seconds(text) * 2**30
    if size < 1:
        raise argparse.ArgumentTypeError(f"must be a number of GiB above 0, not {text!r}")
    return int(size)


def _above(text: str, least: float, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be {what} above {least:g}, not {text!r}")
    return number


def _factor(text: str) -> float:
    return _above(text, 1.0, "a factor")


def _decibels(text: str) -> float:
    return _above(text, 0.0, "a number of dB")


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate <= 1000:
        raise argparse.ArgumentTypeError(f"must be a number above 0, of 1000 at most, not {text!r}")
    return rate


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, not {text!r}")
    return int(text)


def _seeds(text: str) -> list[int]:
    return [_seed(part.strip()) for part in text.split(",")]


def _budgets(text: str) -> list[int]:
    return [_whole(part.strip()) for part in text.split(",")]


def _degrees(text: str) -> dict[str, int]:
    try:
        return degrees.parse(text)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("parallel: ")) from None


def _replicas(text: str) -> tuple[int, int | None]:
    """The least and the most replicas; None: the number of GPUs."""
    if text == "auto":
        return 1, None
    match = re.fullmatch(r"([1-9]\d{0,3})(?:-([1-9]\d{0,3}))?", text, re.ASCII)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise argparse.ArgumentTypeError(f"must be a number, a range like 1-4, or auto, not {text!r}")
    return int(match[1]), int(match[2] or match[1])


def _pair(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]+),([0-9]+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be two numbers of steps like 2,2, not {text!r}")
    return int(match[1]), int(match[2])


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:[x×](\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a size like 512 or 768x512 (width x height), not {text!r}")
    return int(match[1]), int(match[2] or match[1])


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be KEY=JSON, not {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value  # plain text needs no quotes
