"""The plug-in for vLLM-Omni, on stand-ins of its interfaces. `test_real.py` runs the package itself."""

import logging

import diffusers
import pytest
import torch
import vllm_omni_stand_in

import omni_kernels
from omni_runtime import vllm_omni as plugin
from omni_runtime.cache.methods import VELOCITY_CACHE


@pytest.fixture
def omni():
    """The stand-in, with the plug-in registered."""
    with vllm_omni_stand_in.installed() as module:
        plugin.register()
        try:
            yield module
        finally:
            plugin.unregister()


@pytest.fixture
def latents():
    return torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))


def made(omni, pipe, **config):
    """A backend, as the runner makes and enables it."""
    backend = omni.runner.get_cache_backend("velocity_cache", config)
    backend.enable(pipe)
    return backend


def test_both_places_of_the_function_are_replaced_and_restored():
    with vllm_omni_stand_in.installed() as module:
        own = module.get_cache_backend
        plugin.register()
        plugin.register()
        assert module.get_cache_backend is module.runner.get_cache_backend is not own
        assert module.get_cache_backend(None, None) is None
        with pytest.raises(ValueError, match="Unsupported cache backend: other"):
            module.get_cache_backend("other", {})
        assert isinstance(module.get_cache_backend("velocity_cache", {}), module.CacheBackend)
        plugin.unregister()
        assert module.get_cache_backend is module.runner.get_cache_backend is own


def test_another_vllm_omni_is_refused_by_its_version(caplog):
    with vllm_omni_stand_in.installed() as module:
        module.__version__ = "0.99.0"
        own = module.get_cache_backend = lambda name, config, more: None
        with caplog.at_level(logging.WARNING):
            plugin.register()
        assert module.get_cache_backend is own
    assert "vLLM-Omni 0.99.0" in caplog.text
    assert "get_cache_backend takes name, config, not cache_backend, cache_config" in caplog.text
    assert "diffusion_model_runner does not call the get_cache_backend" in caplog.text


def test_unknown_keys_are_errors_by_name(omni):
    for config, message in (
        ({"budgett": 5}, "velocity_cache has no key 'budgett': did you mean 'budget'"),
        ({"rel_l1_thresh": 0.3}, "velocity_cache has no key 'rel_l1_thresh'"),
        ({"budget": 1}, "budget"),
    ):
        with pytest.raises(ValueError, match=message):
            omni.get_cache_backend("velocity_cache", config)
    with pytest.raises(ValueError, match="fused_blocks takes no keys, but got 'budget'"):
        omni.get_cache_backend("fused_blocks", {"budget": 5})
    with pytest.raises(TypeError, match="velocity_cache: fuse must be True or False, not 'yes'"):
        omni.get_cache_backend("velocity_cache", {"fuse": "yes"})


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("negative", [None, -0.2])
def test_skipped_steps_run_no_transformer_and_step_along_the_forecast(omni, latents, several, negative):
    pipe = omni.Pipeline(several)
    backend = made(omni, pipe, schedule=[0, 1, 2, 5, 9], corrector_order=0, reach=1.0)
    with torch.no_grad():
        found = pipe.forward(latents, negative=negative)
    assert pipe.transformer.calls == 5 * (1 if negative is None else 2)
    assert backend.handle.report.branches["0"].computed == [0, 1, 2, 5, 9]
    assert backend.handle.report.complete

    sigmas, x, known = pipe.scheduler.sigmas.tolist(), latents, []
    with torch.no_grad():
        for step in range(10):
            if step in (0, 1, 2, 5, 9):
                v = 0.3 + torch.tanh(pipe.transformer.layer(x)) * (1 + sigmas[step])
                if negative is not None:
                    other = negative + torch.tanh(pipe.transformer.layer(x)) * (1 + sigmas[step])
                    v = other + 4.0 * (v - other)
                known = [(sigmas[step], v), *known[:1]]
            else:
                (s0, v0), (s1, v1) = known
                ahead = max(sigmas[step] - s0, s0 - s1)  # both are negative: no farther than the last distance
                v = v0 + (v0 - v1) / (s0 - s1) * ahead
            x = x + (sigmas[step + 1] - sigmas[step]) * v
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)


def test_auto_takes_presets(omni, latents):
    pipe = omni.Pipeline()
    backend = omni.runner.get_cache_backend("auto", {"quality": "high"})
    backend.enable(pipe)
    with torch.no_grad():
        found = pipe.forward(latents, steps=20)
        assert pipe.transformer.calls == 10
        backend.disable(pipe)
        backend = made(omni, pipe, budget=10)
        assert torch.equal(pipe.forward(latents, steps=20), found)
    backend.disable(pipe)
    pipe.scheduler = diffusers.HeunDiscreteScheduler()
    with pytest.raises(ValueError, match="HeunDiscreteScheduler"):
        omni.runner.get_cache_backend("auto", {"quality": "high"}).enable(pipe)


def test_a_request_starts_clean_without_refresh_and_after_an_error(omni, latents):
    pipe = omni.Pipeline()
    backend = made(omni, pipe, budget=4)
    with torch.no_grad():
        first = pipe.forward(latents)
        pipe.fails_at = 3
        with pytest.raises(RuntimeError, match="interrupted"):
            pipe.forward(latents * 2)
        pipe.fails_at = None
        assert backend.handle._installed.held_tensors() == []
        assert torch.equal(pipe.forward(latents), first)
        pipe.forward(latents[:, :2], steps=7)
    assert backend.handle.report.steps == 7


def test_refresh_refuses_keys_that_do_not_fit_the_request(omni):
    pipe = omni.Pipeline()
    backend = made(omni, pipe, budget=8)
    backend.refresh(pipe, 10)
    with pytest.raises(ValueError, match="budget is 8 computed steps, but the request has 4"):
        backend.refresh(pipe, 4)


def test_disable_restores_the_pipeline(omni, latents):
    pipe = omni.Pipeline()
    before, scheduler = dict(vars(pipe)), dict(vars(pipe.scheduler))
    backend = made(omni, pipe, budget=4)
    with pytest.raises(ValueError, match="enabled already"):
        backend.enable(pipe)
    backend.disable(pipe)
    backend.disable(pipe)
    assert not backend.is_enabled()
    assert vars(pipe) == before
    assert vars(pipe.scheduler) == scheduler
    assert type(pipe) is omni.Pipeline
    with torch.no_grad():
        pipe.forward(latents)
    assert pipe.transformer.calls == 10


def test_the_log_says_what_was_skipped(omni, latents, caplog):
    pipe = omni.Pipeline()
    made(omni, pipe, budget=4)
    with torch.no_grad(), caplog.at_level(logging.INFO):
        pipe.forward(latents)
    assert "velocity_cache skipped 6 of 10 steps; schedule: 4 of 10 steps computed, evenly spread" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_execution": True}, "does not work in vLLM-Omni's step mode"),
        (
            {"parallel_config": type("Two", (), {"pipeline_parallel_size": 2})},
            "does not work with pipeline parallelism",
        ),
    ],
)
def test_other_ways_to_run_are_refused(omni, options, message):
    with pytest.raises(ValueError, match=message):
        made(omni, omni.Pipeline(**options))


def test_the_adapter_lets_ours_in_and_its_pipeline_of_diffusers_is_cached(omni):
    import tiny

    options = {"model": None, "enforce_eager": False}
    with pytest.raises(NotImplementedError, match="'tea_cache' is not supported"):
        omni.DiffusersAdapterPipeline(vllm_omni_stand_in.SimpleNamespace(cache_backend="tea_cache", **options))
    with pytest.raises(NotImplementedError, match="Eager"):
        omni.DiffusersAdapterPipeline(
            vllm_omni_stand_in.SimpleNamespace(cache_backend="velocity_cache", enforce_eager=True)
        )
    adapter = omni.DiffusersAdapterPipeline(
        vllm_omni_stand_in.SimpleNamespace(cache_backend="velocity_cache", **options)
    )
    assert adapter.od_config.cache_backend == "velocity_cache"
    adapter._pipeline = tiny.PIPELINES["qwen_image"]()
    backend = made(omni, adapter, budget=3)
    tiny.generate(adapter._pipeline, num_inference_steps=6)
    assert len(backend.handle.report.skipped) == 3
    backend.disable(adapter)
    assert not hasattr(adapter._pipeline, "_omni_kernels_handle")


def inputs(T=3, S=5, dim=16, heads=2, samples=1, timesteps=1):
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(samples, S, dim, generator=g), torch.randn(samples, T, dim, generator=g)
    angles = torch.randn(S + T, dim // heads // 2, generator=g)
    rotation = torch.polar(torch.ones_like(angles), angles)
    mask = torch.tensor([[True] * (T - 1) + [False]] * samples)
    return x, text, mask, torch.randn(samples * timesteps, dim, generator=g), (rotation[:S], rotation[S:])


@pytest.mark.parametrize("two_timesteps", [False, True])
def test_fused_blocks_are_equal_to_their_own(omni, two_timesteps):
    torch.manual_seed(0)
    pipe = omni.BlockPipeline(zero_cond_t=two_timesteps)
    given = inputs(samples=2, timesteps=2 if two_timesteps else 1)
    index = torch.tensor([[0, 0, 1, 1, 1]] * 2) if two_timesteps else None
    with torch.no_grad():
        plain = pipe(*given, index)
        backend = omni.get_cache_backend("fused_blocks", {})
        backend.enable(pipe)
        assert str(backend.handle.fused) == "transformer: 2 QwenImageTransformerBlock fused"
        fused = pipe(*given, index)
        backend.disable(pipe)
        assert "forward" not in vars(pipe.transformer.transformer_blocks[0])
        again = pipe(*given, index)
    assert not all(map(torch.equal, plain, fused)), "the fused blocks have run"
    for one, other in zip(plain, fused, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert all(map(torch.equal, plain, again))


def test_a_block_that_differs_is_left_with_the_reason(omni):
    pipe = omni.BlockPipeline()
    pipe.transformer.transformer_blocks[1].attn.rope.is_neox_style = True
    pipe.transformer.transformer_blocks[1].attn.rope.interleaved = False
    with omni_kernels.patched(pipe) as handle:
        assert handle.fused.replaced == ["transformer.transformer_blocks.0"]
        assert list(handle.fused.left_alone.values()) == ["attn.rope does not rotate pairs by tables of half a head"]


def test_sequence_parallel_blocks_run_their_own_forward(omni):
    pipe = omni.BlockPipeline()
    given = inputs()
    for block in pipe.transformer.transformer_blocks:
        block.attn.parallel_config = vllm_omni_stand_in.SimpleNamespace(sequence_parallel_size=2)
    with torch.no_grad():
        plain = pipe(*given)
        with omni_kernels.patched(pipe):
            assert all(map(torch.equal, pipe(*given), plain))


def test_keys_are_those_of_the_method():
    assert {key.name for key in VELOCITY_CACHE.keys} >= {"schedule", "budget", "speedup", "quality"}
    assert "fuse" not in {key.name for key in VELOCITY_CACHE.keys}, "the plug-in takes this key for itself"
