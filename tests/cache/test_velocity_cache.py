"""The velocity cache: whole steps skipped on a schedule, in every pipeline, against the rule written out."""

import collections
import contextlib
import itertools
import json

import diffusers
import numpy as np
import pytest
import tiny
import torch
from calibrated import CALIBRATED
from host_reads import HostReadError, Ops, Reads
from pairs import in_turn

import omni_kernels
from omni_runtime import Omni
from omni_runtime.cache import schedules
from omni_runtime.cache.calibration import SLACK
from omni_runtime.cache.history import History
from omni_runtime.cache.methods import METHODS
from omni_runtime.cache.models import TransformerFacts
from omni_runtime.cache.output import Corrector, OutputSession
from omni_runtime.cache.schedulers import SCHEDULERS
from omni_runtime.compare.comparison import prompts_of
from omni_runtime.generation import loading

SCHEDULE = (0, 1, 3, 6, 7)
STEPS = 8
BUILDERS = {**tiny.PIPELINES, "wan": tiny.wan}
#: What turns guidance on or off, beside the defaults.
GUIDED = {"flux": {"negative_prompt": " ", "true_cfg_scale": 4.0}}
UNGUIDED = {"z_image": {"guidance_scale": 0.0}, "wan": {"guidance_scale": 0.0}}


def latents(pipe, **arguments):
    return tiny.generate(pipe, output_type="latent", **{"num_inference_steps": STEPS} | arguments)


def counted(pipe):
    """A list that each real forward of the pipeline's transformers adds its class to."""
    calls = []
    for transformer in filter(None, (pipe.transformer, getattr(pipe, "transformer_2", None))):
        transformer.register_forward_pre_hook(lambda module, _: calls.append(module))
    return calls


def outputs_of(pipe):
    """A list that each model output that the scheduler steps with is added to, and the noise level there."""
    seen = []
    step = pipe.scheduler.step

    def spy(model_output, *args, **kwargs):
        index = pipe.scheduler.step_index or 0
        seen.append((float(pipe.scheduler.sigmas[index]), model_output.clone()))
        return step(model_output, *args, **kwargs)

    pipe.scheduler.step = spy
    return seen


@pytest.fixture
def given(monkeypatch):
    """What the pipeline has for the scheduler at each step, and the noise levels there and behind the step."""
    given = []
    original = OutputSession.stepped_with

    def spy(session, request, output, sample):
        place = request.begin + request.step
        levels = [*request.sigmas, 0.0]
        given.append((*levels[place : place + 2], output.clone()))
        return original(session, request, output, sample)

    monkeypatch.setattr(OutputSession, "stepped_with", spy)
    return given


def on_a_polynomial(points, x):
    """Lagrange's form of the polynomial that Newton's differences give, through points (x, value)."""
    total = 0.0
    for j, (a, value) in enumerate(points):
        weight = 1.0
        for k, (b, _) in enumerate(points):
            weight *= (x - b) / (a - b) if k != j else 1.0
        total = total + weight * value
    return total


def written_out(given, computed, order=1, reach=None, corrector=2):
    """What the scheduler should have stepped with: the rule on the computed steps' outputs, in float64."""
    if reach is None:
        reach = min(1.0, max(0.25, (len(computed) - 4) / 12))
    expected, kept, forecasts = [], [], []
    for i, (sigma, following, output) in enumerate(given):
        if i not in computed:
            x = sigma
            if len(kept) > 1:
                x = kept[0][0] - min(kept[0][0] - sigma, reach * (kept[1][0] - kept[0][0]))
            forecasts.append((sigma, following, on_a_polynomial(kept[: order + 1], x)))
            expected.append(forecasts[-1][2])
            continue
        kept.insert(0, (sigma, output.double()))
        expected.append(kept[0][1])
        if corrector:
            for at, behind, forecast in forecasts:
                short = (behind - at) * (on_a_polynomial(kept[: corrector + 1], at) - forecast)
                expected[-1] = expected[-1] + short / (following - sigma)
        forecasts = []
    return expected


def assert_stepped_with(seen, expected, tolerance=1e-5):
    for (_, output), wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(output.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "guided"), in_turn(BUILDERS, [True, False]))
def test_every_pipeline_follows_the_schedule(name, guided, given):
    """Forecasts and corrections are the written-out rule's, and no transformer runs in a skipped step."""
    pipe = BUILDERS[name]()
    arguments = GUIDED.get(name, {}) if guided else UNGUIDED.get(name, {"negative_prompt": None})
    calls, seen, samples = counted(pipe), outputs_of(pipe), []
    pipe.transformer.register_forward_pre_hook(lambda module, args: samples.append(len(args[0]) if args else 1))
    plain = latents(pipe, **arguments)
    batched = name == "z_image"  # both branches in one call
    per_step = 2 if guided and not batched else 1
    assert len(calls) == per_step * STEPS
    assert set(samples) == {2 if guided and batched else 1}
    calls.clear()
    seen.clear()
    given.clear()
    with omni_kernels.patched(pipe, "velocity_cache", {"schedule": SCHEDULE}) as handle:
        made = latents(pipe, **arguments)
        assert len(calls) == per_step * len(SCHEDULE) == handle.report.forwards
        assert handle.report.forwards_saved == per_step * (STEPS - len(SCHEDULE))
        assert len(handle.report.branches) == per_step
        for branch in handle.report.branches.values():
            assert branch.computed == list(SCHEDULE)
    assert_stepped_with(seen, written_out(given, SCHEDULE))
    assert not torch.equal(made, plain)
    assert torch.equal(latents(pipe, **arguments), plain)


@pytest.mark.parametrize("name", BUILDERS)
def test_all_steps_computed_change_no_bit(name):
    pipe = BUILDERS[name]()
    plain = latents(pipe)
    with omni_kernels.patched(pipe, "velocity_cache", {"budget": STEPS}):
        assert torch.equal(latents(pipe), plain)


@pytest.mark.parametrize(
    ("forecast", "corrector"),
    [
        *in_turn([(0, 1.0), (1, 0.5), (1, 1.0)], range(4)),
        *in_turn([(2, 2.0), (2, 1.0), (1, 10.0)], range(4)),
    ],
)
def test_orders_and_reach(qwen_pipe, given, forecast, corrector):
    (order, reach), seen, computed = forecast, outputs_of(qwen_pipe), (0, 1, 2, 5, 6, 9)
    config = {"schedule": computed, "forecaster_order": order, "reach": reach, "corrector_order": corrector}
    with omni_kernels.patched(qwen_pipe, "velocity_cache", config):
        latents(qwen_pipe, num_inference_steps=10)
    assert_stepped_with(seen, written_out(given, computed, order, reach, corrector), 1e-4)


@pytest.mark.parametrize("forecaster", ["taylorseer", "reuse", "foca"])
def test_corrector_takes_any_forecast_that_is_one_for_all_samples(qwen_pipe, forecaster):
    """With the model's outputs on a parabola in σ, the latents are those of full runs behind each computed step."""
    whole = []
    for config in ({"budget": STEPS}, {"schedule": SCHEDULE, "forecaster": forecaster}):
        on_a_parabola(qwen_pipe, whole, config)
    full, cached = whole
    for step in SCHEDULE[2:]:
        torch.testing.assert_close(cached[step], full[step], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(cached[2], full[2]), "a forecast before is off"


def on_a_parabola(pipe, whole, config):
    """Adds the latents behind each step of a request whose model outputs are those of a parabola."""
    behind = []

    def keep(pipe, index, timestep, tensors):
        behind.append(tensors["latents"].clone())
        return {}

    def made(step):
        def on_parabola(output, t, sample, **rest):
            sigma = float(t) / 1000
            return step(torch.full_like(output, 3 * sigma**2 - sigma + 0.5), t, sample, **rest)

        return on_parabola

    with omni_kernels.patched(pipe, "velocity_cache", config), above_the_cache(pipe, made):
        latents(pipe, callback_on_step_end=keep)
    whole.append(behind)


@contextlib.contextmanager
def above_the_cache(pipe, made):
    """While open, calls of the scheduler's step go through what `made` makes of it, and then through the cache."""
    bar, own = pipe.progress_bar, vars(pipe.scheduler).get("step")

    def progress_bar(*args, **kwargs):  # called within the pipeline's call, right before the loop
        pipe.scheduler.step = made(pipe.scheduler.step)
        return bar(*args, **kwargs)

    pipe.progress_bar = progress_bar
    try:
        yield
    finally:
        del pipe.progress_bar, pipe.scheduler.step
        if own is not None:
            pipe.scheduler.step = own


def test_corrector_is_left_out_where_each_sample_has_weights_of_its_own(qwen_pipe):
    """dmd weighs each sample by itself."""
    made = []
    for corrector in (0, 2):
        config = {"schedule": SCHEDULE, "forecaster": "dmd", "corrector_order": corrector}
        with omni_kernels.patched(qwen_pipe, "velocity_cache", config):
            made.append(latents(qwen_pipe))
    assert torch.equal(*made)


def test_tokens_with_levels_of_their_own_are_not_corrected(qwen_pipe, given):
    """Image-to-video pipelines hold some tokens at other noise levels: the scheduler's own σ is not theirs."""
    seen = outputs_of(qwen_pipe)

    def made(step):
        def by_token(output, t, sample, **rest):
            return step(output, t, sample, per_token_timesteps=t.expand(sample.shape[:2]), **rest)

        return by_token

    with (
        omni_kernels.patched(qwen_pipe, "velocity_cache", {"schedule": SCHEDULE}),
        above_the_cache(qwen_pipe, made),
    ):
        latents(qwen_pipe)
    assert_stepped_with(seen, written_out(given, SCHEDULE, corrector=0))


def test_corrector_makes_up_for_what_the_forecast_is_short_of():
    """By hand: steps at 1, 0.75, 0.5 and 0.25, of which the third was forecast as 2·v₁ − v₀."""
    corrector = Corrector(1)
    assert corrector.computed(1.0, -0.25) == [1.0]
    assert corrector.computed(0.75, -0.25) == [1.0]
    corrector.skipped(0.5, -0.25, [2.0, -1.0])
    # between: (v₃ + v₁) / 2, and stepped with was 2·v₁ − v₀
    assert corrector.computed(0.25, -0.25) == pytest.approx([1.5, -1.5, 1.0])
    assert corrector.computed(0.0, -0.25) == [1.0]


def test_corrector_lets_a_repeated_level_and_a_step_of_no_length_pass():
    corrector = Corrector(2)
    for level, length in ((1.0, -0.5), (0.5, 0.0), (0.5, -0.25)):
        assert corrector.computed(level, length) == [1.0]
    corrector.skipped(0.25, -0.25, [1.0])
    assert corrector.computed(0.0, -0.25) == pytest.approx([1.5, -0.5, 0.0])
    corrector.skipped(-0.25, -0.25, [1.0])
    assert corrector.computed(-0.5, 0.0) == [1.0]


def test_order_0_is_reuse(qwen_pipe):
    made = []
    for config in ({"forecaster_order": 0}, {"forecaster": "reuse"}):
        with omni_kernels.patched(qwen_pipe, "velocity_cache", {"schedule": SCHEDULE, **config}):
            made.append(latents(qwen_pipe))
    assert torch.equal(*made)


def test_both_transformers_of_a_pipeline_are_skipped():
    """Each from its own first step, which is computed: nothing is forecast from one transformer to the next."""
    pipe = tiny.wan(two_stages=True)
    calls = counted(pipe)
    plain = latents(pipe)
    change = [id(module) for module in calls[::2]].index(id(pipe.transformer_2))
    calls.clear()
    schedule = sorted({0, change - 2, change + 1, STEPS - 1})
    with omni_kernels.patched(pipe, "velocity_cache", {"schedule": schedule}) as handle:
        made = latents(pipe)
        computed = sorted({*schedule, change})
        assert [one.reason for one in handle.report.branches["cond"].decisions][change] == "another transformer"
        assert handle.report.branches["cond"].computed == computed
        assert len(calls) == 2 * len(computed) == handle.report.forwards
        assert {id(module) for module in calls} == {id(pipe.transformer), id(pipe.transformer_2)}
    assert (made - plain).norm() < 0.1 * plain.norm()


def test_half_precision_stays_half_precision(qwen_pipe):
    """The forecast has the model output's dtype: the next forward's input would otherwise change its own."""
    qwen_pipe.to(torch.bfloat16)
    seen = outputs_of(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, "velocity_cache", {"schedule": SCHEDULE}):
        made = latents(qwen_pipe)
    assert {output.dtype for _, output in seen} == {torch.bfloat16} == {made.dtype}


def test_half_precision_is_forecast_in_single_precision_and_rounded_once(qwen_pipe, given):
    qwen_pipe.to(torch.bfloat16)
    seen = outputs_of(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, "velocity_cache", {"schedule": SCHEDULE}):
        latents(qwen_pipe)
    expected, inexact = written_out(given, SCHEDULE), 0
    for (_, output), exact in zip(seen, expected, strict=True):
        half_a_place = torch.exp2(exact.abs().log2().floor() - 8)  # bfloat16 has 8 significant bits
        in_single_precision = 1e-6 * exact.abs().max()
        assert ((output.double() - exact).abs() <= half_a_place + in_single_precision).all()
        inexact += not torch.equal(output.double(), exact)
    assert inexact == len(SCHEDULE)  # three forecasts and two corrections


def ops_of_steps(pipe, reads=None):
    """The operators of steps 1 to 6 of a request; with `reads`, nothing may be read from the device there."""
    ops, steps = Ops(), []

    def at_step_end(pipe, index, timestep, tensors):
        steps.append(collections.Counter(ops.names))
        ops.names = []
        if reads is not None:
            reads.forbidden = ops.forbidden = index + 1 < 7
        return {}

    with ops:
        latents(pipe, callback_on_step_end=at_step_end)
    return steps[1:7]


def test_a_skipped_step_is_one_small_launch_without_synchronisation(qwen_pipe, monkeypatch):
    """Beside what the pipeline does itself; a computed step one, to keep its output, or behind a skipped one two."""
    full = ops_of_steps(qwen_pipe)
    with monkeypatch.context() as without_model:
        answer = (torch.ones(1, 16, 64),)
        without_model.setattr(qwen_pipe.transformer, "forward", lambda *args, **kwargs: answer)
        own = ops_of_steps(qwen_pipe)
    assert all(mine < all_of_it for mine, all_of_it in zip(own, full, strict=True))
    with omni_kernels.patched(qwen_pipe, "velocity_cache", {"schedule": SCHEDULE}) as handle:
        cached = ops_of_steps(qwen_pipe, Reads(monkeypatch))
        assert handle.report.branches["cond"].skipped == [2, 4, 5]
    for step, launches in enumerate([1, 1, 2, 1, 1, 2], 1):
        added = cached[step - 1]
        added.subtract((own if step in (2, 4, 5) else full)[step - 1])
        names = {name for name, count in added.items() if count}
        assert all(name.startswith("omni_kernels.linear_forecast") for name in names), names
        assert sum(added.values()) == launches


READS = {
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "asarray": lambda t: np.asarray(t),
    "cpu": lambda t: t.cpu(),
    "to": lambda t: t.to("cpu"),
    "to a device": lambda t: t.to(device=torch.device("cpu")),
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool(t.sum()),
    "float": lambda t: float(t.sum()),
    "equal": lambda t: torch.equal(t, t),
    "nonzero": lambda t: torch.nonzero(t),
    "mask": lambda t: t[t > 0],
}


@pytest.mark.parametrize("read", READS)
def test_the_synchronisation_test_would_see_one(qwen_pipe, read, monkeypatch):
    combined = History.combined

    def reading(history, weights):
        READS[read](combined(history, weights))
        return combined(history, weights)

    reads = Reads(monkeypatch)
    monkeypatch.setattr(History, "combined", reading)
    with (
        omni_kernels.patched(qwen_pipe, "velocity_cache", {"schedule": SCHEDULE}),
        pytest.raises(HostReadError),
    ):
        ops_of_steps(qwen_pipe, reads)


def test_memory_is_a_few_latents(qwen_pipe):
    """Three snapshots of the guided output, and what each branch's call returned last."""
    held = []
    with omni_kernels.patched(qwen_pipe, "velocity_cache", {"schedule": SCHEDULE}) as handle:
        session = handle._installed

        def look(pipe, index, timestep, tensors):
            held.append([tuple(t.shape) for t in session.held_tensors()])
            return {}

        made = latents(qwen_pipe, callback_on_step_end=look)
        assert held[-2] == [tuple(made.shape)] * 5
        assert held[-1] == []


def test_new_call_in_a_skipped_step_runs(qwen_pipe, given):
    """A branch that begins in a skipped step has nothing to stand in; the step itself is forecast all the same."""
    calls = counted(qwen_pipe)
    seen = outputs_of(qwen_pipe)

    def guided(step):
        taken = []

        def stepped(output, t, sample, **rest):
            taken.append(t)
            if len(taken) == 3:
                with torch.no_grad(), qwen_pipe.transformer.cache_context("late"):
                    qwen_pipe.transformer(
                        hidden_states=sample,
                        encoder_hidden_states=torch.zeros(1, 3, 32),
                        timestep=torch.full((1,), 0.5),
                        img_shapes=[[(1, 4, 4)]],
                    )
            return step(output, t, sample, **rest)

        return stepped

    with (
        omni_kernels.patched(qwen_pipe, "velocity_cache", {"schedule": SCHEDULE}) as handle,
        above_the_cache(qwen_pipe, guided),
    ):
        latents(qwen_pipe)
        (late,) = handle.report.branches["late"].decisions
    assert (late.step, late.computed, late.reason) == (2, True, "no stand-in for this call")
    assert len(calls) == 2 * len(SCHEDULE) + 1
    expected = written_out(given, SCHEDULE)
    torch.testing.assert_close(seen[2][1].double(), expected[2], rtol=1e-5, atol=1e-5)


# Schedulers


@pytest.mark.parametrize(
    ("scheduler", "named"),
    [
        (
            diffusers.FlowMatchHeunDiscreteScheduler(),
            "FlowMatchHeunDiscreteScheduler evaluates the model 2 times a step",
        ),
        (diffusers.HeunDiscreteScheduler(), "HeunDiscreteScheduler evaluates the model 2 times a step"),
        (diffusers.ScoreSdeVeScheduler(), "knows the scheduler 'ScoreSdeVeScheduler' yet.*SCHEDULERS"),
    ],
)
def test_unfit_schedulers_are_refused_by_name(qwen_pipe, scheduler, named):
    qwen_pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=named):
        omni_kernels.patch(qwen_pipe, "velocity_cache")
    assert omni_kernels.patching.handle_of(qwen_pipe) is None


def test_a_step_that_hides_its_arguments_is_refused(qwen_pipe):
    """Otherwise the scheduler would step with a stand-in."""
    kind = type(qwen_pipe.scheduler)
    hiding = type(kind.__name__, (kind,), {"step": lambda self, *args, **kwargs: kind.step(self, *args, **kwargs)})
    qwen_pipe.scheduler = hiding.from_config(qwen_pipe.scheduler.config)
    with pytest.raises(ValueError, match="step takes no model_output and no sample"):
        omni_kernels.patch(qwen_pipe, "velocity_cache")


def test_unfit_scheduler_put_in_later_is_refused_too(qwen_pipe):
    fit = qwen_pipe.scheduler
    with omni_kernels.patched(qwen_pipe, "velocity_cache", {"schedule": SCHEDULE}):
        expected = latents(qwen_pipe)
        qwen_pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
        with pytest.raises(ValueError, match="evaluates the model 2 times a step"):
            latents(qwen_pipe)
        qwen_pipe.scheduler = fit
        assert torch.equal(latents(qwen_pipe), expected)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def sampled(pipe, scheduler):
    """Latents behind each step of a loop written out, with one call of the transformer a step."""
    x, behind = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0)), []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)  # some schedulers add noise
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            (output,) = pipe.transformer(
                hidden_states=scaled,
                encoder_hidden_states=torch.zeros(1, 3, 32),
                timestep=t.expand(1) / 1000,
                img_shapes=[[(1, 4, 4)]],
                return_dict=False,
            )
            x = scheduler.step(output, t, x, return_dict=False)[0]
            behind.append(x)
    return torch.stack(behind)


#: What a scheduler of the table needs to be used like the others.
OF = {"HeliosScheduler": {"stages": 1, "stage_range": [0, 1], "scheduler_type": "euler"}}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, OF.get(name, {})) for name in SCHEDULERS),
        ("UniPCMultistepScheduler", FLOW),
        ("DPMSolverMultistepScheduler", FLOW),
    ],
    ids=lambda value: value if isinstance(value, str) else "flow" if value else "defaults",
)
def test_every_scheduler_of_the_table(qwen_pipe, given, name, config):
    """All steps computed change no bit; on a schedule it steps with the forecasts, which flow-match Euler corrects."""
    euler = name == "FlowMatchEulerDiscreteScheduler"
    scheduler = getattr(diffusers, name)(**config)
    plain = sampled(qwen_pipe, scheduler)
    assert torch.isfinite(plain).all()
    assert torch.equal(sampled(qwen_pipe, scheduler), plain)
    calls = counted(qwen_pipe)
    qwen_pipe.scheduler = scheduler
    with omni_kernels.patched(qwen_pipe, "velocity_cache", {"budget": STEPS}) as handle, handle.sampling():
        assert torch.equal(sampled(qwen_pipe, scheduler), plain)
    calls.clear()
    given.clear()
    stepped, step = [], scheduler.step

    def spy(model_output, *args, **kwargs):
        stepped.append((None, model_output.clone()))
        return step(model_output, *args, **kwargs)

    scheduler.step = spy
    with omni_kernels.patched(qwen_pipe, "velocity_cache", {"schedule": SCHEDULE}) as handle:
        with handle.sampling():
            made = sampled(qwen_pipe, scheduler)
        (branch,) = handle.report.branches.values()
        assert branch.computed == list(SCHEDULE)
        assert handle.report.complete
        assert handle.report.forwards == len(calls) == len(SCHEDULE)
    assert_stepped_with(stepped, written_out(given, SCHEDULE, corrector=2 if euler else 0), 1e-4)
    assert torch.equal(made[:2], plain[:2])
    assert not torch.equal(made[2], plain[2])


def test_multistep_scheduler(qwen_pipe, given):
    """Wan's usual scheduler keeps outputs of its own, by which it corrects itself: it is given the forecasts alone."""
    pipe = tiny.wan()
    pipe.scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    plain = latents(pipe)
    seen = outputs_of(pipe)
    with omni_kernels.patched(pipe, "velocity_cache", {"budget": STEPS}):
        assert torch.equal(latents(pipe), plain)
    seen.clear()
    given.clear()
    with omni_kernels.patched(pipe, "velocity_cache", {"schedule": SCHEDULE}) as handle:
        latents(pipe)
        assert handle.report.branches["cond"].computed == list(SCHEDULE)
    assert_stepped_with(seen, written_out(given, SCHEDULE, corrector=0))


# Beneath it


class Int8Linear(torch.nn.Linear):
    """A quantised linear as libraries make them: the weight is int8, with a scale per row, and no parameter."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.bias = linear.bias
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        del self.weight
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def test_quantised_weights(qwen_pipe, given):
    before = latents(qwen_pipe)
    linears = [
        (block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer)
        for block in qwen_pipe.transformer.transformer_blocks
        for name, layer in block.named_modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    for owner, name, layer in linears:
        setattr(owner, name, Int8Linear(layer))
    plain = latents(qwen_pipe)
    assert not torch.equal(plain, before)
    calls, seen = counted(qwen_pipe), outputs_of(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, "velocity_cache", {"budget": STEPS}):
        assert torch.equal(latents(qwen_pipe), plain)
    for trace in (calls, seen, given):
        trace.clear()
    with omni_kernels.patched(qwen_pipe, "velocity_cache", {"schedule": SCHEDULE}):
        latents(qwen_pipe)
    assert len(calls) == 2 * len(SCHEDULE)
    assert_stepped_with(seen, written_out(given, SCHEDULE))


def test_context_parallelism_that_is_on_already(qwen_pipe, given):
    """A schedule is the same on all ranks, which need not agree; here is one of them, with the setting alone."""
    config = diffusers.ParallelConfig(context_parallel_config=diffusers.ContextParallelConfig(ulysses_degree=2))
    qwen_pipe.transformer._parallel_config = config
    plain = latents(qwen_pipe)
    calls, seen = counted(qwen_pipe), outputs_of(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, "velocity_cache", {"schedule": SCHEDULE}):
        latents(qwen_pipe)
    assert len(calls) == 2 * len(SCHEDULE)
    assert_stepped_with(seen, written_out(given, SCHEDULE))
    assert qwen_pipe.transformer._parallel_config is config
    assert torch.equal(latents(qwen_pipe), plain)


def test_controlnet_pipeline(qwen_pipe, given):
    with tiny.torch.no_grad():
        controlnet = diffusers.QwenImageControlNetModel.from_transformer(
            qwen_pipe.transformer, num_layers=2, attention_head_dim=32, num_attention_heads=2
        )
    pipe = diffusers.QwenImageControlNetPipeline(**qwen_pipe.components, controlnet=controlnet.eval())
    arguments = {
        "control_image": tiny.reference_image(64),
        "controlnet_conditioning_scale": 1.0,
        "prompt": "a cat",
        "negative_prompt": " ",
        "height": 64,
        "width": 64,
        "num_inference_steps": STEPS,
        "output_type": "latent",
    }
    pipe.set_progress_bar_config(disable=True)
    calls = counted(pipe)
    seen = outputs_of(pipe)
    with omni_kernels.patched(pipe, "velocity_cache", {"schedule": SCHEDULE}):
        pipe(**arguments, generator=torch.Generator().manual_seed(0))
    assert len(calls) == 2 * len(SCHEDULE)
    assert_stepped_with(seen, written_out(given, SCHEDULE))


# Configuration


@pytest.mark.parametrize("pair", list(itertools.combinations(["schedule", "budget", "speedup", "quality"], 2)))
def test_only_one_of_the_four_is_given(pair):
    values = {"schedule": [0, 1], "budget": 2, "speedup": 2.0, "quality": 40.0}
    with pytest.raises(ValueError, match=f"{pair[0]} and {pair[1]} cannot be combined"):
        METHODS["velocity_cache"].check({key: values[key] for key in pair})


@pytest.mark.parametrize(
    ("config", "steps", "named"),
    [
        ({"schedule": "qwen-image-16"}, None, "did you mean 'qwen-image-1"),
        ({"schedule": [0, 0, 3]}, None, "each computed step once"),
        ({"schedule": [-1, 3]}, None, "from 0"),
        ({"schedule": []}, None, "each computed step"),
        ({"schedule": [0, 8]}, 8, "names step 8, but the request has 8 steps"),
        ({"budget": 1}, None, "budget must be None or a whole number ≥ 2"),
        ({"budget": 9}, 8, "budget is 9 computed steps, but the request has 8"),
        ({"speedup": 1.0}, None, "speedup must be None or a finite number > 1"),
        ({"reach": 0}, None, "reach must be None or a finite number > 0"),
        ({"forecaster_order": 3}, None, "forecaster_order must be a whole number from 0 to 2"),
        ({"forecaster_order": -1}, None, "forecaster_order must be a whole number from 0 to 2"),
        ({"corrector_order": 4}, None, "corrector_order must be None or a whole number from 0 to 3"),
        ({"calibration": {"method": "tea_cache"}}, None, "not a calibration of schedules"),
    ],
)
def test_wrong_values_are_named(config, steps, named):
    with pytest.raises(ValueError, match=named):
        METHODS["velocity_cache"].check(config, steps=steps)


@pytest.mark.parametrize("value", [1.5, [0, 1.5], [True, 3], {"a": 1}])
def test_wrong_types_are_named(value):
    with pytest.raises(TypeError, match="schedule must be"):
        METHODS["velocity_cache"].check({"schedule": value})


def computed_by(pipe, config, **arguments):
    with omni_kernels.patched(pipe, "velocity_cache", config) as handle:
        latents(pipe, **arguments)
        return handle.report.branches["cond"].computed, " ".join(handle.report.notes)


BY_NAME = [
    ("qwen-image-17", 50, [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 17, 24, 31, 38, 45, 48, 49], "MeanCache"),
    ("velocity-9", 50, [0, 1, 2, 3, 5, 9, 17, 31, 49], "velocity caching"),
    ("lemica-z-image-turbo-8", 10, [0, 1, 2, 3, 5, 7, 8, 9], "LeMiCa"),
    # Half as many of half the steps: those at 4, 17.5 and 33.25 of the 49 intervals, times 24 / 49.
    ("qwen-image-10", 25, [0, 2, 9, 16, 24], "carried over to 5 of 25"),
    ("scm-slow", 28, "1111111101110011100110010001", "'slow' of cache-dit"),
    ("scm-medium", 28, "1111110110001100011000110001", "'medium' of cache-dit"),
    ("scm-fast", 28, "1111110100010000100000100001", "'fast' of cache-dit"),
    ("scm-ultra", 28, "1111001000001000000100000001", "'ultra' of cache-dit"),
    ("scm-slow", 8, "11111011", "'slow' of cache-dit"),
    ("scm-medium", 8, "11110101", "'medium' of cache-dit"),
    ("scm-fast", 8, "11101001", "'fast' of cache-dit"),
    ("scm-ultra", 8, "11001001", "'ultra' of cache-dit"),
]


@pytest.mark.parametrize(
    ("name", "steps", "expected", "told"), BY_NAME, ids=[f"{row[0]} of {row[1]}" for row in BY_NAME]
)
def test_schedules_by_name(qwen_pipe, name, steps, expected, told):
    calls = counted(qwen_pipe)
    computed, notes = computed_by(qwen_pipe, {"schedule": name}, num_inference_steps=steps, negative_prompt=None)
    if isinstance(expected, str):
        expected = [step for step, bit in enumerate(expected) if bit == "1"]
    assert computed == expected
    assert len(calls) == len(expected)
    assert told in notes


def test_first_and_last_steps_are_added(qwen_pipe):
    assert computed_by(qwen_pipe, {"schedule": [3]})[0] == [0, 3, 7]


@pytest.mark.parametrize(
    ("config", "count"), [({}, 4), ({"speedup": 2.5}, 3), ({"speedup": 100.0}, 2), ({"budget": 5}, 5)]
)
def test_how_many_steps_are_computed(qwen_pipe, config, count):
    assert len(computed_by(qwen_pipe, config)[0]) == count


def test_the_report_says_where_the_schedule_comes_from(qwen_pipe):
    assert "MeanCache" in computed_by(qwen_pipe, {"schedule": "qwen-image-25"})[1]
    computed, notes = computed_by(qwen_pipe, {"budget": 4})
    assert "evenly spread" in notes
    assert computed == list(schedules.early(8, 4).computed)
    assert "given" in computed_by(qwen_pipe, {"schedule": [0, 3, 7]})[1]


# Calibrated schedules


def made_for(pipe, steps=STEPS, **change):
    """A calibration with schedules of 3 and 5 steps, for the tiny pipeline."""
    seen = outputs_of(pipe)
    with omni_kernels.patched(pipe, "velocity_cache") as handle:
        latents(pipe, num_inference_steps=steps)
        about = handle._installed.describe_last()
    del pipe.scheduler.step
    sigmas = [sigma for sigma, _ in seen]
    rows = [
        {"steps": steps, "sigmas": sigmas, "computed": computed, "psnr": {"mean": psnr}}
        for computed, psnr in (([0, 2, steps - 1], 30.0), ([0, 1, 3, 4, steps - 1], 40.0))
    ]
    return {
        "method": "velocity_cache",
        "version": 1,
        "model": "tiny",
        "calibrated_for": about,
        "schedules": rows,
    } | change


def test_calibrated_schedules_are_taken(qwen_pipe, tmp_path, recwarn):
    found = made_for(qwen_pipe)
    path = tmp_path / "velocity_cache.json"
    path.write_text(json.dumps(found))
    recwarn.clear()
    for given in (found, str(path), path):
        computed, notes = computed_by(qwen_pipe, {"calibration": given, "budget": 5})
        assert computed == [0, 1, 3, 4, 7]
        assert "calibrated on tiny" in notes
    assert computed_by(qwen_pipe, {"calibration": found, "quality": 30.0})[0] == [0, 2, 7]
    assert computed_by(qwen_pipe, {"calibration": found, "quality": 30.1})[0] == [0, 1, 3, 4, 7]
    assert not [w for w in recwarn if "calibrated for" in str(w.message)]
    for row in found["schedules"]:  # as if forecasting took a tenth of computing
        row["speedup"] = 1 / (1 - 0.9 * (1 - len(row["computed"]) / row["steps"]))
    for wanted, count in ((1.5, 5), (2.0, 3), (2.2, 3)):
        assert len(computed_by(qwen_pipe, {"calibration": found, "speedup": wanted})[0]) == count
    with pytest.raises(ValueError, match=r"speedup 4 is more than skipping steps gives: with 2 of 8 computed, 3\.1"):
        computed_by(qwen_pipe, {"calibration": found, "speedup": 4.0})
    computed, notes = computed_by(qwen_pipe, {"calibration": found, "budget": 4})
    assert len(computed) == 4
    assert "carried over to 4 of 8" in notes


@pytest.mark.parametrize(("model", "asked"), in_turn(CALIBRATED, ["budget", "quality", "speedup"]))
def test_embedded_models_run_on_schedules_of_their_own(model, asked):
    """Taken by whoever loads the model."""
    document = json.loads((loading.embedded_models()[model] / "velocity_cache.json").read_text())
    rows = {row["budget"]: row for row in document["schedules"]}
    assert [*rows][-6:] == [32, 25, 17, 13, 10, 8]
    for one in document["schedules"]:
        for statistic in ("mean", "p5"):  # on pictures that were not searched on
            assert one["psnr"][statistic] >= one["evenly_spread"][statistic]
            assert one["psnr"][statistic] > one["plain_sampling"][statistic]
    (prompt, picture), *_ = prompts_of(model)
    row = rows[25]
    config = {asked: {"budget": 25, "quality": row["psnr"]["mean"], "speedup": 2.0}[asked]}
    with Omni(model, cache_backend="velocity_cache", cache_config=config, device="cpu") as omni:
        (result,) = omni.generate(prompt, seed=0, **({} if picture is None else {"image": picture}))
    assert f"calibrated on {model}" in " ".join(result.cache.notes)
    made = next(iter(result.cache.branches.values())).computed
    if asked == "speedup":
        assert 12 <= len(made) < 25, "25 of 50 steps are less than twice as fast"
    else:
        assert made == row["computed"]
    for one in document["schedules"]:  # None: the times of that row did not agree
        assert (one["speedup"] or 1.0) <= SLACK * one["steps"] / one["budget"]


def test_another_request_than_calibrated_for_is_mapped_and_said(qwen_pipe):
    found = made_for(qwen_pipe)
    with pytest.warns(UserWarning, match="velocity_cache was calibrated for other runs.*latents"):
        computed, notes = computed_by(
            qwen_pipe, {"calibration": found, "quality": 35.0}, height=96, num_inference_steps=16
        )
    assert len(computed) == 10
    assert "made for 5 of 8 steps, carried over to 10 of 16" in notes


def test_schedules_of_another_class_are_taken_with_a_warning(qwen_pipe):
    """They only name steps, and may serve as well as evenly spread ones."""
    found = made_for(qwen_pipe)
    found["calibrated_for"]["transformer"] = "FluxTransformer2DModel"
    METHODS["velocity_cache"].check({"calibration": found}, TransformerFacts("QwenImageTransformer2DModel", 4))
    with pytest.warns(UserWarning, match="a QwenImageTransformer2DModel instead of a FluxTransformer2DModel"):
        assert computed_by(qwen_pipe, {"calibration": found, "budget": 3})[0] == [0, 2, 7]


def test_calibrated_steps_are_mapped_by_their_noise_levels(z_pipe):
    """From 50 evenly spread levels to 28 that a shift of 3 keeps high: the step with the nearest level, not index."""
    made_at, places = [1 - i / 50 for i in range(50)], [0, 6, 15, 30, 42, 49]
    found = made_for(z_pipe)
    found["schedules"] = [{"steps": 50, "sigmas": made_at, "computed": places, "psnr": {"mean": 40.0}}]
    with omni_kernels.patched(z_pipe, "velocity_cache", {"calibration": found, "budget": 6}) as handle:
        with pytest.warns(UserWarning, match="calibrated for other runs"):
            latents(z_pipe, num_inference_steps=28)
        (branch,) = handle.report.branches.values()
    here = z_pipe.scheduler.sigmas.tolist()[:28]
    nearest = [min(range(28), key=lambda step: abs(here[step] - made_at[place])) for place in places[1:-1]]
    assert branch.computed == [0, *nearest, 27]
    assert nearest != [round(place * 27 / 49) for place in places[1:-1]]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"version": 2}, "version 2"),
        ({"schedules": []}, "schedules must be a list"),
        ({"schedules": [3]}, "a schedule must be an object"),
        ({"schedules": [{"steps": 8, "sigmas": [1.0] * 8, "computed": [0, 9], "psnr": {"mean": 1}}]}, "rising steps"),
        ({"schedules": [{"steps": 8, "sigmas": [1.0], "computed": [0, 7], "psnr": {"mean": 1}}]}, "noise levels of 8"),
        ({"schedules": [{"steps": 8, "sigmas": [1.0] * 8, "computed": [0, 7], "psnr": {}}]}, "psnr must have a mean"),
    ],
)
def test_broken_calibrations_are_named(qwen_pipe, change, named):
    with pytest.raises(ValueError, match=f"calibration: .*{named}"):
        METHODS["velocity_cache"].check({"calibration": made_for(qwen_pipe, **change)})


def test_quality_that_nothing_reaches_is_named(qwen_pipe):
    found = made_for(qwen_pipe)
    with pytest.raises(ValueError, match=r"quality 50 dB .* the best has 40.0 dB, at 5 of 8 steps"):
        METHODS["velocity_cache"].check({"calibration": found, "quality": 50.0})
    with (
        omni_kernels.patched(qwen_pipe, "velocity_cache", {"quality": 30.0}),
        pytest.raises(ValueError, match="omni calibrate schedule"),
    ):
        latents(qwen_pipe)


def test_what_a_models_directory_brings_is_taken_by_hand_too(qwen_pipe, tmp_path):
    (tmp_path / "velocity_cache.json").write_text(json.dumps(made_for(qwen_pipe)))
    qwen_pipe.register_to_config(_name_or_path=str(tmp_path))
    assert qwen_pipe.name_or_path == str(tmp_path)
    assert computed_by(qwen_pipe, {"quality": 35.0})[0] == [0, 1, 3, 4, 7]
