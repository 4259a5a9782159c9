"""Whole pipelines on an NPU: what they make and decide is the CPU's, and what the host reads is known step by step."""

import itertools

import pytest
import simulated_npu
import tiny
import torch
from pairs import in_turn

import omni_kernels
from omni_runtime import Omni
from omni_runtime.cache.history import inner_products
from omni_runtime.generation.loading import resolve_device, resolve_dtype

PIPELINES = ["qwen_image", "qwen_image_edit", "z_image", "flux"]
STEPS = 6
#: Each skips something within these steps.
CONFIGS = {
    "tea_cache": {"rel_l1_thresh": 0.1, "coefficients": [0, 0, 0, 1, 0]},
    "mag_cache": {"threshold": 0.5, "retention_ratio": 0.0, "mag_ratios": [1.0, 1.02]},
    "sea_cache": {"threshold": 0.8},
    "first_block_cache": {"threshold": 0.3},
    "cache_dit": {"residual_diff_threshold": 0.4, "max_warmup_steps": 2},
    "velocity_cache": {"speedup": 2.5},
    "easy_cache": {"thresh": 0.4, "ret_steps": 2},
}
#: Those that measure nothing, and so read nothing of the device to decide.
BY_THE_STEP = {"velocity_cache", "mag_cache"}
ATTENTION = ("aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product")


def made(pipe, backend=None, **arguments):
    """(latents, the handle, how many operators had run at the end of each step, what ran)."""
    ends = []

    def end(pipe, step, timestep, tensors):
        ends.append(len(calls))
        return {}

    fuse = arguments.pop("fuse", False)
    with omni_kernels.patched(pipe, backend, CONFIGS.get(backend), fuse=fuse) as handle, simulated_npu.log() as calls:
        latents = tiny.generate(
            pipe, output_type="latent", num_inference_steps=STEPS, callback_on_step_end=end, **arguments
        )
        steps = [calls[start:stop] for start, stop in itertools.pairwise(ends)]
        return latents, handle.report, [simulated_npu.Log(step) for step in steps], handle


def decisions(report):
    return {name: [(d.computed, d.reason) for d in branch.decisions] for name, branch in report.branches.items()}


def off(found, expected):
    return float((found.cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("name", "backend"), in_turn(PIPELINES, CONFIGS))
def test_every_cache_decides_and_makes_what_it_does_on_the_cpu(name, backend):
    expected, report, _, _ = made(tiny.PIPELINES[name](layers=2), backend)
    pipe = tiny.PIPELINES[name](layers=2).to("npu")
    latents, on_npu, steps, _ = made(pipe, backend)
    assert latents.device.type == "npu"
    assert off(latents, expected) < 1e-4
    assert decisions(on_npu) == decisions(report)
    assert on_npu.forwards_saved > 0
    for step, calls in enumerate(steps, start=1):
        now = [branch.decisions[step] for branch in on_npu.branches.values()]
        # A decision is two sums in fp32 per sample, once for each branch that measures; nothing else is read.
        read = [call.to_host for call in calls.reads]
        assert len(read) <= (0 if backend in BY_THE_STEP else len(now)), calls.reads
        assert all(size <= 2 * 2 * 4 for size in read)
        if backend == "velocity_cache" and not now[0].computed:
            assert not [call for call in calls.names if call.startswith(ATTENTION)]


@pytest.mark.parametrize(("name", "version"), in_turn(PIPELINES, ["2.13.0", None]))
def test_fused_blocks_make_what_they_do_on_the_cpu(name, version):
    expected = made(tiny.PIPELINES[name](layers=2))[0]
    pipe = tiny.PIPELINES[name](layers=2).to("npu")
    with simulated_npu.fused(version):
        latents, _, steps, handle = made(pipe, fuse=True)
    assert handle.fused.replaced
    assert off(latents, expected) < 1e-4
    ran = {call for step in steps for call in step.names}
    assert {"omni_kernels::qk_norm_rope", "omni_kernels::gate_residual_norm"} <= ran
    # Z-Image's samples have angles of their own, which the operator does not take in a batch.
    assert ("npu::npu_rotary_mul" in ran) is (version is not None and name != "z_image")
    assert ("npu::npu_rms_norm" in ran) is (version is not None)
    assert not [call for step in steps for call in step.reads]


def test_omni_runs_on_an_npu_from_the_prompt_to_the_picture(saved):
    with Omni(str(saved["qwen_image"]), dtype="float32", device="cpu") as omni:
        (expected,) = omni.generate("a cat", num_inference_steps=4, height=64, width=64, seed=3, output_type="np")
    told = []
    with Omni(str(saved["qwen_image"]), cache_backend="velocity_cache", cache_config={"budget": 3}, dtype="float32",
              device="npu") as omni:  # fmt: skip
        (result,) = omni.generate(
            "a cat", num_inference_steps=4, height=64, width=64, seed=3, output_type="np", on_step=told.append
        )
        assert omni.pipe.transformer.device == torch.device("npu", 0)
    assert result.settings["device"] == "npu"
    assert result.images.shape == expected.images.shape
    assert [event.step for event in told] == [0, 1, 2, 3]
    assert result.cache.forwards_saved > 0
    assert len(result.timings.steps) == 4
    assert result.timings.total >= sum(result.timings.steps) > 0
    assert result.peak_memory > 0
    assert expected.peak_memory is None


def test_omni_makes_the_cpus_picture(saved):
    pictures = []
    for device in ("cpu", "npu"):
        with Omni(str(saved["z_image"]), dtype="float32", device=device) as omni:
            (result,) = omni.generate("a cat", num_inference_steps=3, height=64, width=64, seed=3, output_type="np")
        pictures.append(torch.from_numpy(result.images))
    assert (pictures[0] - pictures[1]).abs().max() < 1e-3


def test_the_accelerator_that_is_there_is_taken():
    assert resolve_device("auto") == torch.device("npu")
    assert resolve_device("npu:0") == torch.device("npu", 0)
    assert resolve_dtype("auto", torch.device("npu")) is torch.bfloat16
    with pytest.raises(ValueError, match="'npu:1' is not available here; available: cpu, npu:0"):
        resolve_device("npu:1")


def test_without_fp64_on_the_device_fits_are_summed_in_fp32():
    snapshots = list(torch.randn(3, 2, 4, 8))
    with simulated_npu.log() as calls:
        found = inner_products([t.to("npu") for t in snapshots])
    assert [call.name for call in calls.reads] == ["aten::_to_copy"]
    torch.testing.assert_close(
        torch.from_numpy(found), torch.from_numpy(inner_products(snapshots)), rtol=1e-5, atol=1e-5
    )
