"""Patching: one instance is changed, everything else is left alone, and undoing puts back exactly what was there."""

import copy
import pickle
from types import SimpleNamespace

import cache_dit
import diffusers
import pytest
import tiny
import torch

import omni_kernels
from omni_runtime.cache.session import CacheSession

CONFIG = {"threshold": 0.3}


def latents(pipe, **arguments):
    return tiny.generate(pipe, output_type="latent", **{"num_inference_steps": 5} | arguments)


def patch(pipe):
    return omni_kernels.patch(pipe, "first_block_cache", CONFIG)


def contents(pipe):
    """Everything that a patch could change, by identity, except what a request itself leaves in a scheduler."""
    owners = {"pipe": pipe, "transformer": pipe.transformer, "scheduler": pipe.scheduler}
    found = {(name, key): id(value) for name, owner in owners.items() for key, value in vars(owner).items()}
    found |= {("modules", name): id(child) for name, child in pipe.transformer._modules.items()}
    found |= {("class", name): id(type(owner)) for name, owner in owners.items()}
    found |= {("hook", key): id(hook) for key, hook in pipe.transformer._forward_pre_hooks.items()}
    return found


def class_contents(*instances):
    return {
        (cls, key): value
        for instance in instances
        for cls in type(instance).__mro__[:-1]
        for key, value in vars(cls).items()
    }


# Patch and unpatch


def test_undo_puts_every_slot_back(any_pipe):
    before = contents(any_pipe)
    handle = patch(any_pipe)
    assert contents(any_pipe) != before
    handle.undo()
    assert contents(any_pipe) == before


def test_blocks_are_found_by_their_places_during_a_request(qwen_pipe):
    blocks, found = [*qwen_pipe.transformer.transformer_blocks], []

    def look(pipe, step, timestep, tensors):
        there = pipe.transformer.transformer_blocks
        found.append((there[1], there[-1], [*there[1:3]], len(there)))
        return {}

    patch(qwen_pipe)
    latents(qwen_pipe, num_inference_steps=2, callback_on_step_end=look)
    assert found == 2 * [(blocks[1], blocks[3], blocks[1:3], 4)]


def test_undo_during_a_request_frees_it_and_leaves_a_working_pipeline(qwen_pipe):
    expected = latents(qwen_pipe)
    handle = patch(qwen_pipe)

    def unpatch(pipe, step, timestep, tensors):
        omni_kernels.unpatch(pipe)
        return {}

    latents(qwen_pipe, callback_on_step_end=unpatch)
    assert handle._installed.held_tensors() == []
    assert torch.equal(latents(qwen_pipe), expected)


def test_patching_twice_alike_returns_the_handle_that_is_there(qwen_pipe):
    handle = patch(qwen_pipe)
    assert omni_kernels.patch(qwen_pipe, "first_block_cache", {"threshold": 0.3, "forecaster": None}) is handle


@pytest.mark.parametrize(("backend", "config"), [("tea_cache", None), ("first_block_cache", {"threshold": 0.2})])
def test_patching_twice_otherwise_is_a_conflict(qwen_pipe, backend, config):
    handle = patch(qwen_pipe)
    installed = contents(qwen_pipe)
    with pytest.raises(
        omni_kernels.PatchConflictError,
        match=r"already patched: call omni_kernels.unpatch\(pipe\) first. It has first_block_cache",
    ):
        omni_kernels.patch(qwen_pipe, backend, config)
    assert contents(qwen_pipe) == installed
    assert handle.active


def test_unpatch_without_a_patch_and_undo_twice_do_nothing(qwen_pipe):
    before = contents(qwen_pipe)
    omni_kernels.unpatch(qwen_pipe)
    handle = patch(qwen_pipe)
    omni_kernels.unpatch(qwen_pipe)
    handle.undo()
    assert contents(qwen_pipe) == before
    assert not handle.active


def test_undone_handle_does_not_undo_a_later_patch(qwen_pipe):
    first = patch(qwen_pipe)
    first.undo()
    second = patch(qwen_pipe)
    first.undo()
    assert second.active
    latents(qwen_pipe)
    assert second.report.forwards_saved > 0
    assert first.report is None


def test_patched_undoes_at_the_end_and_after_an_exception(qwen_pipe):
    before = contents(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, "first_block_cache", CONFIG) as handle:
        assert handle.active
    assert contents(qwen_pipe) == before
    with pytest.raises(KeyError), omni_kernels.patched(qwen_pipe, "first_block_cache", CONFIG):
        raise KeyError
    assert contents(qwen_pipe) == before


def test_patched_within_patched_leaves_the_outer_patch(qwen_pipe):
    outer = patch(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, "first_block_cache", CONFIG) as inner:
        assert inner is outer
    assert outer.active


def test_patch_of_nothing_changes_nothing_but_can_be_undone(qwen_pipe):
    expected = latents(qwen_pipe)
    before = contents(qwen_pipe)
    handle = omni_kernels.patch(qwen_pipe, fuse=False)
    assert contents(qwen_pipe).items() - before.items() == {(("pipe", "_omni_kernels_handle"), id(handle))}
    assert handle.report is None
    handle.undo()
    assert contents(qwen_pipe) == before
    assert torch.equal(latents(qwen_pipe), expected)


def test_report_is_of_the_last_request_and_outlives_the_patch(qwen_pipe):
    handle = patch(qwen_pipe)
    assert handle.report is None
    latents(qwen_pipe)
    latents(qwen_pipe, num_inference_steps=3)
    handle.undo()
    assert handle.report.steps == 3
    assert [d.step for d in handle.report.branches["cond"].decisions] == [0, 1, 2]
    assert handle.report.backend == "first_block_cache"


def test_failing_installation_leaves_nothing(qwen_pipe, monkeypatch):
    before = contents(qwen_pipe)
    monkeypatch.setattr(CacheSession, "take_calls", lambda self, *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        patch(qwen_pipe)
    assert contents(qwen_pipe) == before


# Only this instance


def test_other_pipeline_of_the_class_is_left_alone(qwen_pipe):
    other = tiny.qwen_image()
    expected, before = latents(other), contents(other)
    classes = class_contents(other, other.transformer, other.scheduler, other.transformer.transformer_blocks)
    handle = patch(qwen_pipe)
    assert not torch.equal(latents(qwen_pipe), expected)
    assert contents(other) == before
    assert torch.equal(latents(other), expected)
    assert class_contents(other, other.transformer, other.scheduler, other.transformer.transformer_blocks) == classes
    assert handle.report.complete


def test_two_patched_pipelines_keep_their_requests_apart(qwen_pipe):
    other = tiny.qwen_image()
    first, second = patch(qwen_pipe), omni_kernels.patch(other, "cache_dit", {"max_warmup_steps": 2})
    expected = latents(qwen_pipe)
    reports = []

    def run_other(pipe, step, timestep, tensors):
        latents(other, num_inference_steps=3)
        reports.append(second.report)
        return {}

    assert torch.equal(latents(qwen_pipe, callback_on_step_end=run_other), expected)
    assert len(reports) == 5
    assert all(report.complete and report.steps == 3 for report in reports)
    assert first.report.complete


# The patched model is still a model


def test_state_dict_and_module_names_are_unchanged(any_pipe):
    before = {name: tensor.data_ptr() for name, tensor in any_pipe.transformer.state_dict().items()}
    names = [name for name, _ in any_pipe.transformer.named_modules()]
    patch(any_pipe)
    assert {name: tensor.data_ptr() for name, tensor in any_pipe.transformer.state_dict().items()} == before
    assert [name for name, _ in any_pipe.transformer.named_modules()] == names
    any_pipe.transformer.load_state_dict(any_pipe.transformer.state_dict())


def test_block_list_is_still_a_list_of_blocks(qwen_pipe):
    plain = list(qwen_pipe.transformer.transformer_blocks)
    patch(qwen_pipe)
    blocks = qwen_pipe.transformer.transformer_blocks
    assert isinstance(blocks, torch.nn.ModuleList)
    assert len(blocks) == 4
    assert list(blocks) == plain
    assert blocks[1] is plain[1]
    assert blocks[-1] is plain[3]
    assert list(blocks[1:3]) == plain[1:3]
    assert plain[2] in blocks


def test_blocks_change_with_the_model(qwen_pipe):
    patch(qwen_pipe)
    qwen_pipe.transformer.to(torch.bfloat16)
    omni_kernels.unpatch(qwen_pipe)
    assert {p.dtype for p in qwen_pipe.transformer.transformer_blocks.parameters()} == {torch.bfloat16}


def test_copy_of_the_transformer_is_plain_and_works(qwen_pipe):
    expected = latents(qwen_pipe)
    handle = patch(qwen_pipe)
    cached = latents(qwen_pipe)
    other = tiny.qwen_image()
    for duplicate in (copy.deepcopy(qwen_pipe.transformer), pickle.loads(pickle.dumps(qwen_pipe.transformer))):
        assert type(duplicate.transformer_blocks) is torch.nn.ModuleList
        assert duplicate.transformer_blocks[0] is not qwen_pipe.transformer.transformer_blocks[0]
        other.transformer = duplicate
        assert torch.equal(latents(other), expected)
        with handle.sampling() as sampling, duplicate.cache_context("cond"):
            assert sampling.context is None
    assert torch.equal(latents(qwen_pipe), cached)
    assert handle.active


def test_copy_of_the_scheduler_does_not_drive_the_original(qwen_pipe):
    handle = patch(qwen_pipe)
    latents(qwen_pipe, num_inference_steps=4)
    report = handle.report
    for duplicate in (copy.deepcopy(qwen_pipe.scheduler), pickle.loads(pickle.dumps(qwen_pipe.scheduler))):
        duplicate.set_timesteps(7, mu=0.5)
        duplicate.step(torch.ones(1, 2), duplicate.timesteps[0], torch.ones(1, 2))
        assert len(duplicate.timesteps) == 7
    assert len(qwen_pipe.scheduler.timesteps) == 4
    assert handle.report == report


def test_copy_of_the_pipeline_is_not_patched(qwen_pipe):
    expected = latents(qwen_pipe)
    handle = patch(qwen_pipe)
    cached = latents(qwen_pipe)
    duplicate = copy.deepcopy(qwen_pipe)
    report = handle.report
    assert torch.equal(latents(duplicate), expected)
    assert handle.report == report
    own = omni_kernels.patch(duplicate, "first_block_cache", CONFIG)
    assert torch.equal(latents(duplicate), cached)
    own.undo()
    assert handle.active


def test_copy_keeps_what_somebody_installed_before(qwen_pipe):
    def step(*args, **kwargs):
        return "theirs"

    qwen_pipe.scheduler.step = step
    patch(qwen_pipe)
    assert copy.deepcopy(qwen_pipe.scheduler).step is step


def test_saved_while_patched_is_saved_as_ever(qwen_pipe, tmp_path):
    expected = latents(qwen_pipe)
    qwen_pipe.save_pretrained(tmp_path / "plain")
    patch(qwen_pipe)
    qwen_pipe.save_pretrained(tmp_path / "patched")
    plain, patched = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("plain", "patched")
    )
    assert patched == plain
    loaded = latents(diffusers.QwenImagePipeline.from_pretrained(tmp_path / "patched"))
    assert torch.allclose(loaded, expected, rtol=0, atol=1e-5)  # where weights lie may decide how products are rounded


# Conflicts


def exchange_class(pipe):
    ours = type(pipe)
    pipe.__class__ = type("Theirs", (ours,), {})
    return lambda: setattr(pipe, "__class__", ours)


def test_undo_under_somebody_elses_patch_raises_and_changes_nothing(qwen_pipe):
    before = contents(qwen_pipe)
    handle = patch(qwen_pipe)
    take_back = exchange_class(qwen_pipe)
    installed = contents(qwen_pipe)
    for undo in (handle.undo, lambda: omni_kernels.unpatch(qwen_pipe)):
        with pytest.raises(omni_kernels.PatchConflictError, match=r"class of this QwenImagePipeline is now .*Theirs"):
            undo()
    assert contents(qwen_pipe) == installed
    assert handle.active
    take_back()
    handle.undo()
    assert contents(qwen_pipe) == before


def replace_blocks(pipe):
    pipe.transformer.transformer_blocks = torch.nn.ModuleList(pipe.transformer.transformer_blocks)


def wrap_step(pipe):
    own = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: own(*args, **kwargs)


@pytest.mark.parametrize("interfere", [replace_blocks, wrap_step])
def test_what_others_put_there_between_requests_stays_and_is_used(qwen_pipe, interfere):
    handle = patch(qwen_pipe)
    expected = latents(qwen_pipe)
    interfere(qwen_pipe)
    theirs = qwen_pipe.transformer.transformer_blocks, vars(qwen_pipe.scheduler).get("step")
    assert torch.equal(latents(qwen_pipe), expected)
    assert handle.report.forwards_saved > 0
    handle.undo()
    assert (qwen_pipe.transformer.transformer_blocks, vars(qwen_pipe.scheduler).get("step")) == theirs


def compile_in_place(pipe):
    pipe.transformer.compile()


def compile_around(pipe):
    pipe.transformer = torch.compile(pipe.transformer)


def enable_diffusers_cache(pipe):
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))


def enable_context_parallelism(pipe):
    pipe.transformer._parallel_config = diffusers.ParallelConfig(
        context_parallel_config=diffusers.ContextParallelConfig(ulysses_degree=2)
    )


@pytest.mark.parametrize(
    ("state", "error", "named"),
    [
        (compile_in_place, omni_kernels.PatchConflictError, "compiled as a whole .*compile_repeated_blocks"),
        (compile_around, omni_kernels.PatchConflictError, "compiled as a whole .*compile_repeated_blocks"),
        (enable_diffusers_cache, omni_kernels.PatchConflictError, "diffusers' own cache .*disable_cache"),
    ],
)
def test_what_a_cache_cannot_live_with_is_refused_by_name(qwen_pipe, state, error, named):
    state(qwen_pipe)
    before = contents(qwen_pipe)
    with pytest.raises(error, match=named):
        patch(qwen_pipe)
    assert contents(qwen_pipe) == before


@pytest.mark.parametrize("state", [compile_in_place, enable_diffusers_cache])
def test_what_came_later_is_refused_by_name_at_the_next_request(qwen_pipe, state):
    expected = latents(qwen_pipe)
    handle = patch(qwen_pipe)
    cached = latents(qwen_pipe)
    state(qwen_pipe)
    with pytest.raises(omni_kernels.PatchConflictError, match=r"compiled as a whole|diffusers' own cache"):
        latents(qwen_pipe)
    qwen_pipe.transformer._compiled_call_impl = None
    qwen_pipe.transformer.disable_cache()
    assert torch.equal(latents(qwen_pipe), cached)
    assert handle.report.forwards_saved > 0
    handle.undo()
    assert torch.equal(latents(qwen_pipe), expected)


def test_the_library_is_refused_under_parallelism(qwen_pipe):
    """Ranks that decide alike: `tests/parallel/test_shared_sequences.py`."""
    enable_context_parallelism(qwen_pipe)
    before = contents(qwen_pipe)
    with pytest.raises(ValueError, match=r"context parallelism, where engine 'library'.*engine 'own'"):
        omni_kernels.patch(qwen_pipe, "cache_dit", {"engine": "library"})
    assert contents(qwen_pipe) == before


def test_parallelism_enabled_under_the_library_is_refused_before_anything_is_computed(qwen_pipe):
    expected = latents(qwen_pipe)
    handle = omni_kernels.patch(qwen_pipe, "cache_dit", {"engine": "library"})
    cached = latents(qwen_pipe)
    report = handle.report
    enable_context_parallelism(qwen_pipe)
    computed = []
    hook = qwen_pipe.transformer.register_forward_pre_hook(lambda *_: computed.append(1))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"QwenImageTransformer2DModel runs under context parallelism.*unpatch"):
            latents(qwen_pipe)
    hook.remove()
    assert not computed
    assert handle.report == report
    del qwen_pipe.transformer._parallel_config  # as it was: the class's
    assert torch.equal(latents(qwen_pipe), cached)
    handle.undo()
    assert torch.equal(latents(qwen_pipe), expected)


@pytest.mark.parametrize("backend", ["velocity_cache", "easy_cache"])
def test_whole_steps_are_skipped_under_context_parallelism(qwen_pipe, backend):
    """By the model's output, which every rank has all of; two ranks in `tests/parallel/test_context_parallel.py`."""
    handle = omni_kernels.patch(qwen_pipe, backend)
    expected = latents(qwen_pipe)
    enable_context_parallelism(qwen_pipe)
    assert torch.equal(latents(qwen_pipe), expected)
    handle.undo()
    omni_kernels.patch(qwen_pipe, backend)


def test_cache_dit_enabled_is_refused_and_disabled_is_not(qwen_pipe):
    expected = latents(qwen_pipe)
    cache_dit.enable_cache(qwen_pipe)
    try:
        with pytest.raises(omni_kernels.PatchConflictError, match=r"cache-dit .*cache_dit.disable_cache\(pipe\)"):
            patch(qwen_pipe)
    finally:
        cache_dit.disable_cache(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, "first_block_cache", {"threshold": 0.0}):
        assert torch.equal(latents(qwen_pipe), expected)


def test_diffusers_cache_disabled_again_is_no_hindrance(qwen_pipe):
    enable_diffusers_cache(qwen_pipe)
    qwen_pipe.transformer.disable_cache()
    handle = patch(qwen_pipe)
    latents(qwen_pipe)
    assert handle.report.forwards_saved > 0


@pytest.mark.parametrize("pipe", [None, "Qwen/Qwen-Image", torch.nn.Linear(2, 2), SimpleNamespace(scheduler=1)])
def test_what_is_no_pipeline_is_refused_by_name(pipe):
    with pytest.raises(ValueError, match=rf"{type(pipe).__name__} has no transformer"):
        patch(pipe)
