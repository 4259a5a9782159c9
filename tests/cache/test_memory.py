"""Memory: order + 1 snapshots per stream and branch, one tensor of the signal, and nothing between requests.

Held tensors are counted twice: as the session tells, and as Python's garbage collector finds them by their shape.
"""

import gc

import pytest
import tiny
import torch

import omni_kernels

HIDDEN = (1, 16, 96)  # 96 is no other width in this pipeline
STEPS = 5


@pytest.fixture(scope="module", autouse=True)
def _only_objects_of_these_tests():
    """What was there before is not looked through, which is faster; it stays frozen, as tests/conftest.py has it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def pipe():
    return tiny.qwen_image(num_attention_heads=3)


def latents(pipe, **arguments):
    return tiny.generate(pipe, output_type="latent", **{"num_inference_steps": STEPS} | arguments)


def living(width=HIDDEN[-1]):
    """Shapes of all living tensors of the hidden width, one for each storage; weights are none of them."""
    found = {}
    for candidate in gc.get_objects():
        if type(candidate) is torch.Tensor and candidate.dim() >= 3 and candidate.shape[-1] == width:
            found[candidate.untyped_storage().data_ptr()] = tuple(candidate.shape)
    return sorted(found.values())


def counted(pipe, backend, config, **arguments):
    """(as the session tells, as the garbage collector finds) after every step but the last, and the handle."""
    handle = omni_kernels.patch(pipe, backend, config)
    told, found = [], []

    def count(pipe, step, timestep, tensors):
        told.append(sorted(tuple(tensor.shape) for tensor in handle._installed.held_tensors()))
        found.append(living())
        return {}

    latents(pipe, callback_on_step_end=count, **arguments)
    return told, found, handle


def test_without_a_cache_nothing_is_held(pipe):
    found = []
    latents(pipe, callback_on_step_end=lambda *_: found.append(living()) or {})
    assert found == [[]] * STEPS


@pytest.mark.parametrize(
    ("forecaster", "order", "snapshots"),
    [
        ("reuse", 3, 1),
        ("taylorseer", 1, 2),
        ("newton", 2, 3),
        ("taylorseer", 3, 4),
        ("hermite", 2, 3),
        ("foca", 1, 12),
        ("dmd", 1, 6),
    ],
)
def test_snapshots_are_at_most_those_that_the_forecaster_keeps(pipe, forecaster, order, snapshots):
    config = {"residual_diff_threshold": 0.0, "forecaster": forecaster, "forecaster_order": order}
    told, found, _ = counted(pipe, "cache_dit", config, negative_prompt=None)
    expected = [[HIDDEN] * (min(step + 1, snapshots) + 1) for step in range(STEPS - 1)]  # and the signal's one
    assert told[:-1] == found[:-1] == expected
    assert told[-1] == found[-1] == []


def test_streams_and_branches_have_their_own_snapshots(pipe):
    config = {"max_warmup_steps": 3, "Bn_compute_blocks": 1, "enable_taylorseer": True}
    told, found, handle = counted(pipe, "cache_dit", config)
    assert told == found
    assert max(map(len, told)) == 2 * (2 * 2 + 1)
    assert told[-2].count(HIDDEN) == 2 * (2 + 1)
    assert handle.report.forwards_saved > 0


@pytest.mark.parametrize(
    ("backend", "config"),
    [
        ("tea_cache", {"rel_l1_thresh": 0.2, "coefficients": [0, 0, 0, 1, 0]}),
        ("first_block_cache", {"threshold": 0.2}),
    ],
)
def test_plain_reuse_holds_one_residual_and_one_signal_per_branch(pipe, backend, config):
    told, found, handle = counted(pipe, backend, config)
    assert told[:-1] == found[:-1] == [[HIDDEN] * 4] * (STEPS - 1)
    assert handle.report.forwards_saved > 0


def test_mag_cache_holds_one_residual_per_branch(pipe):
    told, found, handle = counted(pipe, "mag_cache", {"threshold": 0.5, "retention_ratio": 0.0})
    assert told[:-1] == found[:-1] == [[HIDDEN] * 2] * (STEPS - 1)
    assert handle.report.forwards_saved > 0


def test_sea_cache_holds_one_residual_and_one_filtered_input_per_branch(pipe):
    told, found, handle = counted(pipe, "sea_cache", {"threshold": 0.8})
    assert {len(held) for held in told[:-1]} == {4}
    assert told == found
    assert handle.report.forwards_saved > 0


def test_signal_of_an_edit_is_no_larger_than_its_noise():
    pipe = tiny.qwen_image_edit(num_attention_heads=3)
    told, _, _ = counted(pipe, "tea_cache", {"rel_l1_thresh": 0.2}, negative_prompt=None)
    signal, residual = told[2]
    assert signal == HIDDEN
    assert residual[1] > HIDDEN[1]


def test_a_new_snapshot_is_written_over_the_oldest(pipe):
    handle = omni_kernels.patch(pipe, "cache_dit", {"residual_diff_threshold": 0.0, "enable_taylorseer": True})
    places = []
    handle.on_step = lambda event: places.append({t.data_ptr() for t in handle._installed.held_tensors()[1:]})
    latents(pipe, negative_prompt=None)
    assert len(places[1]) == 2
    assert places[2:-1] == [places[1]] * (STEPS - 3)


def test_nothing_is_held_after_a_request(pipe):
    handle = omni_kernels.patch(pipe, "cache_dit", {"max_warmup_steps": 2, "Bn_compute_blocks": 1})
    latents(pipe)
    assert handle.report.forwards_saved > 0
    assert living() == []
    assert handle._installed.held_tensors() == []


class FailureError(Exception):
    """Of a test."""


@pytest.mark.parametrize("error", [FailureError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["block", "callback"])
def test_nothing_is_held_after_an_exception(pipe, error, where):
    omni_kernels.patch(pipe, "cache_dit", {"max_warmup_steps": 2, "Bn_compute_blocks": 1})
    seen = []

    def fail(*_):
        seen.append(living())
        if len(seen) == 4:
            raise error
        return {}

    callback = None
    if where == "block":
        pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: (fail(), None)[1])
    else:
        callback = fail
    with pytest.raises(error):
        latents(pipe, callback_on_step_end=callback)
    assert seen[-1]
    assert living() == []


def test_nothing_is_held_after_an_interrupt(pipe):
    omni_kernels.patch(pipe, "tea_cache")
    seen = []

    def interrupt(pipe, step, timestep, tensors):
        seen.append(living())
        pipe._interrupt = True
        return {}

    latents(pipe, callback_on_step_end=interrupt)
    assert len(seen[0]) == 4
    assert living() == []


def test_undo_within_a_request_frees_it(pipe):
    handle = omni_kernels.patch(pipe, "first_block_cache")
    freed = []

    def undo(pipe, step, timestep, tensors):
        before = living()
        handle.undo()
        freed.append((before, living()))
        return {}

    latents(pipe, callback_on_step_end=undo, num_inference_steps=2)
    assert freed[0] == ([HIDDEN] * 4, [])


def test_next_request_drops_what_an_open_one_holds(pipe):
    """A loop by hand that is left: its state lives until the next request opens, or the run is over."""
    handle = omni_kernels.patch(pipe, "first_block_cache")

    def one_step():
        pipe.scheduler.set_timesteps(3, mu=0.5)
        pipe.transformer(
            hidden_states=torch.zeros(1, 16, 64),
            encoder_hidden_states=torch.ones(1, 5, 32),
            timestep=torch.tensor([0.5]),
            img_shapes=[[(1, 4, 4)]],
        )

    with torch.no_grad(), handle.sampling():
        one_step()
        assert len(living()) == 2
        pipe.scheduler.set_timesteps(3, mu=0.5)
        assert living() == []
        one_step()
        assert len(living()) == 2
    assert living() == []
