"""The engine: many requests in flight on one pipeline; each gets the picture that it would get alone."""

import asyncio
import gc
import itertools
import threading
import time
import weakref

import pytest
import tiny
import torch
from pairs import in_turn

import omni_kernels
from omni_runtime import Omni
from omni_runtime.serving.jobs import CancelledError, DeadlineError, QueueFullError, State

BUILDERS = {**tiny.PIPELINES, "wan": tiny.wan, "chroma": tiny.chroma}
METHODS = {
    "none": (None, None),
    "velocity_cache": ("velocity_cache", {"budget": 4}),
    "easy_cache": ("easy_cache", {"thresh": 0.3, "ret_steps": 2}),
    "first_block_cache": ("first_block_cache", {"threshold": 0.12}),
    "cache_dit": ("cache_dit", {"residual_diff_threshold": 0.2, "max_warmup_steps": 2, "Fn_compute_blocks": 1}),
    "taylorseer": (
        "cache_dit",
        {
            "residual_diff_threshold": 0.2,
            "max_warmup_steps": 2,
            "Fn_compute_blocks": 1,
            "enable_taylorseer": True,
        },
    ),
    "tea_cache": ("tea_cache", {"rel_l1_thresh": 0.2, "coefficients": [0, 0, 0, 1, 0]}),
}
#: Without a modulation that is known.
WITHOUT_TEA = ()
TEXTS = ("a cat", "a red fox on a very green hill", "x", "a cat and a dog")


def built(name):
    pipe = BUILDERS[name]()
    tiny.damp(pipe.transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def mix(pipe, guided=(True, True, False, True, True)):
    """Requests that differ in prompt, seed, steps and guidance; the last is of another size."""
    own = tiny.default_arguments(pipe)
    needed = {key: value for key, value in own.items() if key in ("image", "num_frames", "max_sequence_length")}
    requests = []
    for place, (text, steps) in enumerate(zip(itertools.cycle(TEXTS), (8, 8, 7, 5, 8), strict=False)):
        arguments = {**(own if guided[place] else needed), "num_inference_steps": steps, "seed": place}
        size = {"height": 64, "width": 96 if place == 4 else 64}
        requests.append({"prompt": text, "output_type": "latent", **arguments, **size})
    return requests


def tensor_of(result):
    return result.images if result.images is not None else result.frames


def computed(result):
    return None if result.cache is None else {name: one.computed for name, one in result.cache.branches.items()}


def alone(pipe, method, requests):
    with Omni(pipe, cache_backend=method[0], cache_config=method[1]) as omni:
        return [omni.generate(**one)[0] for one in requests]


def assert_alike(made, expected, tolerance=1e-5):
    for one, other in zip(made, expected, strict=True):
        assert computed(one) == computed(other)
        if other.cache is not None:
            assert (one.cache.blocks_run, one.cache.blocks_total) == (other.cache.blocks_run, other.cache.blocks_total)
            assert one.cache.complete
        scale = tensor_of(other).abs().max()
        torch.testing.assert_close(tensor_of(one) / scale, tensor_of(other) / scale, rtol=0, atol=tolerance)


@pytest.fixture(autouse=True)
def _small(small_references):
    """References of edit pipelines are small."""


# The same pictures


@pytest.mark.parametrize(("name", "method"), in_turn(BUILDERS, METHODS))
def test_requests_in_flight_together_are_as_alone(name, method):
    if method == "tea_cache" and name in ("wan",):
        method = "taylorseer"
    pipe, method = built(name), METHODS[method]
    requests = mix(pipe)
    expected = alone(pipe, method, requests)
    with Omni(pipe, cache_backend=method[0], cache_config=method[1]) as omni, omni.engine() as engine:
        for _ in range(2):
            made = [job.result(120) for job in [engine.submit(**one) for one in requests]]
            assert_alike(made, expected)
        assert engine.forwards.made < engine.forwards.samples
        assert engine.held_bytes() == 0
    assert_alike(alone(pipe, method, requests[:1]), expected[:1], tolerance=0)


def test_methods_share_the_model(qwen_pipe):
    """Each request has a method of its own."""
    tiny.damp(qwen_pipe.transformer)
    requests = mix(qwen_pipe)
    methods = [
        METHODS[name] for name in ("none", "velocity_cache", "first_block_cache", "first_block_cache", "taylorseer")
    ]
    expected = [alone(qwen_pipe, *one)[0] for one in zip(methods, [[one] for one in requests], strict=True)]
    with Omni(qwen_pipe, cache_backend=None) as omni, omni.engine() as engine:
        jobs = [
            engine.submit(**one, cache_backend=backend, cache_config=config)
            for one, (backend, config) in zip(requests, methods, strict=True)
        ]
        assert_alike([job.result(120) for job in jobs], expected)


def test_some_of_a_batch_skip_while_others_compute(qwen_pipe):
    tiny.damp(qwen_pipe.transformer)
    method = METHODS["first_block_cache"]
    requests = [one | {"num_inference_steps": 8, "width": 64} for one in mix(qwen_pipe)]
    expected = alone(qwen_pipe, method, requests)
    assert len({str(computed(one)) for one in expected}) > 1, "they decide differently, or this would be no test"
    with Omni(qwen_pipe, cache_backend=method[0], cache_config=method[1]) as omni, omni.engine() as engine:
        made = [job.result(120) for job in [engine.submit(**one) for one in requests]]
        assert_alike(made, expected)
        first = engine.forwards.made
        made = [job.result(120) for job in [engine.submit(**one) for one in requests]]
        assert_alike(made, expected)
        # 8 steps, and two calls a step for those with guidance.
        assert engine.forwards.made - first == 16


@pytest.mark.parametrize("how", ["fuse", pytest.param("compile", marks=pytest.mark.long)])
def test_fused_and_compiled_blocks(qwen_pipe, how):
    tiny.damp(qwen_pipe.transformer)
    options = {"fuse": True} if how == "fuse" else {"compile": {"backend": "eager"}}
    backend, config = METHODS["first_block_cache"]
    requests = mix(qwen_pipe)
    with Omni(qwen_pipe, cache_backend=backend, cache_config=config, **options) as omni:
        expected = [omni.generate(**one)[0] for one in requests]
        with omni.engine() as engine:
            made = [job.result(300) for job in [engine.submit(**one) for one in requests]]
            assert_alike(made, expected)
            assert engine.forwards.made < engine.forwards.samples


def test_noise_of_the_steps_follows_from_the_seed(z_pipe):
    import diffusers

    z_pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    requests = [one | {"width": 64} for one in mix(z_pipe)]
    with Omni(z_pipe, cache_backend=None) as omni:
        before = torch.get_rng_state()
        expected = [omni.generate(**one)[0] for one in requests]
        again = [omni.generate(**one)[0] for one in requests]
        assert_alike(again, expected, tolerance=0)
        with omni.engine() as engine:
            made = [job.result(120) for job in [engine.submit(**one) for one in requests]]
        assert_alike(made, expected)
        assert torch.equal(torch.get_rng_state(), before)


def test_embeddings_callbacks_and_generators(qwen_pipe):
    tiny.damp(qwen_pipe.transformer)
    embeds, _ = qwen_pipe.encode_prompt("a house")

    def request(seen):
        def callback(pipe, step, t, tensors):
            seen.append((step, tensors["latents"].clone()))
            return {"latents": tensors["latents"] * 1.001}

        return {
            "prompt": None,
            "prompt_embeds": embeds,
            "prompt_embeds_mask": torch.ones(embeds.shape[:2], dtype=torch.bool),
            "generator": torch.Generator().manual_seed(3),
            "callback_on_step_end": callback,
            "num_inference_steps": 6,
            "height": 64,
            "width": 64,
            "output_type": "latent",
        }

    before, after = [], []
    (expected,) = alone(qwen_pipe, (None, None), [request(before)])
    with Omni(qwen_pipe, cache_backend=None) as omni, omni.engine() as engine:
        others = [engine.submit(**one) for one in mix(qwen_pipe)]
        made = engine.submit(**request(after)).result(120)
        [job.result(120) for job in others]
    assert_alike([made], [expected])
    assert [step for step, _ in after] == [step for step, _ in before] == [*range(6)]
    for (_, one), (_, other) in zip(after, before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# What is not joined


class Coupled(torch.nn.Module):
    """A last layer that mixes the samples of a batch."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) * len(x)


@pytest.mark.parametrize("method", ["none", "first_block_cache"])
def test_a_model_whose_samples_see_each_other_runs_them_alone(qwen_pipe, method):
    tiny.damp(qwen_pipe.transformer)
    qwen_pipe.transformer.proj_out = Coupled(qwen_pipe.transformer.proj_out)
    requests = mix(qwen_pipe)
    expected = alone(qwen_pipe, METHODS[method], requests)
    backend, config = METHODS[method]
    with Omni(qwen_pipe, cache_backend=backend, cache_config=config) as omni, omni.engine() as engine:
        made = [job.result(120) for job in [engine.submit(**one) for one in requests]]
        assert_alike(made, expected)
        assert engine.forwards.made == engine.forwards.samples


def test_no_more_samples_than_max_batch(qwen_pipe):
    sizes = []
    qwen_pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    with Omni(qwen_pipe, cache_backend=None) as omni, omni.engine(max_batch=3) as engine:
        [job.result(120) for job in [engine.submit(**one) for one in mix(qwen_pipe)]]
        [job.result(120) for job in [engine.submit(**one) for one in mix(qwen_pipe)]]
    assert max(sizes) == 3


# Requests that end early


class FaultError(RuntimeError):
    pass


@pytest.mark.parametrize("method", ["none", "velocity_cache", "first_block_cache"])
def test_a_request_that_fails_harms_no_other(qwen_pipe, method):
    """A block raises for one request, which is known by its text; another raises in its callback."""
    tiny.damp(qwen_pipe.transformer)
    method = METHODS[method]
    requests = mix(qwen_pipe)
    expected = alone(qwen_pipe, method, requests)
    marked = torch.full((1, 4, 32), 7.0)

    def fault(module, args, kwargs):
        if (kwargs["encoder_hidden_states"] == 7.0).flatten(1).any(1).any():
            raise FaultError("a bad block")

    qwen_pipe.transformer.register_forward_pre_hook(fault, with_kwargs=True)

    def callback(pipe, step, t, tensors):
        if step == 2:
            raise FaultError("a bad callback")
        return {}

    broken = {"num_inference_steps": 8, "height": 64, "width": 64, "seed": 0, "output_type": "latent"}
    with Omni(qwen_pipe, cache_backend=method[0], cache_config=method[1]) as omni, omni.engine() as engine:
        for _ in range(2):
            bad = [
                engine.submit(None, prompt_embeds=marked, prompt_embeds_mask=torch.ones(1, 4), **broken),
                engine.submit("a cat", callback_on_step_end=callback, **broken),
            ]
            jobs = [engine.submit(**one) for one in requests]
            assert_alike([job.result(120) for job in jobs], expected)
            for job, why in zip(bad, ("a bad block", "a bad callback"), strict=True):
                with pytest.raises(FaultError, match=why):
                    job.result(120)
                assert job.state is State.FAILED
    assert_alike(alone(qwen_pipe, method, requests[:1]), expected[:1], tolerance=0)


def test_an_interrupted_request_ends_as_alone(qwen_pipe):
    def stop_at(step):
        def callback(pipe, i, t, tensors):
            pipe._interrupt = i >= step
            return {}

        return callback

    config = {"budget": 4}
    request = mix(qwen_pipe)[0] | {"callback_on_step_end": stop_at(3)}
    (expected,) = alone(qwen_pipe, ("velocity_cache", config), [request])
    with Omni(qwen_pipe, cache_backend="velocity_cache", cache_config=config) as omni, omni.engine() as engine:
        others = [engine.submit(**one) for one in mix(qwen_pipe)]
        made = engine.submit(**request).result(120)
        assert all(job.result(120).cache.complete for job in others)
    assert not made.cache.complete
    torch.testing.assert_close(made.images, expected.images, rtol=1e-4, atol=1e-4)


def slow(event):
    """A step listener that stops a request until `event` is set, and with it all others."""
    return lambda step: event.wait(30)


def test_cancelling(qwen_pipe):
    requests = mix(qwen_pipe)
    begun, go_on = threading.Event(), threading.Event()

    def hold(step):
        begun.set()
        go_on.wait(30)

    with Omni(qwen_pipe, cache_backend="velocity_cache") as omni, omni.engine(in_flight=1) as engine:
        running = engine.submit(**requests[0], on_step=hold)
        queued, last = engine.submit(**requests[1]), engine.submit(**requests[2])
        assert begun.wait(30)
        assert (running.state, queued.state) == (State.RUNNING, State.QUEUED)
        assert running.cancel()
        assert queued.cancel()
        go_on.set()
        with pytest.raises(CancelledError, match="was cancelled") as stopped:
            running.result(60)
        assert stopped.value.steps == 1
        assert stopped.value.report.complete is False
        with pytest.raises(CancelledError, match="was cancelled"):
            queued.result(60)
        assert last.result(60).cache.complete
        assert (running.state, queued.state, last.state) == (State.CANCELLED, State.CANCELLED, State.DONE)
        assert not last.cancel()


def test_deadlines(qwen_pipe):
    with Omni(qwen_pipe, cache_backend=None) as omni, omni.engine() as engine:
        late = engine.submit(**mix(qwen_pipe)[0], deadline=0.5, on_step=lambda step: time.sleep(0.1))
        with pytest.raises(DeadlineError, match=r"within its deadline of 0\.5 s"):
            late.result(60)
        assert 0 < late.steps < 8
        assert late.state is State.CANCELLED
        with pytest.raises(ValueError, match="deadline must be above 0"):
            engine.submit(**mix(qwen_pipe)[0], deadline=0)


def test_a_full_queue_and_a_closed_engine(qwen_pipe):
    go_on = threading.Event()
    request = mix(qwen_pipe)[0]
    omni = Omni(qwen_pipe, cache_backend=None)
    engine = omni.engine(in_flight=1, waiting=1)
    first = engine.submit(**request, on_step=lambda step: go_on.wait(30))
    while first.state is State.QUEUED:
        time.sleep(0.01)
    second = engine.submit(**request)
    with pytest.raises(QueueFullError, match="1 requests wait already"):
        engine.submit(**request)
    with pytest.raises(TimeoutError, match=r"not over after 0\.01 s"):
        second.result(0.01)
    go_on.set()
    engine.close()
    assert first.done()
    assert second.done()
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(**request)
    with omni.engine() as another, pytest.raises(RuntimeError, match="has an engine already"):
        omni.engine()
    assert another.running == 0
    with pytest.raises(ValueError, match="in_flight must be a whole number from 1"):
        omni.engine(in_flight=0)


def test_leaving_by_an_error_cancels_what_runs(qwen_pipe):
    omni = Omni(qwen_pipe, cache_backend=None)
    job = None
    with pytest.raises(ZeroDivisionError), omni.engine() as engine:  # noqa: PT012
        job = engine.submit(**mix(qwen_pipe)[0] | {"num_inference_steps": 500})
        _ = 1 / 0
    assert job.state is State.CANCELLED


# Fairness


def test_a_short_request_does_not_wait_for_a_long_one(qwen_pipe):
    request = mix(qwen_pipe)[0]
    done_at = []
    with Omni(qwen_pipe, cache_backend=None) as omni, omni.engine() as engine:
        [job.result(60) for job in [engine.submit(**request) for _ in range(2)]]
        long = engine.submit(**request | {"num_inference_steps": 60})
        while long.steps < 5:
            time.sleep(0.001)
        short = engine.submit(**request | {"num_inference_steps": 4})
        short.add_done_callback(lambda job: done_at.append(long.steps))
        short.result(60)
        long.result(60)
    assert done_at[0] < 30


def test_other_sizes_have_their_turn(qwen_pipe):
    """Requests that fit together do not keep another one from running."""
    request = mix(qwen_pipe)[0] | {"num_inference_steps": 40}
    with Omni(qwen_pipe, cache_backend=None) as omni, omni.engine() as engine:
        many = [engine.submit(**request) for _ in range(3)]
        other = engine.submit(**request | {"num_inference_steps": 5, "height": 96})
        other.result(60)
        assert not any(job.done() for job in many)
        [job.result(60) for job in many]


# Callers


def test_generate_goes_through_an_open_engine(qwen_pipe):
    requests = mix(qwen_pipe)
    expected = alone(qwen_pipe, METHODS["velocity_cache"], requests)
    backend, config = METHODS["velocity_cache"]
    made = [None] * len(requests)
    with Omni(qwen_pipe, cache_backend=backend, cache_config=config) as omni, omni.engine() as engine:

        def generate(place):
            (made[place],) = omni.generate(**requests[place])

        threads = [threading.Thread(target=generate, args=(place,)) for place in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert_alike(made, expected)
        assert engine.forwards.made < engine.forwards.samples


def test_asynchronous_callers(qwen_pipe):
    requests = mix(qwen_pipe)
    expected = alone(qwen_pipe, (None, None), requests)
    with Omni(qwen_pipe, cache_backend=None) as omni:

        async def all_of_them():
            long = asyncio.create_task(omni.agenerate(**requests[0] | {"num_inference_steps": 500}))
            made = await asyncio.gather(*(omni.agenerate(**one) for one in requests))
            long.cancel()
            with pytest.raises(asyncio.CancelledError):
                await long
            return made

        assert_alike(asyncio.run(all_of_them()), expected)


def test_a_pipeline_that_shares_the_transformer_waits(qwen_pipe):
    import diffusers

    sibling = diffusers.QwenImagePipeline(**qwen_pipe.components)
    sibling.set_progress_bar_config(disable=True)
    request = {"num_inference_steps": 4}
    plain = tiny.generate(sibling, **request)
    with (
        omni_kernels.patched(sibling, "velocity_cache", {"budget": 4}),
        Omni(qwen_pipe, cache_backend=None) as omni,
        omni.engine() as engine,
    ):
        job = engine.submit(**mix(qwen_pipe)[0] | {"num_inference_steps": 30})
        while job.steps < 2:
            time.sleep(0.001)
        made = tiny.generate(sibling, **request)
        assert job.done(), "the sibling came after it"
    assert torch.equal(made, plain)


def test_unfit_requests_are_refused_at_once(qwen_pipe):
    with Omni(qwen_pipe, cache_backend=None) as omni, omni.engine() as engine:
        with pytest.raises(TypeError, match="one prompt at a time"):
            engine.submit(["a", "b"])
        with pytest.raises(TypeError, match="takes no 'stepz'"):
            engine.submit("a cat", stepz=3)
        with pytest.raises(ValueError, match="engine='library' cannot run in an engine"):
            engine.submit("a cat", cache_backend="cache_dit", cache_config={"engine": "library"})
        with pytest.raises(ValueError, match="schedule names step 99"):
            engine.submit(
                "a cat", num_inference_steps=8, cache_backend="velocity_cache", cache_config={"schedule": [99]}
            )


# Memory


def test_nothing_is_kept_of_a_request(qwen_pipe):
    request = mix(qwen_pipe)[0]
    kept = []
    with Omni(qwen_pipe, cache_backend="first_block_cache") as omni, omni.engine() as engine:

        def callback(pipe, step, t, tensors):
            kept.append(weakref.ref(tensors["latents"]))
            kept.append(weakref.ref(pipe))
            return {}

        [job.result(60) for job in [engine.submit(**request, callback_on_step_end=callback) for _ in range(3)]]
        held = []
        job = engine.submit(**request, on_step=lambda step: held.append(engine.held_bytes()))
        job.result(60)
        assert max(held) > 0
        assert engine.held_bytes() == 0
        del job
        gc.collect()
        assert [one for one in kept if one() is not None] == []


def test_memory_limits_how_many_run(qwen_pipe):
    request = mix(qwen_pipe)[0]
    most = []
    with Omni(qwen_pipe, cache_backend="first_block_cache") as omni:
        with omni.engine(memory=1 << 30) as engine:
            engine.submit(**request).result(60)
        (need,) = engine._needs.values()
        for room in (1.5, 2.5, 100):
            with omni.engine(memory=int(need * room)) as engine:
                engine.submit(**request).result(60)
                running = []
                jobs = [engine.submit(**request, on_step=lambda step: running.append(engine.running)) for _ in range(4)]  # noqa: B023
                [job.result(60) for job in jobs]
                most.append(max(running))
    assert most == [1, 2, 4]
