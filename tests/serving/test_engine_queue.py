"""The engine's queue, what it counts, and what its faults and cancelled tasks leave behind."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from typing import Any

import pytest
import tiny
import torch

from omni_runtime import Omni
from omni_runtime.serving.jobs import DeviceFailedError, State

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 4, "seed": 0}


@pytest.fixture
def omni() -> Any:
    with Omni(tiny.qwen_image(layers=2), cache_backend=None) as one:
        yield one


def test_a_cancelled_request_leaves_the_queue_of_a_full_engine(omni: Omni) -> None:
    seen: list[tuple[State, int]] = []
    with omni.engine(in_flight=1) as engine:
        later: list[Any] = []

        def on_step(event: Any) -> None:
            if event.step == 0:
                later.append(engine.submit("a dog", **SMALL))
                later[0].cancel()
            seen.append((later[0].state, engine.queued))

        engine.submit("a cat", on_step=on_step, **SMALL).result()
    assert seen == [(State.CANCELLED, 0)] * 4, "at once, while the first one is under way"


def test_jobs_and_forwards_are_counted(omni: Omni) -> None:
    with omni.engine() as engine:
        jobs = [engine.submit("a cat", **SMALL | {"seed": seed}) for seed in range(2)]
        for job in jobs:
            job.result()
        assert [job.forwards for job in jobs] == [4, 4]
        assert max(job.samples for job in jobs) > 4, "some forwards were shared"
        assert sum(size * made for size, made in engine.forwards.sizes.items()) == engine.forwards.samples
        assert sum(engine.forwards.sizes.values()) == engine.forwards.made


def test_an_error_while_calls_are_grouped_ends_only_these_requests(omni: Omni) -> None:
    with omni.engine() as engine:
        group, raised = engine.forwards.group, []

        def broken(calls: Any) -> Any:
            if not raised:
                raised.append(KeyError("grouping"))
                raise raised[0]
            return group(calls)

        engine.forwards.group = broken  # type: ignore[method-assign]
        with pytest.raises(KeyError, match="grouping"):
            engine.submit("a cat", **SMALL).result()
        assert engine.submit("a cat", **SMALL).result().images


def test_an_engine_under_a_cache_warns_of_nothing() -> None:
    with (
        Omni(tiny.qwen_image(layers=2), cache_backend="velocity_cache") as omni,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        with omni.engine() as engine:
            engine.submit("a cat", **SMALL).result()
        assert not [one for one in caught if "outside a call" in str(one.message)]
        (watch,) = omni.pipe.transformer._forward_pre_hooks.values()
        with pytest.warns(UserWarning, match="outside a call"):
            watch(omni.pipe.transformer, ())


def test_a_task_that_is_cancelled_leaves_no_lost_exception(omni: Omni, caplog: pytest.LogCaptureFixture) -> None:
    async def cancelled() -> None:
        job = engine.submit("a cat", **SMALL | {"num_inference_steps": 50})
        task = asyncio.ensure_future(job._awaited())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while not job.done():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        assert job.state is State.CANCELLED

    with omni.engine() as engine:
        asyncio.run(cancelled())
    gc.collect()
    assert "never retrieved" not in caplog.text


# What a callback may not do, and what ends an engine


@pytest.mark.parametrize("does", ["closes the engine", "closes the Omni", "generates", "waits"])
def test_a_callback_that_would_wait_for_its_own_engine_is_refused(omni: Omni, does: str) -> None:
    with omni.engine() as engine:

        def on_step(event: Any) -> None:
            if does == "closes the engine":
                engine.close()
            elif does == "closes the Omni":
                omni.close()
            elif does == "generates":
                omni.generate("a dog", **SMALL)
            else:
                engine.submit("a dog", **SMALL).result()

        job = engine.submit("a cat", on_step=on_step, **SMALL)
        with pytest.raises(RuntimeError, match=r"a callback cannot .* its own engine"):
            job.result(60)
        assert engine.submit("a cat", **SMALL).result(60).images


def test_a_callback_may_use_another_engine(omni: Omni) -> None:
    made: list[Any] = []
    with Omni(tiny.qwen_image(layers=2), cache_backend=None) as other, other.engine() as apart, omni.engine() as engine:

        def on_step(event: Any) -> None:
            if event.step == 0:
                made.append(apart.submit("a dog", **SMALL).result(60))

        engine.submit("a cat", on_step=on_step, **SMALL).result(60)
    assert made[0].images


def ended_by(omni: Omni, engine: Any, error: Exception) -> None:
    """A request whose forward raises `error`."""

    def broken(*_: Any, **__: Any) -> None:
        raise error

    hook = omni.pipe.transformer.register_forward_pre_hook(broken)
    with pytest.raises(type(error)):
        engine.submit("a cat", **SMALL).result(60)
    hook.remove()


def test_errors_of_the_device_one_after_the_other_end_an_engine(omni: Omni) -> None:
    told: list[DeviceFailedError] = []
    assert_error, value_error = RuntimeError("CUDA error: device-side assert triggered"), ValueError("an error")
    with omni.engine(failed=told.append) as engine:
        for error in (assert_error, assert_error, value_error):
            ended_by(omni, engine, error)
        engine.submit("a cat", **SMALL).result(60)
        for error in (assert_error, torch.OutOfMemoryError("CUDA error: out of memory"), assert_error):
            ended_by(omni, engine, error)
        assert engine.failure is None, "others came between"
        ended_by(omni, engine, assert_error)
        engine._driver.join(60)
        assert "device-side assert" in str(engine.failure)
        assert told == [engine.failure]
        with pytest.raises(DeviceFailedError, match="device-side assert"):
            engine.submit("a cat", **SMALL)


def test_a_fault_of_the_engine_itself_ends_all_requests_and_their_threads(
    omni: Omni, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omni_runtime.generation.seeding import RandomState

    begun = threading.Event()

    def on_step(event: Any) -> None:
        begun.set()
        monkeypatch.setattr(RandomState, "used", None)  # torch's random state cannot be read

    with omni.engine(in_flight=2) as engine:
        jobs = [engine.submit("a cat", on_step=on_step, **SMALL) for _ in range(4)]
        for job in jobs:
            with pytest.raises(DeviceFailedError, match="the engine has stopped: TypeError"):
                job.result(60)
        engine._driver.join(60)
        assert begun.is_set()
        assert not [thread for thread in threading.enumerate() if thread.name == "omni-request"]
        with pytest.raises(DeviceFailedError):
            engine.submit("a cat", **SMALL)


# Memory


def test_the_first_of_a_kind_keeps_to_the_limit_of_memory(omni: Omni) -> None:
    """Nothing is known of its cache: it runs by itself. Of a larger one, the need is scaled."""
    together: list[tuple[int, int]] = []
    with omni.engine(memory=1 << 30) as engine:
        engine.submit("a cat", **SMALL).result(60)
    (need,) = engine._needs.values()
    sizes = (64, 128, 64, 96)
    with omni.engine(memory=int(2.6 * need)) as engine:

        def on_step(event: Any) -> None:
            running = [live.job.request.arguments["height"] for live in engine._lives]
            together.append((len(running), sum(running)))

        jobs = [engine.submit("a cat", **SMALL | {"height": height}, on_step=on_step) for height in sizes]
        for job in jobs:
            job.result(60)
    assert max(height for _, height in together) <= 160
    assert max(number for number, _ in together) == 2


def test_smaller_ones_pass_one_that_has_no_room_but_not_for_ever(omni: Omni) -> None:
    from omni_runtime.serving.engine import PASSES

    order: list[int] = []
    with omni.engine(memory=1 << 30) as engine:
        for height in (64, 256):
            engine.submit("a cat", **SMALL | {"height": height}).result(60)
    needs = dict(engine._needs)
    small = min(needs.values())
    with omni.engine(memory=int(2.5 * small)) as engine:
        engine._needs.update(needs)
        go_on = threading.Event()
        first = engine.submit("a cat", **SMALL, on_step=lambda event: go_on.wait(60))
        given = [engine.submit("a cat", **SMALL | {"height": height}) for height in [256] + [64] * (PASSES + 8)]
        for job in given:
            job.add_done_callback(lambda job: order.append(job.request.arguments["height"]))
        go_on.set()
        for job in [first, *given]:
            job.result(120)
    place = order.index(256)
    assert 0 < place <= PASSES
