"""The engine's queue, what it counts, and what its faults and cancelled tasks leave behind."""

from __future__ import annotations

import asyncio
import gc
import warnings
from typing import Any

import pytest
import tiny

from omni_runtime import Omni
from omni_runtime.serving.jobs import State

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 4, "seed": 0}


@pytest.fixture
def omni() -> Any:
    with Omni(tiny.qwen_image(layers=2), cache_backend=None) as one:
        yield one


def test_a_cancelled_request_leaves_the_queue_of_a_full_engine(omni: Omni) -> None:
    seen: list[tuple[int, State, int]] = []
    with omni.engine(in_flight=1) as engine:
        later: list[Any] = []

        def on_step(event: Any) -> None:
            if event.step == 0:
                later.append(engine.submit("a dog", **SMALL))
                later[0].cancel()
            seen.append((event.step, later[0].state, engine.queued))

        engine.submit("a cat", on_step=on_step, **SMALL).result()
    assert seen[0][1:] == (State.QUEUED, 1)
    assert [state for _, state, _ in seen[1:]] == [State.CANCELLED] * 3, "while the first one is under way"
    assert seen[1][2] == 0


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
