"""The plug-in in vLLM-Omni itself, beside our caches on diffusers' pipelines. No test of the gate needs vLLM-Omni.

    VLLM_OMNI_PYTHON=out/vllm-omni/bin/python python -m pytest -n0 --all tests/vllm_omni_plugin/test_real.py

`python -m benchmarks.against_vllm_omni` makes such an environment.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch

import omni_kernels
import omni_runtime

ROOT = Path(omni_kernels.__file__).parents[1]
PYTHON = Path(os.environ.get("VLLM_OMNI_PYTHON", ROOT / "out" / "vllm-omni" / "bin" / "python"))
EMBEDDED = Path(omni_runtime.__file__).parent / "embedded" / "emoji-qwen-image"
SETTINGS = (
    ("velocity_cache", {"budget": 8}),
    ("velocity_cache", {"schedule": "qwen-image-17"}),
    ("velocity_cache", {"speedup": 2.5, "corrector_order": 0}),
    ("auto", {"quality": "high"}),
)
STEPS = 20


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with this distribution's entry points, as an installation writes them."""
    import tomllib

    folder = tmp_path_factory.mktemp("site")
    about = folder / "omni_kernels-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: omni-kernels\nVersion: 0\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (about / "entry_points.txt").write_text("\n".join(lines))
    return folder


@pytest.mark.long
@pytest.mark.skipif(not PYTHON.is_file(), reason="VLLM_OMNI_PYTHON names no Python with vLLM-Omni")
@pytest.mark.parametrize("model", ["tiny Qwen-Image", "tiny Z-Image", "tiny FLUX"])
def test_steps_and_latents_are_those_of_our_caches_on_diffusers(model, installed, tmp_path):
    ours = pytest.importorskip("benchmarks.against_vllm_omni.ours").Ours(model, tmp_path)
    embedded = str(EMBEDDED) if "Qwen" in model else ""
    paths = os.pathsep.join(map(str, (installed, ROOT)))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "VLLM_PLUGINS": "omni_kernels"}
    command = [PYTHON, Path(__file__).with_name("real.py"), tmp_path, model, embedded]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    theirs = torch.load(tmp_path / "plugin.pt", weights_only=True)

    for guided in (False, True):
        plain = theirs["plain", guided]
        calls = plain["calls"] // STEPS
        close(ours.generate(STEPS, guided), plain["latents"])
        assert torch.equal(theirs["again", guided]["latents"], plain["latents"]), "all is undone"
        fused = theirs["fused_blocks", guided]
        assert fused["fused"] >= 2 or "FLUX" in model
        assert torch.equal(fused["latents"], plain["latents"]) == (not fused["fused"]), "the fused blocks have run"
        close(fused["latents"], plain["latents"])
        for cache, config in SETTINGS:
            with omni_kernels.patched(ours.pipe, cache, config) as handle:
                latents = ours.generate(STEPS, guided)
                computed = next(iter(handle.report.branches.values())).computed
            found = theirs[str(config), guided]
            assert found["computed"][0] == computed
            assert found["calls"] == calls * len(computed) < plain["calls"]
            close(latents, found["latents"])
            assert (latents - plain["latents"]).abs().max() > 1e-3, "a skipped step shows"
        both = theirs["both", guided]
        assert both["fused"] == fused["fused"]
        close(both["latents"], theirs[str(SETTINGS[0][1]), guided]["latents"])
    if embedded:
        skipped, notes = theirs["adapter"]
        assert skipped > 20
        assert "calibrated" in notes[0], "the model's own calibration is found"


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
