"""vLLM-Omni's environment: a folder of its own, made once, and the runs in it."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
#: Installed first, with its dependencies; on a machine without a GPU, its CPU build is enough.
TORCH = "torch==2.13.0"


def requirements() -> dict[str, str]:
    """Package → version, of all but torch."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def newest_cache_dit() -> str:
    """The version of cache-dit that this project is compared with; vLLM-Omni pins an older one."""
    return importlib.metadata.version("cache-dit")


def made(directory: Path) -> Path:
    """The environment's Python; the environment is made if it is not there, or was made from other requirements."""
    python = directory / "bin" / "python"
    stamp = directory / ".made-from"
    wanted = f"{TORCH} {newest_cache_dit()}\n{REQUIREMENTS.read_text(encoding='utf-8')}"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making {directory}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, TORCH], check=True)
    subprocess.run([*install, "--no-deps", "-r", REQUIREMENTS], check=True)
    other = f"cache_dit=={newest_cache_dit()}"
    subprocess.run([*install, "--no-deps", "--upgrade", "--target", _beside(directory), other], check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def _beside(directory: Path) -> Path:
    """The folder of the newest cache-dit, which is not installed in the environment, but beside it."""
    return directory / f"cache-dit-{newest_cache_dit()}"


def run(directory: Path, weights: Path, model: str, backends: list[str], newest: bool) -> None:
    """Run their side on a model. Its output goes to a file beside the weights.

    Args:
        directory: the environment.
        weights: the folder that `ours.py` has written to.
        backends: the cache backends to run; empty for all.
        newest: whether with the newest cache-dit instead of the pinned one.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
    paths = [str(_beside(directory)), str(ROOT)] if newest else [str(ROOT)]
    command = [str(made(directory)), "-m", f"{__package__}.theirs", str(weights), model, *backends]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    log = weights / "theirs.log"
    with open(log, "w", encoding="utf-8") as file:
        code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise RuntimeError(f"vLLM-Omni's side failed on {model} ({log}):\n{log.read_text(encoding='utf-8')[-3000:]}")
