"""Coexistence: adapters, offload hooks, casts, compiled blocks and ControlNets go on working on a patched pipeline."""

import itertools

import accelerate
import diffusers
import peft
import pytest
import tiny
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry
from pairs import by_gate, in_turn
from peft.utils import hotswap

import omni_kernels

CPU = torch.device("cpu")
SKIPPING = {
    "tea_cache": {"rel_l1_thresh": 0.3, "coefficients": [0, 0, 0, 1, 0]},
    "first_block_cache": {"threshold": 0.4},
    "mag_cache": {"threshold": 0.4, "retention_ratio": 0.0, "mag_ratios": [1.0, 1.1]},
    "sea_cache": {"threshold": 0.6},
    "easy_cache": {"thresh": 0.6, "ret_steps": 0},
    "velocity_cache": {"schedule": [0, 1, 3, 4]},
}
#: Nothing skipped, of two steps.
NEVER = {backend: {**config, next(iter(config)): 1e-9} for backend, config in SKIPPING.items()} | {
    "velocity_cache": {"schedule": [0, 1]},
}


def latents(pipe, **arguments):
    return tiny.generate(pipe, output_type="latent", **{"num_inference_steps": 5} | arguments)


def cached(pipe, backend):
    """Latents of a request under the cache, which must have skipped something."""
    with omni_kernels.patched(pipe, backend, SKIPPING[backend]) as handle:
        result = latents(pipe)
        assert handle.report.forwards_saved > 0
        assert handle.report.complete
    return result


def build(name):
    return tiny.PIPELINES[name]()


# Adapters


def add_lora(pipe, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "img_mod.1"], init_lora_weights=False)
        pipe.transformer.add_adapter(config, f"lora{seed}")


@pytest.mark.parametrize("backend", by_gate(SKIPPING))
def test_lora_added_after_patching_counts_as_if_added_before(qwen_pipe, backend):
    without = cached(qwen_pipe, backend)
    before = build("qwen_image")
    add_lora(before)
    expected = cached(before, backend)
    assert not torch.equal(expected, without)
    handle = omni_kernels.patch(qwen_pipe, backend, SKIPPING[backend])
    latents(qwen_pipe)
    add_lora(qwen_pipe)
    assert torch.equal(latents(qwen_pipe), expected)
    qwen_pipe.transformer.delete_adapters("lora0")
    assert torch.equal(latents(qwen_pipe), without)
    handle.undo()
    assert torch.equal(cached(qwen_pipe, backend), without)


def test_lora_file_loads_into_a_patched_pipeline(qwen_pipe, tmp_path):
    other = build("qwen_image")
    add_lora(other)
    layers = peft.get_peft_model_state_dict(other.transformer, adapter_name="lora0")
    diffusers.QwenImagePipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    loaded = build("qwen_image")
    without = cached(loaded, "first_block_cache")
    loaded.load_lora_weights(tmp_path, adapter_name="lora")
    expected = cached(loaded, "first_block_cache")
    assert not torch.equal(expected, without)
    omni_kernels.patch(qwen_pipe, "first_block_cache", SKIPPING["first_block_cache"])
    qwen_pipe.load_lora_weights(tmp_path, adapter_name="lora")
    assert torch.equal(latents(qwen_pipe), expected)
    qwen_pipe.fuse_lora()
    qwen_pipe.unload_lora_weights()
    torch.testing.assert_close(latents(qwen_pipe), expected, atol=1e-3, rtol=1e-3)


def test_lora_is_prepared_for_hot_swaps_on_a_cached_pipeline(qwen_pipe):
    """peft takes a transformer whose calls somebody has taken for a compiled one, and refuses."""
    expected = cached(qwen_pipe, "tea_cache")
    omni_kernels.patch(qwen_pipe, "tea_cache", SKIPPING["tea_cache"])
    for _ in range(2):
        assert torch.equal(latents(qwen_pipe), expected)
        add_lora(qwen_pipe)
        hotswap.prepare_model_for_compiled_hotswap(qwen_pipe.transformer, target_rank=4)
        qwen_pipe.transformer.delete_adapters("lora0")


# Hooks


class Counting(ModelHook):
    """An accelerate hook that counts the calls that it sees."""

    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


class Registered(diffusers.hooks.ModelHook):
    """A diffusers hook that counts the calls that it sees."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def new_forward(self, module, *args, **kwargs):
        self.calls += 1
        return self.fn_ref.original_forward(*args, **kwargs)


def accelerate_hook(transformer):
    hook = Counting()
    add_hook_to_module(transformer, hook)
    return hook, lambda: remove_hook_from_module(transformer)


def diffusers_hook(transformer):
    hook = Registered()
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    registry.register_hook(hook, "counting")
    return hook, lambda: registry.remove_hook("counting")


@pytest.mark.parametrize("attach", [accelerate_hook, diffusers_hook])
@pytest.mark.parametrize(("hook_first", "undo_first"), in_turn([True, False], [True, False]))
def test_hooks_and_patch_come_and_go_in_any_order(qwen_pipe, attach, hook_first, undo_first):
    plain = latents(qwen_pipe)
    expected = cached(qwen_pipe, "first_block_cache")
    steps = [
        lambda: attach(qwen_pipe.transformer),
        lambda: omni_kernels.patch(qwen_pipe, "first_block_cache", SKIPPING["first_block_cache"]),
    ]
    if hook_first:
        (hook, detach), handle = steps[0](), steps[1]()
    else:
        handle, (hook, detach) = steps[1](), steps[0]()
    assert torch.equal(latents(qwen_pipe), expected)
    assert hook.calls == 10
    if undo_first:
        handle.undo()
        assert torch.equal(latents(qwen_pipe), plain)
        assert hook.calls == 20
        detach()
    else:
        detach()
        assert torch.equal(latents(qwen_pipe), expected)
        assert hook.calls == 10
        handle.undo()
    assert torch.equal(latents(qwen_pipe), plain)


def test_hooks_on_blocks_see_the_blocks_that_run(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "first_block_cache", SKIPPING["first_block_cache"])
    hooks = []
    for block in qwen_pipe.transformer.transformer_blocks:
        hooks.append(Counting())
        add_hook_to_module(block, hooks[-1])
    latents(qwen_pipe)
    computed = handle.report.forwards
    assert [hook.calls for hook in hooks] == [10, computed, computed, computed]
    assert sum(hook.calls for hook in hooks) == handle.report.blocks_run


@pytest.mark.parametrize(("backend", "name"), in_turn(SKIPPING, ["qwen_image", "z_image", "flux"]))
def test_weights_offloaded_by_accelerate_are_fetched(name, backend):
    pipe = build(name)
    expected = cached(pipe, backend)
    accelerate.cpu_offload(pipe.transformer, execution_device=CPU)
    assert all(parameter.is_meta for parameter in pipe.transformer.parameters())
    torch.testing.assert_close(cached(pipe, backend), expected)


@pytest.mark.parametrize(("level", "patch_first"), in_turn(["block_level", "leaf_level"], [True, False]))
def test_group_offload_keeps_working(qwen_pipe, level, patch_first):
    plain, expected = latents(qwen_pipe), cached(qwen_pipe, "tea_cache")
    if patch_first:
        omni_kernels.patch(qwen_pipe, "tea_cache", SKIPPING["tea_cache"])
    blocks_per_group = {"num_blocks_per_group": 2} if level == "block_level" else {}
    qwen_pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type=level, **blocks_per_group
    )
    if not patch_first:
        omni_kernels.patch(qwen_pipe, "tea_cache", SKIPPING["tea_cache"])
    assert torch.equal(latents(qwen_pipe), expected)
    omni_kernels.unpatch(qwen_pipe)
    assert torch.equal(latents(qwen_pipe), plain)


@pytest.mark.parametrize("backend", ["tea_cache", "sea_cache"])
def test_weights_that_group_offload_keeps_on_the_disk_are_there_when_they_are_watched(qwen_pipe, tmp_path, backend):
    """Block 0's modulation is read before block 0 is called, or instead: until then its weights are elsewhere."""
    plain, expected = latents(qwen_pipe), cached(qwen_pipe, backend)
    qwen_pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path),
    )  # fmt: skip
    torch.testing.assert_close(cached(qwen_pipe, backend), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(latents(qwen_pipe), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["qwen_image", *(pytest.param(name, marks=pytest.mark.long) for name in ("z_image", "flux"))]
)
def test_layerwise_casting_keeps_working(name):
    pipe = build(name)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    plain = latents(pipe)
    for backend in SKIPPING:
        assert not torch.equal(cached(pipe, backend), plain)
    assert torch.equal(latents(pipe), plain)


def test_pipelines_own_offload_hooks_are_still_called(qwen_pipe):
    calls = []
    qwen_pipe.maybe_free_model_hooks = lambda: calls.append("freed")
    with omni_kernels.patched(qwen_pipe, "first_block_cache", SKIPPING["first_block_cache"]):
        latents(qwen_pipe)
    assert calls == ["freed"]


@pytest.mark.parametrize("backend", by_gate(SKIPPING))
def test_compiled_blocks_run_compiled(qwen_pipe, backend, monkeypatch):
    """Only the compiler is left out, which takes its time and sees one block at a time anyway."""
    calls = []

    def compiled(function, **options):
        return lambda *args, **kwargs: [calls.append(options), function(*args, **kwargs)][1]

    monkeypatch.setattr(torch, "compile", compiled)
    expected = cached(qwen_pipe, backend)
    with omni_kernels.patched(qwen_pipe, backend, SKIPPING[backend]) as handle:
        qwen_pipe.transformer.compile_repeated_blocks(fullgraph=True)
        assert torch.equal(latents(qwen_pipe), expected)
        assert calls == [{"fullgraph": True}] * handle.report.blocks_run


@pytest.mark.parametrize("backend", by_gate(SKIPPING))
def test_gradient_checkpointing_calls_blocks_by_position(qwen_pipe, backend):
    expected = latents(qwen_pipe)
    qwen_pipe.transformer.enable_gradient_checkpointing()
    handle = omni_kernels.patch(qwen_pipe, backend, NEVER[backend])
    noise = torch.randn(1, 16, 64)
    arguments = {
        "hidden_states": noise,
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
    }
    qwen_pipe.transformer.requires_grad_(False)  # else a gradient is asked for, and all is the model's own
    with handle.sampling(), torch.enable_grad():
        qwen_pipe.scheduler.set_timesteps(2, mu=0.5)
        checkpointed = qwen_pipe.transformer(**arguments).sample
    assert handle.report.branches["0"].decisions[0].reason == "nothing cached yet"
    omni_kernels.unpatch(qwen_pipe)
    qwen_pipe.transformer.disable_gradient_checkpointing()
    assert torch.equal(checkpointed, qwen_pipe.transformer(**arguments).sample)
    assert torch.equal(latents(qwen_pipe), expected)


# ControlNet


def residuals(count, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return [0.5 * torch.randn(1, tokens, 64, generator=generator) for _ in range(count)]


def qwen_call(samples):
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
        "controlnet_block_samples": residuals(samples, 16, seed=1) if samples else None,
    }


def flux_call(samples):
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(5, 3),
        "controlnet_block_samples": residuals(samples, 16, seed=1) if samples else None,
        "controlnet_single_block_samples": residuals(samples, 16, seed=2) if samples else None,
    }


def z_image_call(samples):
    generator = torch.Generator().manual_seed(0)
    added = residuals(samples, 64, seed=1)  # 16 image and 5 text tokens, each padded to 32
    return {
        "x": [torch.randn(16, 1, 8, 8, generator=generator)],
        "t": torch.tensor([0.5]),
        "cap_feats": [torch.randn(5, 32, generator=generator)],
        "controlnet_block_samples": dict(enumerate(added)) if samples else None,
    }


CALLS = {"qwen_image": qwen_call, "flux": flux_call, "z_image": z_image_call}
SITES = [(first, last) for first, last in itertools.product([1, 2, 3], [0, 1, 2]) if first + last < 4]  # of 4 blocks


def output_of(pipe, call):
    with torch.no_grad():
        (output,) = pipe.transformer(**call, return_dict=False)
    return output[0] if isinstance(output, list) else output


def site_config(site, threshold):
    first, last = site
    return {
        "Fn_compute_blocks": first,
        "Bn_compute_blocks": last,
        "max_warmup_steps": 0,
        "residual_diff_threshold": threshold,
    }


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("samples", [1, 2])
def test_computed_step_with_a_controlnet_changes_no_bit(name, samples):
    pipe, call = build(name), CALLS[name](samples)
    expected = output_of(pipe, call)
    assert not torch.allclose(expected, output_of(pipe, CALLS[name](0)), atol=1e-2), "the residuals count"
    for site in SITES:
        with omni_kernels.patched(pipe, "cache_dit", site_config(site, 0.0)) as handle, handle.sampling():
            pipe.scheduler.set_timesteps(2, mu=0.5)
            assert torch.equal(output_of(pipe, call), expected)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("samples", [1, 2])
def test_skipped_step_with_a_controlnet_counts_its_residuals_once(name, samples):
    """When the same input recurs, what a skipped step returns is what a computed one did."""
    pipe, call = build(name), CALLS[name](samples)
    backends = [("cache_dit", site_config(site, 1.0)) for site in SITES]
    backends.append(("tea_cache", {"rel_l1_thresh": 1.0}))
    expected = output_of(pipe, call)
    for backend, config in backends:
        with omni_kernels.patched(pipe, backend, config) as handle, handle.sampling():
            pipe.scheduler.set_timesteps(3, mu=0.5)
            for step in range(2):
                torch.testing.assert_close(output_of(pipe, call), expected, atol=2e-5, rtol=1e-5)
                pipe.scheduler.step(torch.ones(1), pipe.scheduler.timesteps[step], torch.ones(1))
            assert handle.report.branches["0"].skipped == [1]


def test_controlnet_of_a_skipped_step_still_acts_behind_the_site():
    """The residual that the model adds after the last block is today's, not the stored one."""
    pipe, call = build("qwen_image"), qwen_call(4)
    with omni_kernels.patched(pipe, "first_block_cache", {"threshold": 1.0}) as handle, handle.sampling():
        pipe.scheduler.set_timesteps(3, mu=0.5)
        output_of(pipe, call)
        pipe.scheduler.step(torch.ones(1), pipe.scheduler.timesteps[0], torch.ones(1))
        call["controlnet_block_samples"][3] = residuals(1, 16, seed=9)[0]
        skipped = output_of(pipe, call)
    torch.testing.assert_close(skipped, output_of(pipe, call), atol=2e-5, rtol=1e-5)


def test_controlnet_pipeline_runs_under_the_cache(qwen_pipe):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        controlnet = diffusers.QwenImageControlNetModel.from_transformer(
            qwen_pipe.transformer, num_layers=2, attention_head_dim=32, num_attention_heads=2
        )
        for layer in (controlnet.controlnet_x_embedder, *controlnet.controlnet_blocks):
            torch.nn.init.normal_(layer.weight, std=0.1)
    pipe = diffusers.QwenImageControlNetPipeline(**qwen_pipe.components, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)

    def run():
        return pipe(
            prompt="a cat",
            negative_prompt=" ",
            control_image=tiny.reference_image(64),
            height=64,
            width=64,
            num_inference_steps=6,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images

    expected = run()
    assert not torch.equal(expected, latents(qwen_pipe, num_inference_steps=6))
    with omni_kernels.patched(pipe, "first_block_cache", {"threshold": 0.0}):
        assert torch.equal(run(), expected)
    with omni_kernels.patched(pipe, "first_block_cache", {"threshold": 0.2}) as handle:
        near = run()
        assert handle.report.forwards_saved > 0
    assert (near - expected).norm() < 0.1 * expected.norm()
