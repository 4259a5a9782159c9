"""easy_cache against its rule written out as a sampling loop of its own, in every kind of pipeline."""

import copy
import itertools
import math

import diffusers
import pytest
import tiny
import torch
from pairs import in_turn
from torch.utils._python_dispatch import TorchDispatchMode

import omni_kernels
from omni_runtime.cache.gates import AccumulatedPolynomialGate, Limits
from omni_runtime.cache.schedulers import SCHEDULERS
from omni_runtime.cache.signals import ExpectedChange

STEPS = 12
BUILDERS = {**tiny.PIPELINES, "wan": tiny.wan}


def latents(pipe, **arguments):
    return tiny.generate(pipe, output_type="latent", **{"num_inference_steps": STEPS} | arguments)


def decisions_of(handle):
    """Those of the first branch, with which all others must agree."""
    branches = list(handle.report.branches.values())
    assert all(branch.decisions == branches[0].decisions for branch in branches)
    return branches[0].decisions


def computed_of(handle):
    return [d.step for d in decisions_of(handle) if d.computed]


def steps_of(pipe):
    """A list that (σ, model output, latents) of each scheduler step is added to."""
    seen = []
    step = pipe.scheduler.step

    def spy(model_output, timestep, sample, *args, **kwargs):
        levels = getattr(pipe.scheduler, "sigmas", None)
        level = math.nan if levels is None else float(levels[pipe.scheduler.step_index or 0])
        seen.append((level, model_output.clone(), sample.clone()))
        return step(model_output, timestep, sample, *args, **kwargs)

    pipe.scheduler.step = spy
    return seen


# The rule


def recorded(pipe, **arguments):
    """Latents of a plain run, and its transformer calls: (module, keywords), in order."""
    calls = []
    hooks = [
        transformer.register_forward_pre_hook(
            lambda module, _, kwargs: calls.append((module, kwargs)), with_kwargs=True
        )
        for transformer in filter(None, (pipe.transformer, getattr(pipe, "transformer_2", None)))
    ]
    made = latents(pipe, **arguments)
    for hook in hooks:
        hook.remove()
    return made, calls


def mean_abs(x):
    return x.abs().flatten(1).mean(1)


def guided(pipe, outputs):
    """As the pipeline does it; the conditional output comes first."""
    if len(outputs) == 1:
        return outputs[0]
    cond, uncond = outputs
    if isinstance(pipe, diffusers.WanPipeline):
        return uncond + 5.0 * (cond - uncond)
    combined = uncond + 4.0 * (cond - uncond)
    return combined * (cond.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))


@torch.no_grad()
def written_out(pipe, calls, thresh, ret_steps, per_branch=False):
    """EasyCache's loop: the latents, and (computed, accumulated error) of each step.

    `per_branch` adds each branch's own difference and guides then, as the authors' code does.
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_begin_index(None)
    scheduler._step_index = None
    for state, empty in (("model_outputs", [None] * 2), ("timestep_list", [None] * 2), ("last_sample", None)):
        if hasattr(scheduler, state):
            setattr(scheduler, state, empty)
    if hasattr(scheduler, "lower_order_nums"):
        scheduler.lower_order_nums = 0
    timesteps = scheduler.timesteps
    per_step = len(calls) // len(timesteps)
    x = calls[0][1]["hidden_states"]
    x_prev = x_last = out_last = differences = k = None
    error, made = 0.0, []
    for i, t in enumerate(timesteps):
        compute, told = True, None
        if k is not None and ret_steps <= i < len(timesteps) - 1:
            error = error + k * mean_abs(x - x_prev) / mean_abs(out_last)
            compute, told = not bool((error < thresh).all()), error.max().item()
        if compute:
            outputs = [
                module(**{**kwargs, "hidden_states": x})[0] for module, kwargs in calls[i * per_step :][:per_step]
            ]
            out = guided(pipe, outputs)
            if out_last is not None:
                k = mean_abs(out - out_last) / mean_abs(x - x_last)
            x_last, out_last, error = x, out, 0.0
            differences = [output - x for output in outputs]
        elif per_branch:
            out = guided(pipe, [x + difference for difference in differences])
        else:
            out = x + (out_last - x_last)
        x_prev = x
        x = scheduler.step(out, t, x, return_dict=False)[0]
        made.append((compute, told))
    return x, made


def assert_as_written_out(pipe, config, expected, told, **arguments):
    with omni_kernels.patched(pipe, "easy_cache", config) as handle:
        made = latents(pipe, **arguments)
        decisions = decisions_of(handle)
    assert [d.computed for d in decisions] == [computed for computed, _ in told]
    for decision, (_, error) in zip(decisions, told, strict=True):
        assert decision.accumulated == (None if error is None else pytest.approx(error, rel=1e-4))
        assert (decision.distance is None) == (error is None)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


ARGUMENTS = {
    "guided": {},
    "unguided": {"negative_prompt": None},
    "batch": {"num_images_per_prompt": 3, "generator": [torch.Generator() for _ in range(3)]},
}


@pytest.mark.parametrize(
    ("kind", "thresh"),
    [
        pytest.param(kind, thresh, marks=() if (turn + place) % 4 == 1 else pytest.mark.long)
        for turn, kind in enumerate(ARGUMENTS)
        for place, thresh in enumerate((0.06, 0.12, 0.2, 0.4))
    ],
)
def test_decisions_and_latents_are_those_of_the_loop_written_out(qwen_pipe, kind, thresh):
    def arguments():
        seeded = {"generator": [torch.Generator().manual_seed(s) for s in range(3)]} if kind == "batch" else {}
        return ARGUMENTS[kind] | seeded

    plain, calls = recorded(qwen_pipe, **arguments())
    assert torch.equal(written_out(qwen_pipe, calls, 1e-9, 2)[0], plain), "the loop is the pipeline's"
    expected, told = written_out(qwen_pipe, calls, thresh, 2)
    assert {computed for computed, _ in told[2:-1]} == {True, False}
    assert_as_written_out(qwen_pipe, {"thresh": thresh, "ret_steps": 2}, expected, told, **arguments())
    assert not torch.equal(expected, plain)


@pytest.mark.parametrize("ret_steps", [0, 5, *(pytest.param(steps, marks=pytest.mark.long) for steps in (1, 2, 10))])
def test_first_steps(qwen_pipe, ret_steps):
    """Two computed steps are needed before anything can be expected, whatever is asked for."""
    _, calls = recorded(qwen_pipe)
    expected, told = written_out(qwen_pipe, calls, 0.2, ret_steps)
    assert all(computed for computed, _ in told[: max(ret_steps, 2)])
    assert_as_written_out(qwen_pipe, {"thresh": 0.2, "ret_steps": ret_steps}, expected, told)


@pytest.mark.parametrize("build", [tiny.flux, tiny.wan])
def test_other_pipelines_follow_the_loop_too(build):
    pipe = build()
    plain, calls = recorded(pipe)
    assert torch.equal(written_out(pipe, calls, 1e-9, 2)[0], plain)
    expected, told = written_out(pipe, calls, 0.25, 2)
    assert {computed for computed, _ in told[2:-1]} == {True, False}
    assert_as_written_out(pipe, {"thresh": 0.25, "ret_steps": 2}, expected, told)


def test_under_linear_guidance_it_is_one_to_cache_each_branch_or_the_guided_output():
    pipe = tiny.wan()
    _, calls = recorded(pipe)
    expected, told = written_out(pipe, calls, 0.25, 2, per_branch=True)
    assert_as_written_out(pipe, {"thresh": 0.25, "ret_steps": 2}, expected, told)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_multistep_schedulers(scheduler):
    pipe = tiny.wan()
    pipe.scheduler = scheduler
    plain, calls = recorded(pipe)
    assert torch.equal(written_out(pipe, calls, 1e-9, 2)[0], plain)
    expected, told = written_out(pipe, calls, 0.25, 2)
    assert {computed for computed, _ in told[2:-1]} == {True, False}
    assert_as_written_out(pipe, {"thresh": 0.25, "ret_steps": 2}, expected, told)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("UniPCMultistepScheduler", FLOW),
        ("DPMSolverMultistepScheduler", FLOW),
    ],
)
def test_every_scheduler_of_flows(qwen_pipe, name, config):
    """A skipped step's output is x + (out − x) of the last computed one, whatever the scheduler makes of it."""
    scheduler = qwen_pipe.scheduler = getattr(diffusers, name)(**config)
    seen = steps_of(qwen_pipe)
    x = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    with omni_kernels.patched(qwen_pipe, "easy_cache", {"thresh": 1.0, "ret_steps": 2}) as handle, torch.no_grad():
        with handle.sampling():
            scheduler.set_timesteps(STEPS)
            for t in scheduler.timesteps:
                (output,) = qwen_pipe.transformer(
                    hidden_states=x,
                    encoder_hidden_states=torch.zeros(1, 3, 32),
                    timestep=t.expand(1) / 1000,
                    img_shapes=[[(1, 4, 4)]],
                    return_dict=False,
                )
                x = scheduler.step(output, t, x, return_dict=False)[0]
        computed = computed_of(handle)
        assert handle.report.complete
    assert 2 < len(computed) < STEPS
    assert_skipped_steps_add_the_last_difference(seen, computed)


@pytest.mark.parametrize("name", sorted(one for one in SCHEDULERS if not one.startswith(("Flow", "Helios"))))
def test_schedulers_of_noise_are_refused_by_name(qwen_pipe, name):
    """What a model of noise adds to the latents is as large as they are, and changes as they do."""
    qwen_pipe.scheduler = getattr(diffusers, name)()
    with pytest.raises(ValueError, match=f"{name} with prediction_type 'epsilon'.*velocity_cache caches the output"):
        omni_kernels.patch(qwen_pipe, "easy_cache")


@pytest.mark.parametrize(
    ("images", "truncation"),
    [
        pytest.param(images, truncation, marks=() if (images, truncation) in short else pytest.mark.long)
        for short in [((1, 0.2), (2, 0.5), (1, 0.7))]
        for truncation in (0.2, 0.3, 0.4, 0.5, 0.7)
        for images in (1, 2)
    ],
)
def test_guidance_that_ends_within_a_run_of_skipped_steps(z_pipe, truncation, images):
    arguments = {"cfg_truncation": truncation, "num_inference_steps": 16, "num_images_per_prompt": images}
    batches = []
    hook = z_pipe.transformer.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    tiny.generate(z_pipe, **arguments)
    hook.remove()
    ends = batches.index(images)
    for backend, config in (("easy_cache", {"thresh": 0.3, "ret_steps": 2}), ("velocity_cache", {"budget": 5})):
        with omni_kernels.patched(z_pipe, backend, config) as handle:
            tiny.generate(z_pipe, **arguments)
            report = handle.report
        (branch,) = report.branches.values()
        assert report.complete
        assert branch.decisions[ends].computed
        assert branch.skipped
        assert branch.decisions[ends].reason == "another batch"


def assert_skipped_steps_add_the_last_difference(seen, computed):
    for step, (_, output, x) in enumerate(seen):
        if step not in computed:
            _, last, then = seen[max(c for c in computed if c < step)]
            torch.testing.assert_close(output, x + (last - then), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long if name in ("qwen_image_edit", "flux") else ()) for name in BUILDERS],
)
def test_every_pipeline_skips_whole_steps(name):
    """No transformer runs at a skipped step; the scheduler steps there with x + (out − x) of the last computed one."""
    pipe = BUILDERS[name]()
    plain = latents(pipe)
    calls, seen = [], steps_of(pipe)
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with omni_kernels.patched(pipe, "easy_cache", {"thresh": 0.3, "ret_steps": 3}) as handle:
        made = latents(pipe)
        computed = computed_of(handle)
        assert len(calls) == handle.report.forwards == len(computed) * len(handle.report.branches)
        assert handle.report.complete
    assert computed[:3] == [0, 1, 2]
    assert computed[-1] == STEPS - 1
    assert len(computed) < STEPS
    assert_skipped_steps_add_the_last_difference(seen, computed)
    assert not torch.equal(made, plain)
    assert torch.equal(latents(pipe), plain)


@pytest.mark.parametrize(
    ("name", "config"), in_turn(BUILDERS, [{"thresh": 1e-9, "ret_steps": 0}, {"thresh": 9.0, "ret_steps": STEPS + 3}])
)
def test_all_steps_computed_change_no_bit(name, config):
    pipe = BUILDERS[name]()
    plain = latents(pipe)
    with omni_kernels.patched(pipe, "easy_cache", config) as handle:
        assert torch.equal(latents(pipe), plain)
        assert handle.report.forwards_saved == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_first_and_last_step_are_computed_in_any_number_of_steps(qwen_pipe, steps):
    with omni_kernels.patched(qwen_pipe, "easy_cache", {"thresh": 99.0, "ret_steps": 0}) as handle:
        latents(qwen_pipe, num_inference_steps=steps)
        assert computed_of(handle) == sorted({0, 1, steps - 1} & set(range(steps)))


def test_the_report_says_what_was_decided_and_why(qwen_pipe):
    with omni_kernels.patched(qwen_pipe, "easy_cache", {"thresh": 0.15, "ret_steps": 3}) as handle:
        latents(qwen_pipe)
        decisions = decisions_of(handle)
    assert [d.reason for d in decisions[:3]] == ["nothing cached yet", "warmup", "warmup"]
    assert decisions[-1][1:] == (True, "mask", None, None)
    total = 0.0
    for d in decisions[3:-1]:
        total += d.distance
        assert d.accumulated == pytest.approx(total, rel=1e-6)
        assert (d.computed, d.reason) == (
            (False, "accumulated below threshold") if total < 0.15 else (True, "accumulated above threshold")
        )
        total = 0.0 if d.computed else total


def test_the_worst_sample_decides(qwen_pipe):
    """A batch computes at each step where any of its samples has reached the threshold, counted on the batch's run."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    seen = steps_of(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, "easy_cache", {"thresh": 0.2, "ret_steps": 2}) as handle:
        latents(qwen_pipe, num_images_per_prompt=3, generator=generators)
        decisions = decisions_of(handle)
    spread = 0.0
    computed = [d.step for d in decisions if d.computed]
    for d in decisions[2:-1]:
        (_, out1, x1), (_, out0, x0) = (seen[c] for c in [c for c in computed if c < d.step][:-3:-1])
        k = mean_abs(out1.double() - out0) / mean_abs(x1.double() - x0)
        moved = k * mean_abs(seen[d.step][2].double() - seen[d.step - 1][2]) / mean_abs(out1.double())
        assert d.distance == pytest.approx(moved.max().item(), rel=1e-4)
        spread = max(spread, (moved.max() / moved.mean()).item())
    assert spread > 1.005, "the samples differ, or this would be no test of which one decides"


# The signal, by hand


def filled(*rows):
    """[B, 2, 2]: each sample filled with its number."""
    return torch.tensor(rows)[:, None, None].expand(-1, 2, 2).clone()


def test_expected_change_by_hand():
    """Two samples of four elements; the first's output moves twice as far as its latents, the second's half as far."""
    signal = ExpectedChange()
    assert signal.observe(filled(1.0, 1.0)) is None
    signal.leave(filled(1.0, 1.0), filled(3.0, 3.0))
    assert signal.observe(filled(2.0, 2.0)) is None
    signal.leave(filled(2.0, 3.0), filled(5.0, 4.0))
    # k = 2/1 and 1/2; |x − x_prev| = 1 and 4 in each element; Σ|out| = 20 and 16
    assert signal.observe(filled(3.0, 7.0)).tolist() == [[8.0, 20.0], [8.0, 16.0]]
    signal.leave(filled(3.0, 7.0), None)
    # A skipped step moves x_prev on, and neither k nor the output that it is seen against.
    assert signal.observe(filled(2.5, 7.0)).tolist() == [[4.0, 20.0], [0.0, 16.0]]
    signal.leave(filled(2.5, 7.0), filled(6.0, -8.0))
    # k = 1/0.5 and 12/4, over the distance to the last computed step's latents, not to those of the step before
    assert signal.observe(filled(2.0, 8.0)).tolist() == [[4.0, 24.0], [12.0, 32.0]]
    gate = AccumulatedPolynomialGate(Limits(), 0.74, (1.0, 0.0))
    verdict = gate.judge([[4.0, 24.0], [12.0, 32.0]], 4)
    assert (verdict.computed, verdict.distance) == (False, pytest.approx(0.375))
    gate.settle(False)
    assert gate.judge([[4.0, 24.0], [12.0, 32.0]], 4).computed


@pytest.mark.parametrize(
    ("x", "out"),
    [
        ((1.0, 1.0, 1.0), (1.0, 1.0)),  # 0/0
        ((1.0, 1.0, 2.0), (1.0, 2.0)),  # x/0
        ((1.0, 2.0, 2.0), (1.0, math.nan)),
        ((1.0, 2.0, math.nan), (1.0, 2.0)),
        ((1.0, 2.0, 3.0), (1.0, math.inf)),
        ((1.0, 2.0, math.inf), (1.0, 2.0)),
        ((1.0, math.inf, 2.0), (1.0, 2.0)),
        ((1.0, 2.0, 3.0), (1.0, 0.0)),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_no_number_computes(x, out, place):
    """In any sample of a batch, beside one that does not move."""
    batch = [filled(*pair[:: 1 - 2 * place]) for pair in zip(x, (1.0, 1.5, 1.5), strict=True)]
    outputs = [filled(*pair[:: 1 - 2 * place]) for pair in zip(out, (1.0, 1.0), strict=True)]
    signal = ExpectedChange()
    for latents_then, output in zip(batch, outputs, strict=False):
        signal.leave(latents_then, output)
    pairs = signal.observe(batch[2]).tolist()
    assert pairs[1 - place] == [0.0, 4.0]
    assert AccumulatedPolynomialGate(Limits(), 1e6, (1.0, 0.0)).judge(pairs, 4).computed


def test_latents_or_outputs_of_another_shape_are_not_compared():
    signal = ExpectedChange()
    for value in (1.0, 2.0):
        signal.leave(filled(value), filled(value))
    assert signal.observe(filled(3.0, 3.0)) is None
    signal.leave(filled(3.0, 3.0), filled(3.0, 3.0))
    assert signal.observe(filled(4.0, 4.0)) is None
    signal.leave(filled(4.0, 5.0), filled(4.0, 5.0))
    assert signal.observe(filled(5.0, 5.0)).tolist() == [[4.0, 16.0], [0.0, 20.0]]


def test_latents_that_become_nan_are_computed_from_there_on(qwen_pipe):
    def spoil(pipe, index, timestep, tensors):
        return {"latents": tensors["latents"] * math.nan} if index == 4 else {}

    with omni_kernels.patched(qwen_pipe, "easy_cache", {"thresh": 1e6, "ret_steps": 2}) as handle:
        latents(qwen_pipe, callback_on_step_end=spoil)
        # What the step left was whole: it is the following one's that is seen to be none.
        assert computed_of(handle) == [0, 1, *range(6, STEPS)]


# Forecasts, dtypes


@pytest.mark.parametrize(("order", "reach"), [(1, 1.0), (1, 3.0), (2, 2.0)])
def test_a_forecaster_forecasts_what_the_model_adds(qwen_pipe, order, reach):
    """Also where the latents are changed between the steps: what the scheduler is given counts."""
    seen = steps_of(qwen_pipe)
    config = {"thresh": 0.3, "ret_steps": 3, "forecaster": "newton", "forecaster_order": order, "reach": reach}
    with omni_kernels.patched(qwen_pipe, "easy_cache", config) as handle:
        latents(qwen_pipe, callback_on_step_end=lambda p, i, t, tensors: {"latents": tensors["latents"] * 1.01})
        computed = computed_of(handle)
    assert len(computed) < STEPS - 3
    for step, (sigma, output, x) in enumerate(seen):
        if step in computed:
            continue
        kept = [seen[c] for c in computed if c < step][: -order - 2 : -1]
        newest, second = kept[0][0], kept[1][0]
        at = newest - min(newest - sigma, reach * (second - newest))
        expected = x.double()
        for s, out, then in kept:  # Lagrange's form
            weight = math.prod((at - other) / (s - other) for other, _, _ in kept if other != s)
            expected = expected + weight * (out.double() - then.double())
        torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "wide"), [("qwen_image", torch.bfloat16), ("wan", torch.float32)])
def test_half_precision_stays_half_precision(name, wide):
    """Beside latents in fp32, which some pipelines keep, the difference is remembered and added in fp32 too."""
    pipe = BUILDERS[name]()
    pipe.transformer.to(torch.bfloat16)
    if wide is torch.bfloat16:
        pipe.to(wide)
    seen = steps_of(pipe)
    with omni_kernels.patched(pipe, "easy_cache", {"thresh": 0.3, "ret_steps": 2}) as handle:
        latents(pipe, callback_on_step_end=lambda p, i, t, tensors: {"latents": tensors["latents"].to(wide)})
        computed = computed_of(handle)
    assert len(computed) < STEPS
    assert {(output.dtype, x.dtype) for _, output, x in seen} == {(torch.bfloat16, wide)}
    for step, (_, output, x) in enumerate(seen):
        if step not in computed:
            _, last, then = seen[max(c for c in computed if c < step)]
            assert torch.equal(output, (x + (last - then)).to(torch.bfloat16))


# Beneath it


class _Ours(TorchDispatchMode):
    """Counts our ops."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "omni_kernels":
            self.names.append(str(func).split(".")[1].removesuffix("_into"))
        return func(*args, **kwargs or {})


def test_a_decided_step_makes_one_small_transfer_and_a_settled_one_none(qwen_pipe, monkeypatch):
    transfers, ours = [], []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: transfers.append(tuple(t.shape)) or tolist(t))
    spies = []

    def at_step_end(pipe, index, timestep, tensors):
        if spies:
            spies[-1].__exit__(None, None, None)
            ours.append(spies[-1].names)
        if index < STEPS - 1:
            spies.append(_Ours())
            spies[-1].__enter__()
        return {}

    with omni_kernels.patched(qwen_pipe, "easy_cache", {"thresh": 0.15, "ret_steps": 3}) as handle:
        latents(qwen_pipe, callback_on_step_end=at_step_end)
        decisions = decisions_of(handle)
    assert transfers.count((1, 2)) == sum(d.distance is not None for d in decisions) == STEPS - 4
    for decision, names in zip(decisions[1:], ours, strict=True):
        measured = ["relative_l1"] * (decision.distance is not None)
        assert names == measured + ["relative_l1"] * 2 * decision.computed + ["linear_forecast"]


def reachable(value, seen):
    """Every tensor that hangs on `value`, by what Python objects hold."""
    if isinstance(value, torch.Tensor):
        return {id(value)}
    if id(value) in seen or isinstance(value, torch.nn.Module):
        return set()
    seen.add(id(value))
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, (list, tuple)):
        inner = value
    else:
        names = itertools.chain(vars(value) if hasattr(value, "__dict__") else (), getattr(value, "__slots__", ()))
        inner = [getattr(value, name, None) for name in names if type(value).__module__.startswith("omni_runtime")]
    return set().union(*(reachable(one, seen) for one in inner))


def test_all_that_is_held_is_told_and_it_is_a_few_latents(qwen_pipe):
    told = []
    with omni_kernels.patched(qwen_pipe, "easy_cache", {"thresh": 0.2, "ret_steps": 3}) as handle:
        session = handle._installed

        def look(pipe, index, timestep, tensors):
            request = session._sampling.request
            if request is not None:
                held = session.held_tensors()
                kept = [request.outputs, [branch.kept for branch in request.branches.values()]]
                assert {id(t) for t in held} == reachable(kept, {id(request)})
                told.append([tuple(t.shape) for t in held])
            return {}

        made = latents(qwen_pipe, callback_on_step_end=look)
        computed = computed_of(handle)
        assert session.held_tensors() == []
    # The difference, latents and output of the last computed step, what each branch returned there; and in a run of
    # skipped steps the latents of the step before.
    for step, shapes in enumerate(told):
        assert shapes.count(tuple(made.shape)) == 5 + (step not in computed)
        assert shapes.count((1,)) == (2 if step else 0)


def test_a_model_output_unlike_the_latents_is_refused_by_name(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "easy_cache")
    noise = torch.randn(1, 16, 64)
    scheduler = qwen_pipe.scheduler
    with handle.sampling(), torch.no_grad():
        scheduler.set_timesteps(3, mu=0.5)
        qwen_pipe.transformer(
            hidden_states=noise,
            encoder_hidden_states=torch.zeros(1, 3, 32),
            timestep=torch.full((1,), 0.5),
            img_shapes=[[(1, 4, 4)]],
        )
        with pytest.raises(ValueError, match=r"output has the shape \(1, 16, 128\), the latents \(1, 16, 64\)"):
            scheduler.step(torch.zeros(1, 16, 128), scheduler.timesteps[0], noise)


@pytest.mark.parametrize("scheduler", [diffusers.FlowMatchHeunDiscreteScheduler(), diffusers.ScoreSdeVeScheduler()])
def test_unfit_schedulers_are_refused_by_name(qwen_pipe, scheduler):
    qwen_pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=type(scheduler).__name__):
        omni_kernels.patch(qwen_pipe, "easy_cache")
