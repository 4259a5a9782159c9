"""Recorded blocks: what is replayed is what the block would do, and where it would not be, the block itself runs.

There is no GPU here. A stand-in records as a CUDA graph does: what a call read and returned stays where it lay, and a
replay reads and writes only there.
"""

import pytest
import tiny
import torch
from torch.utils import _pytree as pytree

import omni_kernels
from omni_kernels.patching.graphs import MOST_SHAPES, Graphs
from omni_runtime import Omni

CACHES = {
    None: {},
    "tea_cache": {"rel_l1_thresh": 0.3, "coefficients": [0, 0, 0, 1, 0]},
    "first_block_cache": {"threshold": 0.4},
    "cache_dit": {
        "max_warmup_steps": 2,
        "Bn_compute_blocks": 1,
        "residual_diff_threshold": 0.5,
        "enable_taylorseer": True,
    },
    "mag_cache": {"threshold": 0.4, "retention_ratio": 0.0, "mag_ratios": [1.0, 1.1]},
    "easy_cache": {"thresh": 0.6, "ret_steps": 0},
    "velocity_cache": {"budget": 3},
}


class Tape:
    """Stands for CUDA graphs on the CPU: fixed inputs, fixed outputs, and 1000 bytes each."""

    def __init__(self):
        self.attempts = self.records = self.replays = 0
        self.failure = None

    def record(self, call, device):
        assert device.type == "cpu"
        self.attempts += 1
        if self.failure is not None:
            raise self.failure
        self.records += 1
        returned = pytree.tree_map(torch.clone, call())

        def replay():
            self.replays += 1
            for fixed, new in zip(pytree.tree_leaves(returned), pytree.tree_leaves(call()), strict=True):
                fixed.data.copy_(new)  # a graph writes where no version counter sees it

        for fixed in pytree.tree_leaves(returned):
            fixed.fill_(float("nan"))  # a graph that was only recorded has computed nothing
        return replay, returned

    def busy(self):
        return None

    def memory(self):
        return 1000 * self.records


@pytest.fixture
def tape():
    return Tape()


@pytest.fixture
def graphs(tape):
    return Graphs(tape, "cpu")


def latents(pipe, **arguments):
    return tiny.generate(pipe, output_type="latent", **arguments)


@pytest.mark.parametrize("fuse", [False, True], ids=["as it is", "fused"])
@pytest.mark.parametrize("backend", CACHES)
def test_replayed_blocks_give_the_same_bits_under_every_cache(qwen_pipe, backend, fuse, tape, graphs):
    cases = ({}, {"seed": 3, "prompt": "a dog that is no cat at all"}, {"negative_prompt": None}, {})
    with omni_kernels.patched(qwen_pipe, backend, CACHES[backend], fuse=fuse) as handle:
        expected = [latents(qwen_pipe, **case) for case in cases]
        report = handle.report
    with omni_kernels.patched(qwen_pipe, backend, CACHES[backend], fuse=fuse, graphs=graphs) as handle:
        assert handle.graphs is graphs
        found = [latents(qwen_pipe, **case) for case in cases]
        assert all(map(torch.equal, found, expected))
        if backend is not None:
            assert handle.report.blocks_run == report.blocks_run
        assert tape.replays > tape.records > 0
        assert len(graphs.recorded) == len(qwen_pipe.transformer.transformer_blocks)
        assert not graphs.reasons
        assert graphs.memory > 1000 * tape.records
        assert str(graphs).startswith(f"4 blocks recorded, {tape.records} graphs, ")


@pytest.mark.parametrize("name", sorted(tiny.PIPELINES))
def test_every_pipeline_replays(name, tape, graphs):
    pipe = tiny.PIPELINES[name]()
    expected = [latents(pipe), latents(pipe, seed=1)]
    with omni_kernels.patched(pipe, fuse=False, graphs=graphs):
        assert all(map(torch.equal, [latents(pipe), latents(pipe, seed=1)], expected))
    assert tape.replays > tape.records > 0
    assert not graphs.reasons
    assert torch.equal(latents(pipe), expected[0])


def test_a_second_request_records_nothing(qwen_pipe, tape, graphs):
    with omni_kernels.patched(qwen_pipe, graphs=graphs):
        latents(qwen_pipe)
        records = tape.records
        latents(qwen_pipe, seed=1)
        assert tape.records == records
        latents(qwen_pipe, height=96)
        assert tape.records > records


def test_states_pass_from_graph_to_graph_without_a_copy(qwen_pipe, graphs, monkeypatch):
    given = []
    give = Graphs.give
    monkeypatch.setattr(Graphs, "give", lambda self, place, t: [given.append(t), give(self, place, t)][1])
    copied = []
    with omni_kernels.patched(qwen_pipe, fuse=False, graphs=graphs), torch.no_grad():
        latents(qwen_pipe, negative_prompt=None)
        given.clear()
        original = torch.Tensor.copy_

        def counted(self, source, *more):
            copied.append(self.shape)
            return original(self, source, *more)

        monkeypatch.setattr(torch.Tensor, "copy_", counted)
        latents(qwen_pipe, negative_prompt=None, num_inference_steps=2)
    hidden = [t for t in given if t.dim() == 3 and t.shape[1:] == (16, 64)]
    assert len(hidden) == 2, "the first block's, once a step; the others read what the one before returned"


# A block that has changed is recorded anew


def change_weight(pipe):
    block = pipe.transformer.transformer_blocks[1]
    block.attn.to_q.weight = torch.nn.Parameter(block.attn.to_q.weight * 1.5)


def change_storage(pipe):
    weight = pipe.transformer.transformer_blocks[1].attn.to_q.weight
    weight.data = weight.data * 1.5


def change_module(pipe):
    block = pipe.transformer.transformer_blocks[1]
    linear = torch.nn.Linear(block.attn.to_q.in_features, block.attn.to_q.out_features)
    with torch.no_grad():
        linear.weight.copy_(block.attn.to_q.weight * 1.5)
        linear.bias.copy_(block.attn.to_q.bias)
    block.attn.to_q = linear


def change_in_place(pipe):
    with torch.no_grad():
        pipe.transformer.transformer_blocks[1].attn.to_q.weight.mul_(1.5)


@pytest.mark.parametrize("change", [change_weight, change_storage, change_module, change_in_place])
def test_new_weights_count(qwen_pipe, graphs, change):
    with omni_kernels.patched(qwen_pipe, graphs=graphs, fuse=False):
        before = latents(qwen_pipe)
        change(qwen_pipe)
        found = latents(qwen_pipe)
    expected = latents(qwen_pipe)
    assert torch.equal(found, expected)
    assert not torch.equal(found, before)


def test_another_attention_counts(qwen_pipe, graphs):
    with omni_kernels.patched(qwen_pipe, graphs=graphs, fuse=False):
        latents(qwen_pipe)
        records = dict(graphs.recorded)
        qwen_pipe.transformer.set_attention_backend("_native_math")
        latents(qwen_pipe)
        found = latents(qwen_pipe)
    assert graphs.recorded == records, "recorded anew"
    assert torch.equal(found, latents(qwen_pipe))


def test_hooks_are_called(qwen_pipe, graphs):
    calls = []
    with omni_kernels.patched(qwen_pipe, graphs=graphs):
        latents(qwen_pipe)
        hook = qwen_pipe.transformer.transformer_blocks[1].attn.to_q.register_forward_hook(
            lambda *of_the_call: calls.append(1)
        )
        latents(qwen_pipe, negative_prompt=None, num_inference_steps=3)
        assert len(calls) == 3
        name = "transformer.transformer_blocks.1"
        assert graphs.reasons == {name: "attn.to_q is hooked"}
        assert name not in graphs.recorded
        hook.remove()
        latents(qwen_pipe)
        assert graphs.reasons == {}
        assert name in graphs.recorded


def test_states_that_a_graph_has_returned_are_read_anew(tape, graphs):
    """They are the same tensor each time, whose version no replay counts."""
    pipe = tiny.flux(layers=1, single_layers=3)
    expected = latents(pipe)
    with omni_kernels.patched(pipe, fuse=False, graphs=graphs):
        hook = pipe.transformer.single_transformer_blocks[0].register_forward_hook(lambda *of_the_call: None)
        assert torch.equal(latents(pipe), expected)
        hook.remove()
        assert torch.equal(latents(pipe), expected)
    assert not graphs.reasons


def test_training_mode_counts(tape, graphs):
    block = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(1.0)).eval()
    call = graphs.call_of("block", block, block._call_impl)
    with torch.no_grad():
        x = torch.randn(2, 4)
        assert call(x).any()
        block.train()
        assert not call(x).any()


def test_the_default_attention_backend_counts(qwen_pipe, tape, graphs):
    from diffusers.models.attention_dispatch import attention_backend

    with omni_kernels.patched(qwen_pipe, graphs=graphs, fuse=False):
        latents(qwen_pipe)
        records = tape.records
        with attention_backend("_native_math"):
            found = latents(qwen_pipe)
        assert tape.records == 2 * records
    with attention_backend("_native_math"):
        assert torch.equal(found, latents(qwen_pipe))


# Where nothing is recorded


def test_processors_with_numbers_of_their_own_run_as_ever(graphs):
    class Processor(torch.nn.Module):
        scale = 0.5

    block = torch.nn.Linear(4, 4)
    block.attn = torch.nn.Module()
    block.attn.processor = Processor()
    call = graphs.call_of("block", block, torch.nn.Linear(4, 4)._call_impl)
    with torch.no_grad():
        call(torch.randn(2, 4))
    assert graphs.reasons == {"block": "attn.processor is Processor, whose scale is a number in Python"}


def test_weights_that_cannot_be_watched_run_as_ever(graphs):
    class Quantised(torch.nn.Parameter):
        pass

    block = torch.nn.Sequential(torch.nn.Linear(4, 4))
    block[0].weight = Quantised(torch.randn(4, 4))
    call = graphs.call_of("block", block, block._call_impl)
    with torch.no_grad():
        call(torch.randn(2, 4))
    assert graphs.reasons == {"block": "0.weight is Quantised, whose memory cannot be watched"}


def test_a_shared_transformer_is_recorded_once(qwen_pipe):
    other = type(qwen_pipe)(**qwen_pipe.components)
    with omni_kernels.patched(qwen_pipe, fuse=False, graphs=True):
        for how in ({"graphs": True}, {"compile": "regional"}):
            with pytest.raises(omni_kernels.PatchConflictError, match="already, through another pipeline"):
                omni_kernels.patch(other, fuse=False, **how)
    omni_kernels.patch(other, fuse=False, graphs=True)


def test_compile_modes_that_record_themselves_are_refused(qwen_pipe):
    with pytest.raises(ValueError, match="may record graphs of its own"):
        omni_kernels.patch(qwen_pipe, compile={"mode": "reduce-overhead"}, graphs=True)
    with pytest.raises(ValueError, match="may record graphs of its own"):  # before a model is looked for, and loaded
        Omni("there/is-no-such-model", compile={"mode": "reduce-overhead"}, graphs=True)


def test_adapters_run_as_ever_and_count(qwen_pipe, graphs):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False)
    with omni_kernels.patched(qwen_pipe, graphs=graphs, fuse=False):
        before = latents(qwen_pipe)
        qwen_pipe.transformer.add_adapter(config)
        found = latents(qwen_pipe)
        assert not torch.equal(found, before)
        assert all("is an adapter" in reason for reason in graphs.reasons.values())
        assert len(graphs.reasons) == 4
    assert torch.equal(found, latents(qwen_pipe))


def test_other_devices_say_so(qwen_pipe):
    expected = latents(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, graphs=True, fuse=False) as handle:
        assert torch.equal(latents(qwen_pipe), expected)
        assert set(handle.graphs.reasons.values()) == {"it is not on cuda"}
        assert str(handle.graphs) == ("0 blocks recorded, 0 graphs, 0.0 MB\n4 blocks ran as ever: it is not on cuda")


def test_a_recording_that_fails_says_so(qwen_pipe, tape, graphs):
    tape.failure = RuntimeError("operation not permitted when stream is capturing\nand more")
    expected = latents(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, graphs=graphs, fuse=False):
        assert torch.equal(latents(qwen_pipe), expected)
    reason = "recording failed: RuntimeError: operation not permitted when stream is capturing"
    assert set(graphs.reasons.values()) == {reason}
    assert len(graphs.reasons) == 4
    assert tape.attempts == 1, "what fails once is not tried for every block"


def test_the_shape_used_longest_ago_makes_room(tape, graphs):
    block = torch.nn.Linear(4, 4)
    call = graphs.call_of("block", block, block._call_impl)
    kept = graphs.memory
    with torch.no_grad():
        for rows in (*range(1, MOST_SHAPES + 1), 1, MOST_SHAPES + 1, 1, MOST_SHAPES + 2):
            x = torch.randn(rows, 4)
            assert torch.equal(call(x), block(x))
        assert tape.records == MOST_SHAPES + 2, "the first one was used in between"
        call(torch.randn(2, 4))
    assert tape.records == MOST_SHAPES + 3
    assert graphs.recorded == {"block": MOST_SHAPES}
    rows = [1, *range(5, MOST_SHAPES + 3), 2]
    assert graphs.memory - kept - 1000 * tape.records == sum(rows) * 4 * 4, "what nobody reads is freed"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"x": torch.randn(2, 4), "other": {1, 2}}, "an argument is neither a tensor nor a plain value"),
        ({"x": torch.randn(2, 4)}, "gradients are enabled"),
    ],
)
def test_what_cannot_be_recorded_runs(graphs, given, reason):
    block = torch.nn.Linear(4, 4)
    call = graphs.call_of("block", block, lambda x, other=None: block(x))
    with torch.set_grad_enabled("gradients" in reason):
        assert torch.equal(call(**given), block(given["x"]))
    assert graphs.reasons == {"block": reason}


def test_autocast_runs_as_ever(graphs):
    block = torch.nn.Linear(4, 4)
    call = graphs.call_of("block", block, block._call_impl)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert call(torch.randn(2, 4)).dtype == torch.bfloat16
    assert graphs.reasons == {"block": "autocast is on"}


def test_plain_values_tell_recordings_apart(tape, graphs):
    block = torch.nn.Linear(4, 4)
    call = graphs.call_of("block", block, lambda x, times: block(x) * times)
    x = torch.randn(2, 4)
    with torch.no_grad():
        for times in (1.0, 2.0, 1.0):
            assert torch.equal(call(x, times), block(x) * times)
    assert tape.records == 2


def test_a_tensor_written_in_place_is_given_anew(graphs):
    block = torch.nn.Linear(4, 4)
    call = graphs.call_of("block", block, block._call_impl)
    x = torch.randn(2, 4)
    for inference in (False, True):
        with torch.inference_mode(inference), torch.no_grad():
            x = torch.randn(2, 4)
            for _ in range(3):
                assert torch.equal(call(x), block(x))
                x.mul_(2.0)


# Under Omni, undone


def test_omni_tells_of_its_graphs(qwen_pipe):
    with Omni(qwen_pipe, graphs=True) as omni:
        (made,) = omni.generate("a cat", num_inference_steps=2, height=64, width=64, seed=0)
    assert made.settings["graphs"].startswith("0 blocks recorded")
    with Omni(qwen_pipe) as omni:
        (made,) = omni.generate("a cat", num_inference_steps=2, height=64, width=64, seed=0)
    assert made.settings["graphs"] is None


def test_undone_exactly_and_nothing_is_kept(qwen_pipe, tape):
    before = [dict(vars(block)) for block in qwen_pipe.transformer.transformer_blocks]
    with omni_kernels.patched(qwen_pipe, "first_block_cache", {"threshold": 0.4}, graphs=Graphs(tape, "cpu")):
        latents(qwen_pipe)
    assert [dict(vars(block)) for block in qwen_pipe.transformer.transformer_blocks] == before


def test_compiled_blocks_are_recorded(qwen_pipe, tape, graphs):
    torch._dynamo.reset()
    expected = latents(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, fuse=False, compile={"backend": "eager"}, graphs=graphs) as handle:
        assert len(handle.compiled) == 4
        assert torch.equal(latents(qwen_pipe), expected)
    assert tape.replays > tape.records > 0
