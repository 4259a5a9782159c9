"""benchmarks.bench_block and the models at their real size: everything but the numbers."""

import contextlib
import dataclasses
import json
from types import SimpleNamespace

import diffusers
import pytest
import torch
from accelerate import init_empty_weights

from benchmarks import bench_block
from benchmarks.bench_block import Row
from benchmarks.full_size import MODELS, SMALL_SIDE, build, inputs
from omni_kernels.device import Device, pretend
from omni_kernels.patching import rules

CPU = torch.device("cpu")
AROUND = 34  # operators of Qwen-Image's forward outside its blocks


def row(provider, us, **changes):
    made = Row("qwen-image", "1024²", "forward", provider, us, 1, None)
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("name", MODELS)
def test_small_models_run_and_are_the_same_each_time(name):
    results = []
    for _ in range(2):
        transformer = build(MODELS[name], torch.device("cpu"), torch.float32, small=True)
        with torch.no_grad():
            (made,) = transformer(**inputs(MODELS[name], transformer, SMALL_SIDE, torch.float32))
        results.append(torch.stack(made) if isinstance(made, list) else made)
    assert torch.isfinite(results[0]).all()
    assert results[0].std() > 0.01
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen-image", 20.4),
        ("qwen-image-2.1", 7.1),
        ("z-image", 6.15),
        ("flux", 11.9),
        ("flux-2", 32.2),
        ("wan", 14.3),
        ("hunyuan-video", 12.8),
        ("ltx", 1.92),
    ],
)
def test_full_size_is_the_released_models(name, billions):
    """As the models' cards have it, in billions."""
    with init_empty_weights():
        transformer = getattr(diffusers, MODELS[name].transformer)(**MODELS[name].config)
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)


def test_layers_and_dtypes_are_as_asked():
    transformer = build(MODELS["wan"], torch.device("cpu"), torch.bfloat16, small=True, layers=1)
    assert len(transformer.blocks) == 1
    assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert transformer.blocks[0].scale_shift_table.dtype == torch.float32, "diffusers keeps it in fp32"


def test_everything_is_measured_and_written(tmp_path):
    path = tmp_path / "blocks.json"
    assert bench_block.main(["--small", "--compiler", "eager", "--out", str(path)]) == 0
    written = json.loads(path.read_text(encoding="utf-8"))
    parts = len(MODELS) * 2 + 3  # a block and a forward each, and the other block of FLUX, FLUX.2 and HunyuanVideo
    assert len(written["rows"]) == parts * len(bench_block.providers_on(torch.device("cpu")))
    for one in written["rows"]:
        assert one["us"] > 0
        if "quantize" in bench_block.PROVIDERS[one["provider"]]:
            assert 0 < one["error"] < 0.2
        else:
            assert one["error"] is None or one["error"] < 1e-5
    operators = {(r["model"], r["part"], r["provider"]): r["operators"] for r in written["rows"]}
    for model in MODELS:
        assert operators[model, "forward", "fused"] < operators[model, "forward", "eager"]
        assert operators[model, "forward", "compiled"] is None
    assert operators["qwen-image", "QwenImageTransformerBlock", "fused"] == 27, "as in tests/patching/test_traffic.py"
    assert written["targets"] == [], "there are none for small models"


def test_nothing_is_timed_on_a_wrong_block(monkeypatch):
    right = rules.RULES["QwenImageTransformerBlock"]

    def wrong(block, *args, **kwargs):
        encoder, hidden = right.forward(block, *args, **kwargs)
        return encoder, hidden * 1.001

    monkeypatch.setitem(rules.RULES, "QwenImageTransformerBlock", dataclasses.replace(right, forward=wrong))
    with pytest.raises(AssertionError, match=r"qwen-image QwenImageTransformerBlock, fused: off by"):
        bench_block.main(["--small", "--compiler", "eager", "--models", "qwen-image"])


def test_a_block_that_is_not_fused_is_an_error(monkeypatch):
    right = rules.RULES["QwenImageTransformerBlock"]
    monkeypatch.setitem(
        rules.RULES, "QwenImageTransformerBlock", dataclasses.replace(right, unfit=lambda block: "not today")
    )
    with pytest.raises(AssertionError, match=r"fused: not all blocks are fused: .*not today"):
        bench_block.main(["--small", "--compiler", "eager", "--models", "qwen-image"])


def test_graphs_are_measured_on_a_gpu_alone():
    with pretend("cuda", Device("nvidia", "sm_90", "H200")):
        assert bench_block.providers_on(torch.device("cuda")) == list(bench_block.PROVIDERS)
    with pretend("cuda", Device("nvidia", "sm_80", "A100")):
        left_out = set(bench_block.PROVIDERS) - set(bench_block.providers_on(torch.device("cuda")))
    assert left_out == {"fused, fp8"}
    assert set(bench_block.PROVIDERS) - set(bench_block.providers_on(torch.device("cpu"))) == {"fused, reduce-overhead"}


@pytest.mark.parametrize(
    ("us", "met"),
    [
        ((115.0, 100.0, 100.0, 90.0), [True, True, True, True]),
        ((115.0, 100.0, 101.0, 90.0), [False, True, True, True]),
        ((120.0, 80.0, 100.0, 90.0), [True, True, False, True]),
        ((120.0, 95.0, 94.0, 96.0), [True, True, False, True]),
    ],
)
def test_targets(us, met):
    rows = [row(provider, one) for provider, one in zip(bench_block.PROVIDERS, us, strict=False)]
    found = bench_block.targets(rows)
    assert [one.met for one in found] == met
    assert [one.what for one in found if one.least is None] == ["fused, against compiled"]
    assert [str(one).startswith("MISSED") for one in found] == [not one for one in met]


def test_a_wrong_forward_is_not_timed(monkeypatch):
    """Of blocks each of which is right."""
    right = bench_block.provided

    @contextlib.contextmanager
    def with_a_wrong_end(transformer, provider, compiler):
        with right(transformer, provider, compiler):
            wrong = transformer.proj_out.register_forward_hook(lambda module, args, output: output * 1.001)
            try:
                yield
            finally:
                wrong.remove()

    monkeypatch.setattr(
        bench_block,
        "provided",
        lambda transformer, provider, compiler: (with_a_wrong_end if provider == "fused" else right)(
            transformer, provider, compiler
        ),
    )
    monkeypatch.setattr(bench_block, "seconds_of", lambda call, device: 1.0)
    with pytest.raises(AssertionError, match=r"qwen-image forward, fused: off by 0.001 from eager"):
        bench_block.measure("qwen-image", MODELS["qwen-image"], "64²", SMALL_SIDE, small(), CPU, "eager")


def small(dtype=torch.float32):
    return build(MODELS["qwen-image"], CPU, dtype, small=True)


@pytest.mark.parametrize(("model", "sides"), [(name, model.sides) for name, model in MODELS.items()])
def test_sizes(model, sides):
    assert [side for _, side in sorted(sides.items(), key=lambda one: one[1])] == [512, 1024]


@pytest.mark.parametrize("name", ["qwen-image-edit", "qwen-image-edit-2511"])
def test_an_edit_has_the_references_tokens_too(name):
    transformer = build(MODELS[name], torch.device("meta"), torch.bfloat16, layers=1)
    given = inputs(MODELS[name], transformer, 1024, torch.bfloat16)
    assert given["hidden_states"].shape == (1, 8192, 64)
    assert transformer.zero_cond_t == (name == "qwen-image-edit-2511")


def test_launches_are_what_the_host_called(monkeypatch):
    names = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync"]
    others = [
        "cudaDeviceSynchronize",
        "aten::mm",
        "void gemm<…>(…)",
        "Memcpy DtoD (Device -> Device)",
        "cudaEventRecord",
    ]
    called = []

    class Profile:
        def __init__(self, activities):
            assert torch.profiler.ProfilerActivity.CPU in activities

        def __enter__(self):
            return self

        def __exit__(self, *_):
            assert called == ["before", "call", "after"]

        def events(self):
            return [SimpleNamespace(name=name) for name in [*names, *others]]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(bench_block, "synchronize", lambda device: called.append("after" if called else "before"))
    assert bench_block.launches_of(lambda: called.append("call"), torch.device("cuda")) == len(names)
    assert bench_block.launches_of(lambda: pytest.fail("called"), CPU) is None


def test_a_full_size_forward_is_counted_without_a_device(capsys):
    """90 of a block of diffusers' and 25 of a fused one, and what is around them; the first fused one has 2 more."""
    assert bench_block.main(["--count", "--models", "qwen-image"]) == 0
    *_, eager, fused = capsys.readouterr().out.splitlines()[-1].split()
    assert (int(eager), int(fused)) == (60 * 90 + AROUND, 60 * 25 + 2 + AROUND)
    # One layer less is so much less.
    one, two = (bench_block.counted("qwen-image", MODELS["qwen-image"], layers) for layers in (1, 2))
    assert two.eager - one.eager == 90


def test_check_fails_where_nothing_was_measured_that_has_a_target():
    arguments = ["--small", "--compiler", "eager", "--models", "qwen-image", "--check"]
    assert bench_block.main(arguments) == 1


def test_unknown_model_is_named(capsys):
    with pytest.raises(SystemExit):
        bench_block.main(["--models", "qwen"])
    assert "unknown model 'qwen'" in capsys.readouterr().err
