"""`cache_config={"engine": "library"}`: the cache_dit backend on the installed cache-dit library.

That its steps and images are the library's on Qwen-Image and Z-Image is shown in `test_against_cache_dit.py`.
"""

import copy
import functools
import gc
import json
import logging
from unittest import mock

import accelerate
import cache_dit
import pytest
import tiny
import torch
from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager

import omni_kernels
from omni_kernels import PatchConflictError
from omni_runtime import Omni
from omni_runtime.cache import library, models
from omni_runtime.cache.masks import steps_mask
from omni_runtime.cache.methods import METHODS
from omni_runtime.cli import main

STEPS = 12
CONFIG = {"engine": "library", "residual_diff_threshold": 0.5, "max_warmup_steps": 3}
TAYLORSEER = CONFIG | {"enable_taylorseer": True, "taylorseer_order": 1}
OWN_SIMILARITY = CachedContextManager.similarity

#: models that have no row in the table of transformer classes
ROWLESS = {
    "Wan": tiny.wan,
    "Wan, two transformers": functools.partial(tiny.wan, two_stages=True),
    "Chroma": tiny.chroma,
}


@pytest.fixture(autouse=True)
def the_library_is_left_as_it_was():
    yield
    gc.collect()
    assert CachedContextManager.similarity is OWN_SIMILARITY
    assert not {name for name in vars(cache_dit) if name.startswith("_omni")}


def run(pipe, steps=STEPS, **arguments):
    return tiny.generate(pipe, num_inference_steps=steps, output_type="latent", **arguments)


def skipped(handle):
    return [branch.skipped for branch in handle.report.branches.values()]


def namespaces(pipe):
    """All attributes of a pipeline's class and of its transformers' modules, in order; names of what requests set."""
    transformers = [pipe.transformer, getattr(pipe, "transformer_2", None)]
    parts = [module for one in transformers if one is not None for module in one.modules()]
    owners = [type(pipe), *parts]
    names = [dict.fromkeys(vars(pipe)), dict.fromkeys(vars(pipe.scheduler))]
    return names + [dict(vars(owner)) for owner in owners] + [dict(enumerate(part._modules.items())) for part in parts]


def assert_same(now, before):
    assert len(now) == len(before)
    for one, other in zip(now, before, strict=True):
        assert one.keys() == other.keys()
        assert [key for key in one if one[key] is not other[key] and one[key] != other[key]] == []


# Models without a row


@pytest.mark.parametrize("model", sorted(ROWLESS))
def test_model_without_a_row_runs_as_under_the_library(model):
    theirs = ROWLESS[model]()
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=0.5, max_warmup_steps=3,
        max_continuous_cached_steps=3,
    )  # fmt: skip
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
    cache_dit.enable_cache(theirs, cache_config=config, calibrator_config=calibrator)
    their_latents = run(theirs)
    their_steps = [theirs.transformer._cached_steps, theirs.transformer._cfg_cached_steps]
    cache_dit.disable_cache(theirs)

    ours = ROWLESS[model]()
    with omni_kernels.patched(ours, "cache_dit", TAYLORSEER) as handle:
        latents = run(ours)
        steps = skipped(handle)
    torch.testing.assert_close(latents, their_latents, rtol=1e-5, atol=1e-5)
    if model == "Wan":
        assert steps == their_steps
        assert steps[0]


@pytest.mark.parametrize("model", [*sorted(ROWLESS), "FLUX"])
def test_it_is_undone_to_the_last_attribute(model):
    pipe = ROWLESS.get(model, tiny.flux)()
    plain, before = run(pipe), namespaces(pipe)
    handle = omni_kernels.patch(pipe, "cache_dit", CONFIG)
    assert omni_kernels.patch(pipe, "cache_dit", CONFIG) is handle
    assert not torch.equal(run(pipe), plain)
    handle.undo()
    assert_same(namespaces(pipe), before)
    assert torch.equal(run(pipe), plain)


def test_with_two_lists_of_blocks_a_step_is_computed_where_one_of_them_ran():
    pipe = tiny.chroma(layers=2, single_layers=3)
    with omni_kernels.patched(pipe, "cache_dit", CONFIG) as handle:
        run(pipe)
        report = handle.report
    assert "transformer_blocks and single_transformer_blocks were each decided alone" in report.notes[1]
    assert report.blocks_total == 2 * STEPS * 5
    assert 2 * STEPS * 2 < report.blocks_run < report.blocks_total
    assert any(branch.skipped for branch in report.branches.values())


def test_a_mask_for_two_transformers_is_refused():
    pipe = tiny.wan(two_stages=True)
    before = namespaces(pipe)
    with pytest.raises(ValueError, match=r"WanPipeline has 2 transformers.*mask would be misplaced"):
        omni_kernels.patch(pipe, "cache_dit", CONFIG | {"scm_steps_mask_policy": "fast"})
    assert_same(namespaces(pipe), before)


def test_a_pipeline_that_the_library_does_not_know_is_named(qwen_pipe):
    stranger = type("StrangePipeline", (type(qwen_pipe),), {})(**qwen_pipe.components)
    before = namespaces(stranger)
    with pytest.raises(ValueError, match=r"cache_dit .* knows no StrangePipeline: .*QwenImage"):
        omni_kernels.patch(stranger, "cache_dit", CONFIG)
    assert_same(namespaces(stranger), before)


def test_a_transformer_that_the_library_does_not_expect_is_named(qwen_pipe):
    qwen_pipe.transformer = tiny.flux().transformer
    before = namespaces(qwen_pipe)
    with pytest.raises(ValueError, match=r"cache_dit .* cannot serve this QwenImagePipeline"):
        omni_kernels.patch(qwen_pipe, "cache_dit", CONFIG)
    assert_same(namespaces(qwen_pipe), before)


def test_every_list_must_leave_a_block_to_skip():
    pipe = tiny.chroma(layers=2, single_layers=3)
    before = namespaces(pipe)
    with pytest.raises(ValueError, match=r"2 \+ 0: of the 2 blocks in transformer_blocks at least one"):
        omni_kernels.patch(pipe, "cache_dit", CONFIG | {"Fn_compute_blocks": 2})
    assert_same(namespaces(pipe), before)


# Requests


@pytest.fixture(scope="module")
def fresh():
    """What a freshly patched pipeline makes, and the steps that it skips."""
    pipe = tiny.qwen_image()
    with omni_kernels.patched(pipe, "cache_dit", TAYLORSEER) as handle:
        return run(pipe), skipped(handle)


class StopError(Exception):
    pass


def stop_at(step):
    def on_step_end(pipe, index, timestep, tensors):
        if index == step:
            raise StopError
        return tensors

    return on_step_end


def test_no_request_leaves_a_trace_in_the_next(fresh, qwen_pipe):
    latents, steps = fresh
    with omni_kernels.patched(qwen_pipe, "cache_dit", TAYLORSEER) as handle:
        for other in (
            {},
            {"steps": 7},
            {"height": 96},
            {"negative_prompt": None},
            {"prompt": ["a dog", "a red cat on a blue chair"], "negative_prompt": [" ", " "]},
        ):
            run(qwen_pipe, **other)
            assert torch.equal(run(qwen_pipe), latents)
            assert skipped(handle) == steps
            assert handle.report.complete


@pytest.mark.parametrize("step", [0, 4, 9])
def test_a_request_that_dies_leaves_nothing(fresh, qwen_pipe, step):
    latents, steps = fresh
    with omni_kernels.patched(qwen_pipe, "cache_dit", TAYLORSEER) as handle:
        with pytest.raises(StopError):
            run(qwen_pipe, callback_on_step_end=stop_at(step))
        assert not handle.report.complete
        assert handle._installed.held_tensors() == []
        assert torch.equal(run(qwen_pipe), latents)
        assert skipped(handle) == steps


def test_a_request_that_dies_within_the_transformer_leaves_nothing(fresh, qwen_pipe):
    latents, _ = fresh
    with omni_kernels.patched(qwen_pipe, "cache_dit", TAYLORSEER):
        calls = []

        def fail(*_):
            calls.append(1)
            if len(calls) == 10:
                raise StopError

        hook = qwen_pipe.transformer.transformer_blocks[2].register_forward_pre_hook(fail)
        with pytest.raises(StopError):
            run(qwen_pipe)
        hook.remove()
        assert torch.equal(run(qwen_pipe), latents)


def test_what_a_request_holds_is_freed_with_it(qwen_pipe):
    with omni_kernels.patched(qwen_pipe, "cache_dit", TAYLORSEER) as handle:
        session, held = handle._installed, []
        handle.on_step = lambda event: held.append(len(session.held_tensors()))
        run(qwen_pipe)
        assert max(held) > 8
        assert session.held_tensors() == []
        last = session._manager.current_context
        assert last.buffers == {}
        for calibrator in (*last.get_calibrators(), *last.get_cfg_calibrators()):
            for state in calibrator.states.values():
                assert {rung for rungs in state.state.values() for rung in rungs} == {None}


def test_outside_a_request_every_block_runs(qwen_pipe):
    calls = []
    hook = qwen_pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    run(qwen_pipe, steps=3)
    hook.remove()
    with torch.no_grad():
        plain = qwen_pipe.transformer(**calls[0])[0]
        with omni_kernels.patched(qwen_pipe, "cache_dit", CONFIG):
            run(qwen_pipe)
            outside = qwen_pipe.transformer(**calls[0])[0]
    assert torch.equal(outside, plain)


def test_a_third_call_in_a_step_is_refused(qwen_pipe):
    calls = []
    hook = qwen_pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True
    )

    def call_again(pipe, index, timestep, tensors):
        pipe.transformer(**calls[-1])
        return tensors

    with omni_kernels.patched(qwen_pipe, "cache_dit", CONFIG):
        with pytest.raises(ValueError, match="was called from a callback"):
            run(qwen_pipe, callback_on_step_end=call_again)
        hook.remove()
        run(qwen_pipe)


def test_a_branch_that_stops_early_does_not_swap_the_branches(qwen_pipe):
    """The library counts calls by parity."""

    pipe = tiny.wan()
    with omni_kernels.patched(pipe, "cache_dit", CONFIG) as handle:

        def cut(pipe, index, timestep, tensors):
            pipe._guidance_scale = 5.0 if index < 5 else 1.0
            return tensors

        run(pipe, callback_on_step_end=cut)
        cond, uncond = handle.report.branches.values()
    assert [decision.step for decision in cond.decisions] == list(range(STEPS))
    assert [decision.step for decision in uncond.decisions] == list(range(6))
    assert max(cond.skipped) > 6


# Reports


def test_the_report_says_what_the_library_says(qwen_pipe):
    config = CONFIG | {"residual_diff_threshold": 0.2}
    with omni_kernels.patched(qwen_pipe, "cache_dit", config) as handle:
        run(qwen_pipe)
        report = handle.report
    assert report.backend == "cache_dit"
    assert report.steps == STEPS
    assert list(report.branches) == ["cond", "uncond"]
    assert report.notes == [f"decided by cache_dit {cache_dit.__version__}"]
    assert report.blocks_total == 2 * STEPS * 4
    assert report.blocks_run == report.forwards * 4 + report.forwards_saved
    for branch in report.branches.values():
        assert branch.computed[:3] == [0, 1, 2]
        for decision in branch.decisions:
            if decision.distance is None:
                assert decision.reason == "the library's decision"
            elif decision.computed and decision.distance >= 0.2:
                assert decision.reason == "above threshold"
            else:
                assert decision.reason == "below threshold"
                assert decision.distance < 0.2
    json.dumps(report.to_dict())


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_where_nothing_is_measured_no_distance_is_told(qwen_pipe, threshold):
    with omni_kernels.patched(qwen_pipe, "cache_dit", CONFIG | {"residual_diff_threshold": threshold}) as handle:
        run(qwen_pipe)
        decisions = handle.report.branches["cond"].decisions
    assert {decision.distance for decision in decisions} == {None}
    assert any(not decision.computed for decision in decisions) == bool(threshold)


def test_omni_runs_it(saved):
    with Omni(str(saved["qwen_image"]), cache_backend="cache_dit", cache_config=CONFIG) as omni:
        (result,) = omni.generate("a cat", num_inference_steps=6, height=64, width=64, negative_prompt=" ", seed=0)
    assert result.cache.forwards_saved > 0
    assert result.settings["cache_config"]["engine"] == "library"


def test_the_command_line_runs_it(tmp_path, capsys):
    arguments = ["generate", "--prompt", "a red heart", "--steps", "8", "--quiet", "--json", "--out", str(tmp_path)]
    assert main([*arguments, "--cache-backend", "cache_dit", "--cache-config", '{"engine": "library"}']) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["cache"]["forwards_saved"] > 0


def test_a_pipeline_that_is_dropped_needs_the_replaced_functions_no_more():
    omni_kernels.patch(tiny.qwen_image(), "cache_dit", CONFIG)
    assert CachedContextManager.similarity is not OWN_SIMILARITY
    gc.collect()
    assert CachedContextManager.similarity is OWN_SIMILARITY


def test_fused_blocks_run_under_the_library(qwen_pipe):
    with omni_kernels.patched(qwen_pipe, "cache_dit", TAYLORSEER) as handle:
        plain, steps = run(qwen_pipe), skipped(handle)
    with omni_kernels.patched(qwen_pipe, "cache_dit", TAYLORSEER, fuse=True) as handle:
        assert len(handle.fused.replaced) == 4
        torch.testing.assert_close(run(qwen_pipe), plain, rtol=1e-4, atol=1e-4)
        assert skipped(handle) == steps


# In and out


def test_the_librarys_functions_are_replaced_while_a_pipeline_needs_them(qwen_pipe, z_pipe):
    omni_kernels.patch(qwen_pipe, "cache_dit", CONFIG)
    omni_kernels.patch(z_pipe, "cache_dit", CONFIG)
    omni_kernels.patch(cache_dit)
    replaced = CachedContextManager.similarity
    assert replaced is not OWN_SIMILARITY
    omni_kernels.unpatch(qwen_pipe)
    omni_kernels.unpatch(cache_dit)
    assert CachedContextManager.similarity is replaced
    run(z_pipe)
    omni_kernels.unpatch(z_pipe)
    assert CachedContextManager.similarity is OWN_SIMILARITY


def test_two_pipelines_of_one_class_do_not_know_of_each_other(fresh, qwen_pipe):
    latents, _ = fresh
    other = tiny.qwen_image()
    plain = run(other)
    omni_kernels.patch(qwen_pipe, "cache_dit", TAYLORSEER)
    assert torch.equal(run(other), plain)
    omni_kernels.patch(other, "cache_dit", CONFIG | {"residual_diff_threshold": 0.0})
    assert torch.equal(run(qwen_pipe), latents)
    assert torch.equal(run(other), plain)
    omni_kernels.unpatch(qwen_pipe)
    assert torch.equal(run(other), plain)
    omni_kernels.unpatch(other)


def test_a_forward_that_somebody_replaces_between_calls_is_used_and_stays(fresh, qwen_pipe):
    latents, _ = fresh
    handle = omni_kernels.patch(qwen_pipe, "cache_dit", TAYLORSEER)
    own, calls = qwen_pipe.transformer.forward, []

    @functools.wraps(own)
    def theirs(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    qwen_pipe.transformer.forward = theirs
    assert torch.equal(run(qwen_pipe), latents)
    handle.undo()
    assert qwen_pipe.transformer.forward is theirs
    assert len(calls) == 2 * STEPS


def test_a_hook_of_accelerate_that_was_there_stays_and_runs(fresh, qwen_pipe):
    latents, _ = fresh
    calls = []

    class Hook(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    run(qwen_pipe)
    accelerate.hooks.add_hook_to_module(qwen_pipe.transformer, Hook())
    before = namespaces(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, "cache_dit", TAYLORSEER):
        assert torch.equal(run(qwen_pipe), latents)
        assert len(calls) == 2 * STEPS
    assert_same(namespaces(qwen_pipe), before)
    run(qwen_pipe)
    assert len(calls) == 4 * STEPS


def test_a_hook_of_accelerate_that_came_later_stays_and_runs(fresh, qwen_pipe):
    """As those of `enable_model_cpu_offload`, which go and come after each request."""
    latents, steps = fresh
    handle = omni_kernels.patch(qwen_pipe, "cache_dit", TAYLORSEER)
    for _ in range(2):
        accelerate.hooks.add_hook_to_module(qwen_pipe.transformer, accelerate.hooks.ModelHook())
        assert torch.equal(run(qwen_pipe), latents)
        assert skipped(handle) == steps
    handle.undo()
    accelerate.hooks.remove_hook_from_module(qwen_pipe.transformer)
    assert (
        "forward" not in vars(qwen_pipe.transformer)
        or qwen_pipe.transformer.forward.__func__ is type(qwen_pipe.transformer).forward
    )


def test_group_offload_that_came_later_is_no_hindrance(fresh, qwen_pipe):
    latents, steps = fresh
    handle = omni_kernels.patch(qwen_pipe, "cache_dit", TAYLORSEER)
    cpu = torch.device("cpu")
    qwen_pipe.transformer.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )
    assert torch.equal(run(qwen_pipe), latents)
    assert skipped(handle) == steps
    handle.undo()
    run(qwen_pipe, steps=2)


def test_a_library_that_is_taken_out_is_told_of(qwen_pipe):
    transformer = qwen_pipe.transformer
    handle = omni_kernels.patch(qwen_pipe, "cache_dit", TAYLORSEER)

    def take_out(pipe, index, timestep, tensors):
        vars(transformer)["forward"] = functools.partial(type(transformer).forward, transformer)
        return tensors

    with pytest.warns(UserWarning, match=r"is no longer called: .*nothing is cached"):
        run(qwen_pipe, callback_on_step_end=take_out)
    assert handle.report.forwards_saved == 0
    assert sum("no longer called" in note for note in handle.report.notes) == 1
    del vars(transformer)["forward"]
    handle.undo()


def test_the_transformer_cannot_be_copied_while_the_library_is_in_it(qwen_pipe):
    def copy_it(pipe, index, timestep, tensors):
        with pytest.raises(TypeError, match=r"cannot be copied during a call of the pipeline"):
            copy.deepcopy(pipe.transformer)
        return tensors

    with omni_kernels.patched(qwen_pipe, "cache_dit", CONFIG):
        run(qwen_pipe, callback_on_step_end=copy_it)
        copy.deepcopy(qwen_pipe.transformer)


@pytest.mark.parametrize(
    ("kind", "controlnet", "reason"),
    [
        ("LTX2Pipeline", None, "sound besides the video"),
        ("Flux2KleinKVPipeline", None, "changes the image"),
        ("SkyReelsV2DiffusionForcingPipeline", None, "each frame has steps of its own"),
        ("QwenImageControlNetPipeline", object(), "ControlNet"),
        ("StableDiffusion3ControlNetPipeline", object(), "ControlNet"),
        ("HunyuanDiTControlNetPipeline", object(), "ControlNet"),
    ],
)
def test_what_the_library_is_known_to_fail_on_is_refused(qwen_pipe, kind, controlnet, reason):
    other = type(kind, (), {"__call__": lambda self: None})()
    other.transformer, other.scheduler, other.controlnet = qwen_pipe.transformer, qwen_pipe.scheduler, controlnet
    with pytest.raises(ValueError, match=rf"engine 'library' cannot serve {kind}: .*{reason}"):
        omni_kernels.patch(other, "cache_dit", CONFIG)


def test_a_pipeline_that_the_library_caches_already_is_refused(qwen_pipe):
    cache_dit.enable_cache(qwen_pipe, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1))
    with pytest.raises(PatchConflictError, match=r"cache_dit\.disable_cache\(pipe\) first"):
        omni_kernels.patch(qwen_pipe, "cache_dit", CONFIG)
    cache_dit.disable_cache(qwen_pipe)


def test_the_librarys_messages_are_not_printed(qwen_pipe, caplog):
    logging.disable(logging.NOTSET)
    with caplog.at_level(logging.DEBUG), omni_kernels.patched(qwen_pipe, "cache_dit", CONFIG):
        run(qwen_pipe, steps=3)
    assert [record for record in caplog.records if "cache" in record.name and record.levelno <= logging.WARNING] == []
    assert logging.root.manager.disable == logging.NOTSET


# Configurations

CHECK = METHODS["cache_dit"].check


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"decision": "replay"}, "decision must be 'measure'"),
        ({"forecaster": "newton"}, "no forecaster 'newton': it has None, 'reuse', 'taylorseer', 'foca', 'dmd'"),
        ({"forecaster": "hermite"}, "no forecaster 'hermite'"),
    ],
)
def test_keys_that_the_library_cannot_serve_are_named(config, named):
    with pytest.raises(ValueError, match=named):
        CHECK(config | {"engine": "library"})
    CHECK(config)


def of_cache(key):
    return lambda settings: getattr(settings["cache_config"], key)


def of_calibrator(settings):
    calibrator = settings.get("calibrator_config")
    return type(calibrator).__name__, getattr(calibrator, "taylorseer_order", None)


#: key → what is given, where the library's settings have it, and as what
REACHES = {
    "Fn_compute_blocks": ({"Fn_compute_blocks": 2}, of_cache("Fn_compute_blocks"), 2),
    "Bn_compute_blocks": ({"Bn_compute_blocks": 1}, of_cache("Bn_compute_blocks"), 1),
    "max_warmup_steps": ({"max_warmup_steps": 5}, of_cache("max_warmup_steps"), 5),
    "warmup_interval": ({"warmup_interval": 2}, of_cache("warmup_interval"), 2),
    "max_cached_steps": ({"max_cached_steps": 3}, of_cache("max_cached_steps"), 3),
    "max_continuous_cached_steps": ({"max_continuous_cached_steps": 2}, of_cache("max_continuous_cached_steps"), 2),
    "residual_diff_threshold": ({"residual_diff_threshold": 0.3}, of_cache("residual_diff_threshold"), 0.3),
    "enable_taylorseer": ({"enable_taylorseer": True}, of_calibrator, ("TaylorSeerCalibratorConfig", 1)),
    "taylorseer_order": (
        {"enable_taylorseer": True, "taylorseer_order": 2},
        of_calibrator,
        ("TaylorSeerCalibratorConfig", 2),
    ),
    "enable_foca": ({"enable_foca": True}, of_calibrator, ("FoCaCalibratorConfig", None)),
    "enable_dmd": ({"enable_dmd": True}, of_calibrator, ("DMDCalibratorConfig", None)),
    "scm_steps_mask_policy": (
        {"scm_steps_mask_policy": "slow"},
        of_cache("steps_computation_mask"),
        list(steps_mask("slow", STEPS)),
    ),
    "steps_computation_mask": (
        {"steps_computation_mask": "110101010101"},
        of_cache("steps_computation_mask"),
        [1, 1, *5 * [0, 1]],
    ),
    "scm_steps_policy": ({"scm_steps_policy": "static"}, of_cache("steps_computation_policy"), "static"),
    "forecaster": ({"forecaster": "foca"}, of_calibrator, ("FoCaCalibratorConfig", None)),
    "forecaster_order": (
        {"forecaster": "taylorseer", "forecaster_order": 2},
        of_calibrator,
        ("TaylorSeerCalibratorConfig", 2),
    ),
}


@pytest.mark.parametrize("key", [key.name for key in METHODS["cache_dit"].keys])
def test_every_key_reaches_the_library_or_is_refused_by_name(qwen_pipe, key):
    if key == "engine":
        return  # by which all the others come here
    if key in ("decision", "drift_tolerance"):  # the latter counts where decisions are replayed
        with pytest.raises(ValueError, match="decision must be 'measure'"):
            CHECK({"engine": "library", "decision": "replay", "drift_tolerance": 0.2})
        return
    if key.startswith("force_refresh"):  # the policy counts where the hint is given
        with pytest.raises(ValueError, match="force_refresh_step_hint needs 'own'"):
            CHECK({"engine": "library", "force_refresh_step_hint": 3, "force_refresh_step_policy": "repeat"})
        return
    if key == "num_inference_steps":
        with (
            omni_kernels.patched(qwen_pipe, "cache_dit", CONFIG | {key: STEPS + 1}),
            pytest.warns(UserWarning, match=f"num_inference_steps={STEPS + 1}, but the request has {STEPS} steps"),
        ):
            run(qwen_pipe)
        return
    given, found, expected = REACHES[key]
    assert found(settings_of(qwen_pipe, CONFIG | given)) == expected != found(settings_by_default())


@functools.cache
def settings_by_default():
    return settings_of(tiny.qwen_image(), CONFIG)


class EnoughError(Exception):
    """Ends a request whose rest would tell nothing more."""


def settings_of(pipe, config):
    """What the library's manager is told in the first step of a request with this configuration."""
    told, reset = [], CachedContextManager.reset_context

    def recording(self, *args, **settings):
        told.append((self, settings))
        return reset(self, *args, **settings)

    def enough(*args):
        raise EnoughError

    with (
        mock.patch.object(CachedContextManager, "reset_context", recording),
        omni_kernels.patched(pipe, "cache_dit", config) as handle,
    ):
        with pytest.raises(EnoughError):
            run(pipe, callback_on_step_end=enough)
        # A pipeline that the library itself has cached leaves its own contexts on the class for good.
        manager = handle._installed._manager
    (settings,) = (settings for whose, settings in told if whose is manager)
    return settings


@pytest.mark.parametrize("forecaster", ["reuse", "taylorseer", "foca", "dmd"])
def test_the_librarys_forecasters_run(qwen_pipe, forecaster):
    with omni_kernels.patched(qwen_pipe, "cache_dit", CONFIG | {"forecaster": forecaster}) as handle:
        assert torch.isfinite(run(qwen_pipe)).all()
        assert all(skipped(handle))


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(library, "installed", lambda: False)
    with pytest.raises(ModuleNotFoundError, match="pip install cache-dit"):
        CHECK({"engine": "library"})
    CHECK({})


def test_what_is_known_before_the_weights_are_loaded_is_checked():
    stranger = models.TransformerFacts("StrangeTransformer", None)
    assert CHECK({"engine": "library"}, stranger)["engine"] == "library"
    assert CHECK({}, stranger)["engine"] == "own"
    with pytest.raises(ValueError, match="at least one must be left to skip"):
        CHECK({"engine": "library", "Fn_compute_blocks": 4}, models.TransformerFacts("QwenImageTransformer2DModel", 4))


def test_a_version_without_what_is_used_is_refused(monkeypatch, qwen_pipe):
    before = namespaces(qwen_pipe)
    with monkeypatch.context() as patching:
        patching.delattr(CachedContextManager, "clear_contexts")
        with pytest.raises(ValueError, match=r"cache_dit .* has no CachedContextManager\.clear_contexts"):
            omni_kernels.patch(qwen_pipe, "cache_dit", CONFIG)
    assert_same(namespaces(qwen_pipe), before)
