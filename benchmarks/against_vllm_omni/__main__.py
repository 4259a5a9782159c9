"""vLLM-Omni's cache backends beside ours, on the same weights, embeddings, latents and noise levels, on the CPU.

    python -m benchmarks.against_vllm_omni   # about 20 minutes; writes benchmarks/results/against-vllm-omni.json

vLLM-Omni runs in an environment of its own, which is made from `requirements.txt` the first time (1.5 GB). It runs
its own pipelines' `forward`, its own transformers and its own cache backends (`theirs.py` says what is stood in for).
Each request is made without a cache, and at each setting of `cases.py`. `comparison.py` compares the computed steps
and the latents, and names the reason for each difference. The command exits with 1 if one has no reason.

cache_dit runs twice: with the cache-dit that vLLM-Omni pins, and with the one that this project uses.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.against_vllm_omni import comparison, environment
from benchmarks.against_vllm_omni.cases import MODELS, calls_of, settings, steps_of
from benchmarks.against_vllm_omni.comparison import Pair, compared
from benchmarks.against_vllm_omni.ours import Ours
from benchmarks.results import RESULTS
from omni_kernels.validation.record import machine, write

COMMAND = "python -m benchmarks.against_vllm_omni"
PACKAGES = ("vllm-omni", "vllm", "cache_dit", "diffusers", "transformers")


def pairs_of(model: str, directory: Path, folder: Path) -> list[Pair]:
    """All requests of a model on both sides.

    Args:
        directory: vLLM-Omni's environment.
        folder: for weights, inputs and results.
    """
    ours = Ours(model, folder)
    here: dict[tuple[str, int, bool], dict[str, Any]] = {}
    made = []
    for newest, backends in ((False, []), (True, ["cache_dit"])):
        environment.run(directory, folder, model, backends, newest)
        found = torch.load(folder / "theirs.pt", weights_only=True)
        for guided in (False, True):
            for steps in steps_of(model):
                for setting in (None, *settings(steps, calls_of(model, guided))):
                    key = (str(setting), steps, guided)
                    if key not in found["requests"] or (newest and setting is None):
                        continue
                    if key not in here:
                        here[key] = ours.run(setting, steps, guided)
                    theirs = found["requests"][key]
                    made.append(compared(model, guided, steps, setting, found["cache-dit"], theirs, here[key]))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument("--environment", type=Path, default=Path("out/vllm-omni"), help="vLLM-Omni's environment")
    parser.add_argument("--model", action="append", choices=MODELS, help="only this one; nothing is written")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.name}/against-vllm-omni.json")
    parser.add_argument("--judge", action="store_true", help="run nothing: judge the requests in the file again")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    file = options.out or RESULTS / "against-vllm-omni.json"
    if options.judge:
        document = json.loads(file.read_text(encoding="utf-8"))
        return _write(file, document, comparison.read(document["requests"]))
    pairs: list[Pair] = []
    for model in options.model or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            pairs += pairs_of(model, options.environment.resolve(), Path(folder))
        counted = Counter(comparison.verdict(pair)[0] for pair in comparison.judged(pairs) if pair.model == model)
        print(model, dict(counted), flush=True)
    document = {
        "command": COMMAND,
        "machine": machine(torch.device("cpu")),
        "their_versions": {name: environment.requirements()[name] for name in PACKAGES} | {"torch": environment.TORCH},
        "tolerance": comparison.TOLERANCE,
    }
    return _write(file if options.out or not options.model else None, document, comparison.judged(pairs))


def _write(file: Path | None, document: Mapping[str, Any], pairs: Sequence[Pair]) -> int:
    """Write the document with the tables of the pairs; return the exit code."""
    made = comparison.summary(pairs) | {"reasons": comparison.reasons(pairs)}
    made["requests"] = [comparison.row(pair) for pair in pairs]
    if file is not None:
        write(file, {**document, **made})
    unexplained = [row for row in made["requests"] if row["verdict"] == comparison.UNEXPLAINED]
    for row in unexplained:
        print(f"no reason is known: {row}", file=sys.stderr)
    return int(bool(unexplained))


if __name__ == "__main__":
    sys.exit(main())
