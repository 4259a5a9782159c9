"""benchmarks.bench_pipeline: everything but the numbers."""

import json

import pytest
import torch

from benchmarks import bench_pipeline
from benchmarks.bench_pipeline import forward_flops, matrix_rate, pipeline, runs


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline") / "pipeline.json"
    assert bench_pipeline.main(["--small", "--steps", "10", "--rounds", "1", "--out", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_run_with_and_without_fused_blocks(written):
    quantized = [name for name in runs(10) if name.startswith(("no cache", "velocity"))]
    assert [row["run"] for row in written["rows"]] == [
        *runs(10),
        *(f"{name}, fused" for name in runs(10)),
        *(f"{name}, fused, {dtype}" for dtype in ("int8", "fp8", "mxfp8") for name in quantized),
    ]
    for row in written["rows"]:
        assert row["seconds"] > 0
        assert row["computed_ms"] > 0
        assert 0 < row["of_roof"] < 1
        assert (row["skipped_ms"] is None) == (row["computed"] == row["steps"])


def test_runs_compute_the_steps_that_they_are_told_to(written):
    computed = {row["run"]: row["computed"] for row in written["rows"]}
    assert computed["no cache"] == 10
    assert computed["tea_cache"] == computed["velocity_cache 5"] == computed["cache_dit"] == 5
    assert computed["velocity_cache 3"] == 3
    assert {run.partition(",")[0]: count for run, count in computed.items() if ", fused" in run} == {
        run: count for run, count in computed.items() if ", fused" not in run
    }


def test_of_50_steps_as_the_published_times_imply():
    """10.47 s of 20.0 s are 26 of 50 steps, and 10.8 s are 27; 25 and 17 are the schedules that are asked for."""
    assert sum(bench_pipeline.spread(50, 10.47)) == 26
    assert sum(runs(50)["cache_dit"][1]["steps_computation_mask"]) == 27
    assert {"velocity_cache 25", "velocity_cache 17"} < set(runs(50))
    assert bench_pipeline.LIMIT_RUN.partition(",")[0] in runs(50)


def test_tea_cache_computes_26_of_50():
    pipe = pipeline(torch.device("cpu"), torch.float32, small=True, layers=1)
    assert bench_pipeline.measure("tea_cache", pipe, 64, 50, False, None, floor=1.0, rounds=1).computed == 26


def row(run, seconds, computed=25, steps=50):
    return bench_pipeline.Row(run, True, False, seconds, steps, computed, 100.0, 1.0, 0.5)


@pytest.mark.parametrize(("seconds", "met"), [(5.99, True), (6.0, False), (11.0, False)])
def test_goal(seconds, met):
    fabricated = [row("no cache", 1.0, 50), row("velocity_cache 25", 1.0), row("velocity_cache 25, fused", seconds)]
    goal = bench_pipeline.goal(fabricated)
    assert goal.met == met
    assert str(goal).startswith("reached" if met else "MISSED")
    assert f"{seconds:.2f} s, under 6 s" in str(goal)
    assert "20.0 s without a cache, and 10.5 s with one" in str(goal)
    assert bench_pipeline.goal(fabricated[:2]) is None
    assert bench_pipeline.goal([row("velocity_cache 25, fused", 1.0, 25, steps=51)]) is None


def test_the_goal_is_of_25_computed_steps():
    with pytest.raises(AssertionError, match="has computed 26 steps"):
        bench_pipeline.goal([row("velocity_cache 25, fused", 1.0, 26)])


def test_full_size_shapes(monkeypatch):
    """The released transformer and VAE (Qwen/Qwen-Image), and embeddings that fit; nothing is allocated."""
    with torch.device("meta"):
        pipe = pipeline(torch.device("meta"), torch.bfloat16, small=False, layers=None)
    config = pipe.transformer.config
    assert (config.num_layers, config.num_attention_heads, config.attention_head_dim) == (60, 24, 128)
    assert (config.in_channels, config.out_channels, config.joint_attention_dim) == (64, 16, 3584)
    assert len(pipe.transformer.transformer_blocks) == 60
    assert {(p.dtype, p.device.type) for p in pipe.transformer.parameters()} == {(torch.bfloat16, "meta")}
    vae = pipe.vae.config
    assert (vae.base_dim, vae.z_dim, tuple(vae.dim_mult), vae.num_res_blocks) == (96, 16, (1, 2, 4, 4), 2)
    assert pipe.vae_scale_factor == 8
    monkeypatch.setattr(torch, "Generator", lambda device: torch._C.Generator())  # there is none of the meta device
    monkeypatch.setattr(torch, "randn", lambda *shape, generator, **how: torch.empty(shape, **how))
    monkeypatch.setattr(bench_pipeline, "inputs", lambda *given: {"encoder_hidden_states": torch.empty(1, 128, 3584)})
    asked = bench_pipeline.request(pipe, 1024, 50)
    assert asked["prompt_embeds"].shape == asked["negative_prompt_embeds"].shape == (1, 128, 3584)
    assert asked["prompt_embeds_mask"].shape == (1, 128)
    assert (asked["height"], asked["width"], asked["num_inference_steps"]) == (1024, 1024, 50)


def test_layers_are_as_asked(tmp_path):
    path = tmp_path / "pipeline.json"
    given = ["--small", "--layers", "1", "--steps", "4", "--rounds", "1", "--runs", "no cache", "--out", str(path)]
    assert bench_pipeline.main(given) == 0
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["layers"] == 1
    assert [one["run"] for one in written["rows"]] == [
        "no cache",
        "no cache, fused",
        "no cache, fused, int8",
        "no cache, fused, fp8",
        "no cache, fused, mxfp8",
    ]
    assert written["goal"] is None


def test_operations_are_those_of_the_gemms_and_attention():
    pipe = pipeline(torch.device("cpu"), torch.float32, small=True, layers=1)
    one = forward_flops(pipe, 64)
    two = forward_flops(pipeline(torch.device("cpu"), torch.float32, small=True, layers=2), 64)
    D, image, text = 64, 16, 16
    tokens = image + text
    # q, k, v, out and an MLP of 4 D: 12 D² a token; modulation: 6 D² a stream; scores and values: 2 tokens² D.
    block = 2 * (12 * D * D * tokens + 2 * 6 * D * D + 2 * tokens * tokens * D)
    assert two - one == pytest.approx(block, rel=0.01)


def test_rate_is_positive():
    assert matrix_rate(torch.device("cpu"), torch.float32) > 1e8


def test_unknown_run_is_named_and_the_target_needs_the_full_size(capsys):
    with pytest.raises(SystemExit):
        bench_pipeline.main(["--small", "--runs", "velocity"])
    assert "unknown run 'velocity'" in capsys.readouterr().err
    arguments = ["--small", "--steps", "4", "--rounds", "1", "--runs", "velocity_cache 2", "--check"]
    assert bench_pipeline.main(arguments) == 1
