"""Replay: requests follow the schedule of the first of their kind without reading the device, and tell its drift."""

from __future__ import annotations

import gc
import itertools
import json
import math
import weakref

import pytest
import tiny
import torch
from host_reads import HostReadError, Reads
from pairs import by_gate, in_turn

import omni_kernels
from omni_runtime.cache import replay
from omni_runtime.cache.gates import AccumulatedPolynomialGate, Limits, Plan, ThresholdGate
from omni_runtime.cache.replay import ReplayGate
from omni_runtime.cache.signals import FirstBlocksResidual

STEPS = 12
IDENTITY = [0, 0, 0, 1, 0]
CONFIGS = {
    "tea_cache": {"rel_l1_thresh": 0.2, "coefficients": IDENTITY},
    "first_block_cache": {"threshold": 0.2},
    "cache_dit": {"residual_diff_threshold": 0.15, "max_warmup_steps": 1, "enable_taylorseer": True},
    "sea_cache": {"threshold": 0.2},
    "easy_cache": {"thresh": 0.2, "ret_steps": 2},
}


def replaying(backend, tolerance=0.1, **change):
    return CONFIGS[backend] | change | {"decision": "replay", "drift_tolerance": tolerance}


def latents(pipe, **arguments):
    return tiny.generate(pipe, output_type="latent", **{"num_inference_steps": STEPS} | arguments)


def decisions(report):
    return {name: list(branch.decisions) for name, branch in report.branches.items()}


def replayed(report):
    """Branch → the steps whose decision was taken from an earlier request."""
    return {
        name: [d.step for d in branch.decisions if d.reason.startswith("replayed")]
        for name, branch in report.branches.items()
    }


def measured(report):
    return {
        name: [d.step for d in branch.decisions if d.distance is not None] for name, branch in report.branches.items()
    }


def faint(seed=0, batch=1):
    """Latents to begin with that are a third of what they should be: everything is at other distances."""
    return 0.3 * torch.randn(batch, 16, 64, generator=torch.Generator().manual_seed(seed))


def session_of(handle):
    return handle._installed


# One kind of request


@pytest.mark.parametrize("backend", by_gate(CONFIGS))
def test_first_request_decides_as_without_replay(qwen_pipe, backend):
    with omni_kernels.patched(qwen_pipe, backend, CONFIGS[backend]) as handle:
        expected, report = latents(qwen_pipe), handle.report
    with omni_kernels.patched(qwen_pipe, backend, replaying(backend)) as handle:
        assert torch.equal(latents(qwen_pipe), expected)
        assert decisions(handle.report) == decisions(report)
        assert handle.report.notes == report.notes
        assert handle.report.drift is None
        assert handle.report.to_dict()["drift"] is None


@pytest.mark.parametrize("backend", by_gate(CONFIGS))
def test_same_request_again_replays_and_has_not_drifted(qwen_pipe, backend):
    handle = omni_kernels.patch(qwen_pipe, backend, replaying(backend, tolerance=0.0))
    first, before = latents(qwen_pipe), handle.report
    for _ in range(2):
        assert torch.equal(latents(qwen_pipe), first)
        report = handle.report
        assert report.drift == report.to_dict()["drift"] == 0.0
        for name, made in decisions(before).items():
            expected = [d if d.distance is None else d._replace(reason="replayed") for d in made]
            assert report.branches[name].decisions == expected
            assert {d.computed for d in expected if d.reason == "replayed"} == {True, False}
        assert report.notes == [
            *before.notes,
            "schedule of an earlier request replayed: drift 0 of the threshold, within the tolerance of 0",
        ]


@pytest.mark.parametrize(("name", "backend"), in_turn(tiny.PIPELINES, CONFIGS))
def test_every_pipeline_replays_every_method(name, backend):
    pipe = tiny.PIPELINES[name]()
    with omni_kernels.patched(pipe, backend, replaying(backend)) as handle:
        first, asked = latents(pipe), measured(handle.report)
        assert torch.equal(latents(pipe), first)
        assert handle.report.drift == 0.0
        assert replayed(handle.report) == asked
        assert all(asked.values())


@pytest.mark.parametrize(
    ("name", "change"),
    in_turn(["qwen_image", "z_image", "flux"], [{"seed": 5}, {"prompt": "a dog that is not a cat at all"}]),
)
def test_another_prompt_or_seed_replays(name, change):
    pipe = tiny.PIPELINES[name]()
    handle = omni_kernels.patch(pipe, "first_block_cache", replaying("first_block_cache", tolerance=1e9))
    first, before = latents(pipe), handle.report
    assert not torch.equal(latents(pipe, **change), first)
    assert replayed(handle.report) == measured(before)
    assert [b.computed for b in handle.report.branches.values()] == [b.computed for b in before.branches.values()]
    assert handle.report.drift >= 0.0


def test_where_the_prompt_is_watched_too_its_length_is_of_the_kind(z_pipe):
    """Z-Image has image and prompt in one stream, the prompt in blocks of 32 tokens."""
    handle = omni_kernels.patch(z_pipe, "first_block_cache", replaying("first_block_cache", tolerance=1e9))
    short, long = {"prompt": "a cat"}, {"prompt": "a cat " * 40}
    drifts = []
    for arguments in (short, long, short, long):
        latents(z_pipe, **arguments)
        drifts.append(handle.report.drift)
    assert drifts == [None, None, 0.0, 0.0]


def test_reference_of_another_shape_is_the_same_kind():
    """TeaCache takes an edit's distances over its noise: what they are decided by has the same shape."""
    pipe = tiny.qwen_image_edit()
    handle = omni_kernels.patch(pipe, "tea_cache", replaying("tea_cache", tolerance=1e9))
    lengths = []
    hidden = pipe.transformer.img_in.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    latents(pipe)
    asked = measured(handle.report)
    latents(pipe, image=tiny.reference_image().resize((192, 64)))
    hidden.remove()
    assert len(set(lengths)) == 2
    assert replayed(handle.report) == asked
    assert handle.report.drift >= 0.0


@pytest.mark.parametrize("warmup", [0, 1, 2, 5])
def test_steps_that_had_nothing_to_compare_with_do_not_end_a_replay(qwen_pipe, warmup):
    handle = omni_kernels.patch(qwen_pipe, "easy_cache", replaying("easy_cache", ret_steps=warmup))
    first, asked = latents(qwen_pipe), measured(handle.report)
    assert torch.equal(latents(qwen_pipe), first)
    assert handle.report.drift == 0.0
    assert replayed(handle.report) == asked
    assert all(asked.values())


# The host


@pytest.mark.parametrize("backend", by_gate(CONFIGS))
def test_replay_reads_nothing_within_the_loop_and_once_after_it(qwen_pipe, backend, monkeypatch):
    handle = omni_kernels.patch(qwen_pipe, backend, replaying(backend))
    latents(qwen_pipe)
    reads = Reads(monkeypatch)
    latents(qwen_pipe, callback_on_step_end=reads.forbid_within_the_loop(qwen_pipe, STEPS))
    assert reads.made == ["tolist"]
    assert handle.report.drift == 0.0
    assert all(len(steps) >= 5 for steps in replayed(handle.report).values())


@pytest.mark.parametrize("decision", ["measure", "replay"])
def test_the_reads_of_a_request_that_decides_would_be_seen(qwen_pipe, decision, monkeypatch):
    omni_kernels.patch(qwen_pipe, "first_block_cache", {"threshold": 0.2, "decision": decision})
    reads = Reads(monkeypatch)
    with pytest.raises(HostReadError, match="tolist"):
        latents(qwen_pipe, callback_on_step_end=reads.forbid_within_the_loop(qwen_pipe, STEPS))


# Drift


def written_out(per_step, elements, schedule, threshold, accumulates):
    """The drift of one branch, from each step's watched tensor, the replayed schedule and the rules of the two gates in
    float64; and at how many steps the gate would have decided otherwise."""
    last, total, shares = per_step[0].double(), 0.0, []
    for (before, now), computed in zip(itertools.pairwise(per_step), schedule[1:], strict=True):
        reference = before.double() if accumulates else last
        distance = float((now.double() - reference).abs().sum() / (reference.abs().sum() + 1e-8 * elements))
        total += distance
        held = total if accumulates else distance
        if (held >= threshold) != computed:
            shares.append(abs(held - threshold) / threshold)
        if computed:
            last, total = now.double(), 0.0
    return max(shares, default=0.0), len(shares)


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.3])
def test_drift_of_a_threshold_is_the_rule_written_out(qwen_pipe, threshold, monkeypatch):
    seen = []
    original = FirstBlocksResidual.observe

    def spy(self, block, arguments, hidden, entered, noise, remembered, using):
        seen.append(hidden - entered)
        return original(self, block, arguments, hidden, entered, noise, remembered, using)

    config = {"threshold": threshold, "decision": "replay"}
    handle = omni_kernels.patch(qwen_pipe, "first_block_cache", config)
    latents(qwen_pipe, negative_prompt=None)
    monkeypatch.setattr(FirstBlocksResidual, "observe", spy)
    latents(qwen_pipe, negative_prompt=None, latents=faint())
    made = handle.report.branches["cond"].decisions
    expected, different = written_out(seen, seen[0].numel(), [d.computed for d in made], threshold, accumulates=False)
    assert different > 0
    assert handle.report.drift == pytest.approx(expected, rel=1e-4)
    assert len([d for d in made if d.reason.startswith("replayed, though ")]) == different


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.4])
def test_drift_of_an_accumulated_distance_is_the_rule_written_out(qwen_pipe, threshold):
    def modulated(block, hidden, temb):
        shift, scale, _ = block.img_mod(temb).chunk(2, dim=-1)[0].chunk(3, dim=-1)
        return block.img_norm1(hidden) * (1 + scale[:, None]) + shift[:, None]

    config = {"rel_l1_thresh": threshold, "coefficients": IDENTITY, "decision": "replay"}
    handle = omni_kernels.patch(qwen_pipe, "tea_cache", config)
    latents(qwen_pipe, negative_prompt=None)
    schedule = [d.computed for d in handle.report.branches["cond"].decisions]
    block = qwen_pipe.transformer.transformer_blocks[0]
    inputs = []
    # A skipped step calls no block: its modulated input is made from what would have entered block 0.
    for layer in (qwen_pipe.transformer.img_in, qwen_pipe.transformer.time_text_embed):
        layer.register_forward_hook(lambda module, args, output: inputs.append(output))
    latents(qwen_pipe, negative_prompt=None, latents=faint())
    with torch.no_grad():
        seen = [modulated(block, *entered) for entered in zip(inputs[::2], inputs[1::2], strict=True)]
    made = handle.report.branches["cond"].decisions
    assert [d.computed for d in made] == schedule
    expected, different = written_out(seen, seen[0].numel(), schedule, threshold, accumulates=True)
    assert different > 0
    assert handle.report.drift == pytest.approx(expected, rel=1e-4)
    assert len([d for d in made if d.reason.startswith("replayed, though accumulated ")]) == different


@pytest.mark.parametrize("backend", by_gate(CONFIGS))
def test_past_the_tolerance_the_next_request_decides_afresh(qwen_pipe, backend):
    with omni_kernels.patched(qwen_pipe, backend, CONFIGS[backend]) as handle:
        expected = latents(qwen_pipe, latents=faint())
        decided = decisions(handle.report)
    handle = omni_kernels.patch(qwen_pipe, backend, replaying(backend, tolerance=1e-6))
    latents(qwen_pipe)
    drifted = latents(qwen_pipe, latents=faint())
    drift = handle.report.drift
    assert drift > 1e-3
    assert handle.report.notes[-1] == (
        f"schedule of an earlier request replayed: drift {drift:.2g} of the threshold, "
        "past the tolerance of 1e-06: what has drifted is decided afresh next time"
    )
    assert not torch.equal(drifted, expected)
    assert torch.equal(latents(qwen_pipe, latents=faint()), expected)
    assert decisions(handle.report) == decided
    assert handle.report.drift is None
    assert torch.equal(latents(qwen_pipe, latents=faint()), expected)
    assert handle.report.drift == 0.0


def test_within_the_tolerance_the_schedule_stays(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "first_block_cache", replaying("first_block_cache", tolerance=1e9))
    first, before = latents(qwen_pipe), handle.report
    for _ in range(3):
        latents(qwen_pipe, latents=faint())
        assert handle.report.drift > 0.01
        assert [b.computed for b in handle.report.branches.values()] == [b.computed for b in before.branches.values()]
    assert torch.equal(latents(qwen_pipe), first)
    assert handle.report.drift == 0.0


def test_branch_that_has_drifted_alone_decides_afresh_alone(qwen_pipe):
    """One branch's recorded decisions are turned round: the other's hold, and are still replayed."""
    handle = omni_kernels.patch(qwen_pipe, "first_block_cache", replaying("first_block_cache", tolerance=0.0))
    latents(qwen_pipe)
    asked = measured(handle.report)
    schedules = session_of(handle).replays._schedules
    (kind,) = (kind for kind in schedules if kind[0] == "uncond")
    schedules[kind] = {step: not computed for step, computed in schedules[kind].items()}
    latents(qwen_pipe)
    assert handle.report.drift > 0.0
    latents(qwen_pipe)
    assert replayed(handle.report)["cond"] == asked["cond"]
    assert replayed(handle.report)["uncond"] == []


def test_distance_that_is_no_number_drifts_without_end(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "first_block_cache", replaying("first_block_cache", tolerance=1e9))
    latents(qwen_pipe)

    def overflow(pipe, step, timestep, tensors):
        if step == 1:
            tensors["latents"][:] = math.nan
        return tensors

    latents(qwen_pipe, callback_on_step_end=overflow)
    assert handle.report.drift == math.inf
    assert "drift inf of the threshold, past the tolerance of 1e+09" in handle.report.notes[-1]
    latents(qwen_pipe)
    assert replayed(handle.report) == {"cond": [], "uncond": []}


def test_report_of_a_replay_is_plain(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "tea_cache", replaying("tea_cache"))
    latents(qwen_pipe)
    latents(qwen_pipe, latents=faint())
    told = json.loads(json.dumps(handle.report.to_dict()))
    assert told["drift"] == handle.report.drift
    assert told["notes"][-1].startswith("schedule of an earlier request replayed: drift ")
    assert told["branches"]["cond"]["decisions"][1]["accumulated"] > 0.0


def test_listener_of_a_replay_sees_decisions_before_they_are_measured_but_the_last(qwen_pipe):
    events = []
    handle = omni_kernels.patch(qwen_pipe, "first_block_cache", replaying("first_block_cache"))
    latents(qwen_pipe)
    handle.on_step = events.append
    latents(qwen_pipe)
    made = [event.branches["cond"] for event in events]
    assert [d.reason for d in made] == ["nothing cached yet"] + ["replayed"] * (STEPS - 1)
    assert [d.distance is None for d in made] == [True] * (STEPS - 1) + [False]
    assert made[-1] == handle.report.branches["cond"].decisions[-1]


# Limits


def test_limits_stay_those_of_the_request(qwen_pipe):
    """What limits and masks decide is not replayed, and they count the replayed steps."""
    config = {
        "residual_diff_threshold": 0.4,
        "max_warmup_steps": 2,
        "max_continuous_cached_steps": 2,
        "max_cached_steps": 5,
        "steps_computation_mask": "110001000000",
        "decision": "replay",
        "drift_tolerance": 1e9,
    }
    handle = omni_kernels.patch(qwen_pipe, "cache_dit", config)
    latents(qwen_pipe)
    first = decisions(handle.report)
    latents(qwen_pipe, latents=faint())
    for name, made in decisions(handle.report).items():
        assert [d.computed for d in made] == [d.computed for d in first[name]]
        for before, now in zip(first[name], made, strict=True):
            assert now.reason == before.reason or (before.distance is not None and now.reason.startswith("replayed"))
        assert {"mask", "max continuous cached steps", "max cached steps", "replayed"} <= {d.reason for d in made}
        runs = [len(list(run)) for skipped, run in itertools.groupby(made, lambda d: not d.computed) if skipped]
        assert max(runs) == 2
        assert sum(runs) == 5


def test_static_masks_and_thresholds_that_measure_nothing_have_nothing_to_replay(qwen_pipe):
    for config in (
        {"steps_computation_mask": "101010101010", "scm_steps_policy": "static", "max_continuous_cached_steps": -1},
        {"residual_diff_threshold": 1.0},
        {"residual_diff_threshold": 0.0},
    ):
        with omni_kernels.patched(qwen_pipe, "cache_dit", config | {"decision": "replay"}) as handle:
            for _ in range(2):
                latents(qwen_pipe)
                if "steps_computation_mask" in config:
                    assert handle.report.branches["cond"].skipped == [1, 3, 5, 7, 9, 11]
                assert handle.report.drift is None
                assert handle.report.notes == []


# Other kinds


@pytest.mark.parametrize(
    "change",
    [{"num_inference_steps": 9}, {"height": 96}, {"num_images_per_prompt": 2}],
    ids=["steps", "size", "batch"],
)
def test_steps_size_and_batch_are_kinds_of_their_own(qwen_pipe, change):
    with omni_kernels.patched(qwen_pipe, "first_block_cache", CONFIGS["first_block_cache"]) as handle:
        expected = latents(qwen_pipe, **change)
        decided = decisions(handle.report)
    handle = omni_kernels.patch(qwen_pipe, "first_block_cache", replaying("first_block_cache"))
    first = latents(qwen_pipe)
    assert torch.equal(latents(qwen_pipe, **change), expected)
    assert decisions(handle.report) == decided
    assert handle.report.drift is None
    for arguments, made in (({}, first), (change, expected)):
        assert torch.equal(latents(qwen_pipe, **arguments), made)
        assert handle.report.drift == 0.0


def test_other_noise_levels_are_a_kind_of_their_own(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "first_block_cache", replaying("first_block_cache"))
    latents(qwen_pipe)
    sigmas = [1.0 - 0.07 * step for step in range(STEPS)]
    latents(qwen_pipe, sigmas=sigmas)
    assert handle.report.drift is None
    latents(qwen_pipe, sigmas=sigmas)
    assert handle.report.drift == 0.0


@pytest.mark.parametrize(("backend", "images"), in_turn(CONFIGS, [2, 1]))
def test_guidance_in_one_batch_is_judged_by_image(z_pipe, backend, images):
    """What is kept holds both halves of the batch: read later, an image's distance is what it was when read at once."""
    handle = omni_kernels.patch(z_pipe, backend, replaying(backend))
    generators = [torch.Generator().manual_seed(seed) for seed in range(images)]
    states = [generator.get_state() for generator in generators]
    latents(z_pipe, generator=generators, num_images_per_prompt=images)
    (before,) = decisions(handle.report).values()
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    latents(z_pipe, generator=generators, num_images_per_prompt=images)
    (after,) = decisions(handle.report).values()
    assert handle.report.drift == 0.0
    assert after == [d if d.distance is None else d._replace(reason="replayed") for d in before]
    assert sum(d.reason == "replayed" for d in after) >= 5


def test_two_images_and_one_with_guidance_are_kinds_of_their_own(z_pipe):
    """Both are batches of two."""
    handle = omni_kernels.patch(z_pipe, "first_block_cache", replaying("first_block_cache"))
    drifts = []
    for _ in range(2):
        for arguments in ({}, {"guidance_scale": 0.0, "num_images_per_prompt": 2}):
            latents(z_pipe, **arguments)
            drifts.append(handle.report.drift)
    assert drifts == [None, None, 0.0, 0.0]


@pytest.mark.parametrize("backend", ["tea_cache", "first_block_cache"])
def test_batch_of_two_is_judged_by_its_worst_image(qwen_pipe, backend):
    """One of its samples as recorded, one not: the batch drifts as the same batch would be decided."""
    handle = omni_kernels.patch(qwen_pipe, backend, replaying(backend, tolerance=1e9))
    alike, mixed = faint(batch=2) / 0.3, faint(batch=2) / 0.3
    mixed[1] *= 0.3
    arguments = {"num_images_per_prompt": 2, "negative_prompt": None}
    latents(qwen_pipe, latents=alike, **arguments)
    latents(qwen_pipe, latents=alike, **arguments)
    assert handle.report.drift == 0.0
    together = latents(qwen_pipe, latents=mixed, **arguments)
    made = handle.report.branches["cond"].decisions
    session_of(handle).replays._schedules.clear()
    # Each sample alone, on the schedule of the batch: the larger of their distances is the batch's.
    held = []
    for sample in range(2):
        latents(qwen_pipe, latents=mixed[sample : sample + 1], negative_prompt=None)
        schedules = session_of(handle).replays._schedules
        (kind,) = schedules
        schedules[kind] = {d.step: d.computed for d in made if d.distance is not None}
        alone = latents(qwen_pipe, latents=mixed[sample : sample + 1], negative_prompt=None)
        torch.testing.assert_close(alone, together[sample : sample + 1], rtol=1e-3, atol=1e-3)
        held.append([d.distance for d in handle.report.branches["cond"].decisions])
        schedules.clear()
    for decision, *distances in zip(made, *held, strict=True):
        if decision.distance is not None:
            assert decision.distance == pytest.approx(max(distances), rel=1e-3)


def test_shape_that_changes_within_a_request_has_a_schedule_for_each(z_pipe):
    """Guidance that ends early halves the batch; where it ends elsewhere, what the schedules lack is decided."""
    handle = omni_kernels.patch(z_pipe, "tea_cache", replaying("tea_cache", tolerance=1e9))
    early = latents(z_pipe, cfg_truncation=0.3)
    (asked,) = measured(handle.report).values()
    (changes,) = ([d.step for d in b.decisions if d.reason == "shape changed"] for b in handle.report.branches.values())
    assert len(changes) == 1
    assert torch.equal(latents(z_pipe, cfg_truncation=0.3), early)
    assert list(replayed(handle.report).values()) == [asked]
    latents(z_pipe, cfg_truncation=0.7)
    (branch,) = handle.report.branches.values()
    (late,) = (d.step for d in branch.decisions if d.reason == "shape changed")
    assert late > changes[0]
    assert [d.step for d in branch.decisions if d.reason.startswith("replayed")] == [
        *range(1, changes[0]),
        *range(late + 1, STEPS),
    ]
    assert {d.reason for d in branch.decisions[changes[0] : late]} <= {
        "accumulated below threshold",
        "accumulated above threshold",
    }


def test_the_last_kinds_are_kept(qwen_pipe, monkeypatch):
    monkeypatch.setattr(replay, "KINDS", 3)
    handle = omni_kernels.patch(qwen_pipe, "first_block_cache", replaying("first_block_cache"))

    def drift(steps):
        latents(qwen_pipe, num_inference_steps=steps, negative_prompt=None)
        return handle.report.drift

    assert [drift(steps) for steps in (4, 5, 6)] == [None] * 3
    assert drift(4) == 0.0  # used last, so that 5 is the next to go
    assert drift(7) is None
    assert [drift(steps) for steps in (4, 6, 7)] == [0.0] * 3
    assert drift(5) is None
    assert len(session_of(handle).replays._schedules) == 3


def test_patching_again_starts_anew(qwen_pipe):
    with omni_kernels.patched(qwen_pipe, "tea_cache", replaying("tea_cache")) as handle:
        latents(qwen_pipe)
        latents(qwen_pipe)
        assert handle.report.drift == 0.0
    with omni_kernels.patched(qwen_pipe, "tea_cache", replaying("tea_cache")) as handle:
        latents(qwen_pipe)
        assert handle.report.drift is None


# Requests that die


def interrupt_at(when):
    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step == when
        return {}

    return interrupt


def fail_at(when):
    def fail(pipe, step, timestep, tensors):
        if step == when:
            raise RuntimeError("broken")
        return {}

    return fail


@pytest.mark.parametrize(("backend", "end"), in_turn(CONFIGS, [interrupt_at, fail_at]))
def test_request_that_dies_changes_nothing(qwen_pipe, backend, end):
    """Whether it was the first of its kind, which would have recorded, or a replay, which would have drifted."""
    handle = omni_kernels.patch(qwen_pipe, backend, replaying(backend, tolerance=0.0))

    def die():
        if end is fail_at:
            with pytest.raises(RuntimeError, match="broken"):
                latents(qwen_pipe, latents=faint(), callback_on_step_end=end(6))
        else:
            latents(qwen_pipe, latents=faint(), callback_on_step_end=end(6))
        assert not handle.report.complete
        assert handle.report.drift is None
        assert not any("replayed" in note for note in handle.report.notes)
        assert session_of(handle).held_tensors() == []

    die()
    first, asked = latents(qwen_pipe), measured(handle.report)
    assert handle.report.drift is None
    die()
    assert all(steps for steps in replayed(handle.report).values())
    assert all(d.distance is None for made in decisions(handle.report).values() for d in made)
    assert torch.equal(latents(qwen_pipe), first)
    assert handle.report.drift == 0.0
    assert replayed(handle.report) == asked


def test_exception_in_a_block_of_a_replayed_request_changes_nothing(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "first_block_cache", replaying("first_block_cache"))
    first = latents(qwen_pipe)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt

    hook = qwen_pipe.transformer.transformer_blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        latents(qwen_pipe)
    hook.remove()
    assert handle.report.drift is None
    assert session_of(handle).held_tensors() == []
    assert torch.equal(latents(qwen_pipe), first)
    assert handle.report.drift == 0.0


# Memory


def plain(value):
    if isinstance(value, dict):
        return all(plain(k) and plain(v) for k, v in value.items())
    if isinstance(value, tuple):
        return all(map(plain, value))
    return type(value) in (bool, int, float, str)


@pytest.mark.parametrize("backend", by_gate(CONFIGS))
def test_nothing_of_a_request_outlives_it_but_plain_numbers(qwen_pipe, backend, monkeypatch):
    handle = omni_kernels.patch(qwen_pipe, backend, replaying(backend))
    latents(qwen_pipe)
    sums, held = [], []
    original = ReplayGate.keep

    def spy(self, kept, *args):
        sums.append(weakref.ref(kept))
        return original(self, kept, *args)

    def look(pipe, step, timestep, tensors):
        held.append(sorted(tuple(t.shape) for t in session_of(handle).held_tensors()).count((1, 2)))
        return {}

    monkeypatch.setattr(ReplayGate, "keep", spy)
    latents(qwen_pipe, callback_on_step_end=look)
    gc.collect()
    kept = list(replayed(handle.report).values())
    if backend == "easy_cache":  # one decision for both branches
        assert kept.pop() == kept[0]
    assert len(sums) == sum(map(len, kept)) > 0
    assert held[:-1] == [sum(made <= step for steps in kept for made in steps) for step in range(STEPS - 1)]
    assert held[-1] == 0
    assert [ref() for ref in sums] == [None] * len(sums)
    assert session_of(handle).held_tensors() == []
    schedules = session_of(handle).replays._schedules
    assert len(schedules) == len(kept)
    assert plain(schedules)


# The gate by itself


def stepped(gate, distances):
    """The verdicts of one request, in which what is watched lies at these distances from step to step."""
    verdicts = []
    gate.enters((1, 4, 4))
    gate.settle(True)
    for step, distance in enumerate(distances, 1):
        plan, _ = gate.plan(step)
        assert plan is Plan.MEASURE
        sums = torch.tensor([[distance, 1.0]])
        verdicts.append(gate.judge(sums.tolist(), 1) if gate.reads else gate.keep(sums, 1, 1))
        gate.settle(verdicts[-1].computed)
    return verdicts


def test_step_that_the_schedule_lacks_is_decided_by_all_that_was_measured():
    """As a gate would that had judged every step, and been overruled where one was replayed."""
    distances = [0.25, 0.5, 0.125, 0.5, 0.25, 0.25, 0.5]
    schedule = {1: False, 2: False, 3: True, 4: False, 6: False, 7: False}  # 5 is lacking, 2 has drifted
    gate = ReplayGate(AccumulatedPolynomialGate(Limits(), 0.75, (1.0, 0.0)), lambda shape: shape, {(1, 4, 4): schedule})
    verdicts = stepped(gate, distances)
    assert [v.reason for v in verdicts[:4]] == ["replayed"] * 4
    reference = AccumulatedPolynomialGate(Limits(), 0.75, (1.0, 0.0))
    expected = []
    for step, distance in enumerate(distances, 1):
        expected.append(reference.judge([[distance, 1.0]], 1))
        reference.settle(schedule[step] if step < 5 else expected[-1].computed)
    assert verdicts[4:] == expected[4:], "the steps behind the one that lacks are decided too"
    assert gate.tensors() == []
    assert [verdict for _, verdict in gate.measured()] == expected
    assert [forward.replayed for forward, _ in gate.measured()] == [True] * 4 + [False] * 3


def test_what_was_decided_beside_a_replay_is_recorded():
    replays = replay.Replays(1e9)
    request = type("Request", (), {"steps": 8, "begin": 0, "sigmas": [1.0, 0.5], "images": 1})
    gate = replays.gate(ThresholdGate(Limits(), 0.5), request, "cond")
    stepped(gate, [0.25, 0.75])
    assert replays.complete([(gate, [])]) is None
    gate = replays.gate(ThresholdGate(Limits(), 0.5), request, "cond")
    stepped(gate, [0.25, 0.25, 0.75, 0.25])
    assert replays.complete([(gate, [])]) == 0.5
    gate = replays.gate(ThresholdGate(Limits(), 0.5), request, "cond")
    assert [v[:2] for v in stepped(gate, [0.0] * 4)] == [
        (computed, "replayed") for computed in (False, True, True, False)
    ]
    assert replays.complete([(gate, [])]) == 1.0


@pytest.mark.parametrize(
    "change", [{"steps": 9}, {"begin": 1}, {"sigmas": [1.0, 0.4]}, {"images": 2}], ids=lambda change: next(iter(change))
)
def test_steps_begin_noise_levels_and_images_are_of_the_kind(change):
    replays = replay.Replays(0.1)
    first = {"steps": 8, "begin": 0, "sigmas": [1.0, 0.5], "images": 1}
    drifts = []
    for request in (first, first | change, first, first | change):
        gate = replays.gate(ThresholdGate(Limits(), 0.5), type("Request", (), request), "cond")
        stepped(gate, [0.25, 0.75])
        drifts.append(replays.complete([(gate, [])]))
    assert drifts == [None, None, 0.0, 0.0]
