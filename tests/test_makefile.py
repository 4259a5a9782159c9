"""`make gpu`: what runs after what, and its exit code. In a directory's fake environment, nothing is measured."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")

ROOT = Path(__file__).parents[1]
GPU, BLOCK, PIPELINE = "benchmarks.gpu", "benchmarks.bench_block", "benchmarks.bench_pipeline"


def made(directory, codes):
    """What `make gpu` runs, where these modules exit with these codes, and whether it fails."""
    (directory / "bin").mkdir()
    python = directory / "bin" / "python"
    exits = "".join(f'[ "$2" = {module} ] && exit {code}\n' for module, code in codes.items())
    python.write_text(f'#!/bin/sh\necho "$2 $3" >> {directory}/ran\n{exits}exit 0\n')
    python.chmod(0o755)
    (directory / ".installed").touch()
    done = subprocess.run(["make", "gpu", f"VENV={directory}"], cwd=ROOT, capture_output=True, text=True, check=False)
    return (directory / "ran").read_text().splitlines(), done.returncode != 0, done.stderr


ALL = [f"{GPU} ", f"{BLOCK} --check", f"{PIPELINE} --check"]


@pytest.mark.parametrize(
    ("codes", "ran", "fails"),
    [
        ({}, ALL, False),
        ({GPU: 1}, ALL, True),
        ({BLOCK: 1}, ALL, True),
        ({PIPELINE: 1}, ALL, True),
        ({GPU: 2}, ALL[:1], True),  # a kernel test fails: nothing is timed on it
        ({GPU: 3}, ALL[:1], True),  # no GPU
    ],
)
def test_a_missed_target_keeps_nothing_from_being_measured(tmp_path, codes, ran, fails):
    assert made(tmp_path, codes)[:2] == (ran, fails)


@pytest.mark.parametrize("code", [1, 2, 3])
def test_the_exit_code_is_the_gpu_runs(tmp_path, code):
    assert f"Error {code}" in made(tmp_path, {GPU: code})[2]
