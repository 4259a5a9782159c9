"""Caches of whole steps over a transformer that its user compiled as a whole, by `transformer.compile()`."""

import pytest
import tiny
import torch

import omni_kernels

STEPS = 12
SCHEDULE = (0, 1, 3, 6, 7, 11)


def latents(pipe):
    return tiny.generate(pipe, num_inference_steps=STEPS)


@pytest.fixture(autouse=True)
def graphs_enough():
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


def test_easy_cache_decides_as_without_the_compiler():
    pipe = tiny.qwen_image(layers=1)
    config = {"thresh": 0.2, "ret_steps": 3}
    with omni_kernels.patched(pipe, "easy_cache", config) as handle:
        expected, decided = latents(pipe), handle.report.branches["cond"].decisions
    pipe.transformer.compile(backend="eager")
    with omni_kernels.patched(pipe, "easy_cache", config) as handle:
        torch.testing.assert_close(latents(pipe), expected, rtol=1e-4, atol=1e-4)
        computed = [d.step for d in handle.report.branches["cond"].decisions if d.computed]
    assert computed == [d.step for d in decided if d.computed]
    assert len(computed) < STEPS


def test_velocity_cache_calls_it_compiled_and_leaves_it_so(monkeypatch):
    pipe = tiny.qwen_image(layers=1)
    pipe.transformer.compile(backend="eager")
    compiled = pipe.transformer._compiled_call_impl
    plain = latents(pipe)
    calls = []
    monkeypatch.setitem(
        vars(pipe.transformer), "_compiled_call_impl", lambda *a, **k: calls.append(1) or compiled(*a, **k)
    )
    spy = pipe.transformer._compiled_call_impl
    with omni_kernels.patched(pipe, "velocity_cache", {"schedule": SCHEDULE}):
        latents(pipe)
        assert len(calls) == 2 * len(SCHEDULE)
    assert pipe.transformer._compiled_call_impl is spy
    assert torch.equal(latents(pipe), plain)
