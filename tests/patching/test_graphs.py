"""Recorded blocks: what is replayed is what the block would do, and where it would not be, the block itself runs.

There is no GPU here: a `Tape` records.
"""

import gc
import random
import weakref
from collections import Counter

import pytest
import tiny
import torch
from tape import Tape
from torch.utils import _pytree as pytree

import omni_kernels
from omni_kernels.patching.graphs import MOST_SHAPES, CudaGraphs, Graphs
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
    "sea_cache": {"threshold": 0.6},
}


#: What cannot be one graph, because the cache looks at what enters a block, or lets some blocks run alone.
FIRST_AND_OTHERS = {(0,), (1, 2, 3)}
PARTS = {
    "first_block_cache": FIRST_AND_OTHERS,
    "cache_dit": {(0,), (1, 2, 3), (3,)},
}


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
        assert str(graphs).startswith(f"4 blocks recorded, {len(graphs.stretches)} graphs, ")
        parts = {tuple(int(name.rpartition(".")[2]) for name in names) for names in graphs.stretches}
        assert parts == PARTS.get(backend, {(0, 1, 2, 3)})


ONE_STACK = {"transformer_blocks": 4}
STACKS = {
    "qwen_image": [ONE_STACK, ONE_STACK],  # of either text length
    "qwen_image_edit": [ONE_STACK, ONE_STACK],
    "qwen_image_edit_plus": [ONE_STACK, ONE_STACK],
    "z_image": [{"noise_refiner": 1}, {"context_refiner": 1}, {"layers": 4}],
    "flux": [{"transformer_blocks": 2, "single_transformer_blocks": 2}],
    "wan": [{"blocks": 2}],
    "chroma": [{"transformer_blocks": 1}] * 2 + [{"single_transformer_blocks": 1}] * 2,  # slices modulation in between
}


@pytest.mark.parametrize("name", STACKS)
def test_every_pipeline_replays_its_stacks(name, tape, graphs):
    pipe = (tiny.PIPELINES | {"wan": tiny.wan, "chroma": tiny.chroma})[name]()
    expected = [latents(pipe), latents(pipe, seed=1)]
    with omni_kernels.patched(pipe, fuse=False, graphs=graphs):
        assert all(map(torch.equal, [latents(pipe), latents(pipe, seed=1)], expected))
    assert tape.replays > tape.records == len(STACKS[name])
    assert not graphs.reasons
    assert [Counter(block.split(".")[1] for block in stretch) for stretch in graphs.stretches] == STACKS[name]
    assert torch.equal(latents(pipe), expected[0])


@pytest.mark.parametrize("backend", CACHES)
def test_after_a_warm_up_nothing_is_recorded(qwen_pipe, backend, tape, graphs):
    size = {"height": 64, "width": 64}
    with omni_kernels.patched(qwen_pipe, backend, CACHES[backend], graphs=graphs):
        omni_kernels.warmup(qwen_pipe, prompt="a cat", negative_prompt=" ", true_cfg_scale=4.0, **size)
        records = tape.records
        latents(qwen_pipe)
        assert tape.records == records > 0


def launched(tape, call):
    before = tape.replays
    call()
    return tape.replays - before


def test_a_whole_stack_is_one_launch(qwen_pipe, tape, graphs):
    with omni_kernels.patched(qwen_pipe, graphs=graphs):
        latents(qwen_pipe, negative_prompt=None)
        steps = 5
        assert launched(tape, lambda: latents(qwen_pipe, negative_prompt=None, num_inference_steps=steps)) == steps
        assert tape.records == 1


def test_a_skipped_forward_launches_what_it_runs(qwen_pipe, tape, graphs):
    """Recorded as one stack while all was computed, parted by the first forward that skips, and as it is then."""
    with omni_kernels.patched(qwen_pipe, "first_block_cache", CACHES["first_block_cache"], graphs=graphs) as handle:
        for _ in range(2):
            latents(qwen_pipe, negative_prompt=None, num_inference_steps=12)
        assert [len(names) for names in graphs.stretches] == [1, 3]
        records = tape.records
        launches = launched(tape, lambda: latents(qwen_pipe, negative_prompt=None, num_inference_steps=12))
        (branch,) = handle.report.branches.values()
        computed = sum(decision.computed for decision in branch.decisions)
        assert 0 < computed < 12
        assert launches == 12 + computed
        assert tape.records == records


def test_a_second_request_records_nothing(qwen_pipe, tape, graphs):
    with omni_kernels.patched(qwen_pipe, graphs=graphs):
        latents(qwen_pipe)
        records = tape.records
        latents(qwen_pipe, seed=1)
        assert tape.records == records
        latents(qwen_pipe, height=96)
        assert tape.records > records


def test_the_librarys_own_cache_parts_the_stack(qwen_pipe, tape, graphs):
    pytest.importorskip("cache_dit")
    config = {"engine": "library", "max_warmup_steps": 2, "residual_diff_threshold": 0.5, "Fn_compute_blocks": 1}
    seeds = range(3)
    with omni_kernels.patched(qwen_pipe, "cache_dit", config) as handle:
        expected = [latents(qwen_pipe, seed=seed, negative_prompt=None) for seed in seeds]
        assert handle.report.blocks_run < handle.report.blocks_total
    with omni_kernels.patched(qwen_pipe, "cache_dit", config, graphs=graphs):
        found = [latents(qwen_pipe, seed=seed, negative_prompt=None) for seed in seeds]
    assert all(map(torch.equal, found, expected))
    assert [len(names) for names in graphs.stretches] == [1, 3]
    assert not graphs.reasons


def test_states_pass_from_graph_to_graph_without_a_copy(qwen_pipe, graphs, monkeypatch):
    given = []
    give = Graphs._give
    monkeypatch.setattr(Graphs, "_give", lambda self, place, t: [given.append(t), give(self, place, t)][1])
    copied = []
    with omni_kernels.patched(qwen_pipe, "first_block_cache", {"threshold": 0.4}, graphs=graphs), torch.no_grad():
        for _ in range(2):
            latents(qwen_pipe, negative_prompt=None, num_inference_steps=12)
        assert len(graphs.stretches) == 2
        given.clear()
        original = torch.Tensor.copy_

        def counted(self, source, *more):
            copied.append(self.shape)
            return original(self, source, *more)

        monkeypatch.setattr(torch.Tensor, "copy_", counted)
        latents(qwen_pipe, negative_prompt=None, num_inference_steps=2)
    hidden = [t for t in given if t.dim() == 3 and t.shape[1:] == (16, 64)]
    assert len(hidden) == 2, "the first block's, once a step; the others read what it returned"


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
        latents(qwen_pipe)
        assert tape.records == records
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
            for _ in range(2):  # traced, then recorded
                assert torch.equal(call(x), block(x))
        assert tape.records == MOST_SHAPES + 2, "the first one was used in between"
        for _ in range(2):
            call(torch.randn(2, 4))
    assert tape.records == MOST_SHAPES + 3
    assert graphs.recorded == {"block": MOST_SHAPES}
    rows = [1, *range(5, MOST_SHAPES + 3), 2]
    assert graphs.memory - kept - 1000 * MOST_SHAPES == 2 * sum(rows) * 4 * 4, (
        "input and output; what nobody reads is freed"
    )


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
        for times in (1.0, 2.0, 1.0, 2.0, 1.0):
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


# Where something works between the blocks


class Model(torch.nn.Module):
    """Three blocks, and what a test does between them."""

    def __init__(self, graphs, between=lambda place, x, states: states):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Step() for _ in range(3))
        self.calls = [graphs.call_of(str(n), block, block._call_impl) for n, block in enumerate(self.blocks)]
        self.between = between

    def forward(self, x, recorded=True):
        states = x, x * 2
        for place, (block, call) in enumerate(zip(self.blocks, self.calls, strict=True)):
            states = (call if recorded else block)(*states, scale=x)
            states = self.between(place, x, states)
        return states[0] + states[1]


class Step(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, a, b, scale):
        return self.inner(b) * scale, self.inner(a)


def new_states(place, x, states):
    return (states[0] + 1.0, states[1]) if place == 0 else states


def written_states(place, x, states):
    if place == 0:
        states[0].add_(1.0)
    return states


def written_input(place, x, states):
    if place == 0:
        x.mul_(1.5)
    return states


def exchanged_states(place, x, states):
    return states[::-1] if place == 0 else states


def earlier_states():
    """A state that two blocks later is given again."""
    kept = []

    def between(place, x, states):
        kept.append(states)
        return (states[0], kept[-2][1]) if place == 1 else states

    return between


@pytest.mark.parametrize(
    ("between", "lengths"),
    [
        (lambda place, x, states: states, [3]),
        (new_states, [1, 2]),
        (written_states, [1, 2]),
        (written_input, [1, 2]),
        (exchanged_states, [3]),
        (earlier_states(), [3]),
    ],
    ids=["nothing", "new", "written", "an input written", "exchanged", "an earlier one"],
)
def test_what_is_done_between_blocks_counts(tape, graphs, between, lengths):
    model = Model(graphs, between)
    with torch.no_grad():
        for seed in range(4):
            torch.manual_seed(seed)
            x = torch.randn(2, 4)
            assert torch.equal(model(x.clone()), model(x.clone(), recorded=False))
    assert [len(names) for names in graphs.stretches] == lengths
    assert tape.records == len(lengths)


@pytest.mark.parametrize("between", [new_states, written_states, written_input])
def test_what_is_done_between_blocks_later_on_parts_the_stretch(tape, graphs, between):
    model = Model(graphs)
    with torch.no_grad():
        x = torch.randn(2, 4)
        for _ in range(3):
            assert torch.equal(model(x.clone()), model(x.clone(), recorded=False))
        assert [len(names) for names in graphs.stretches] == [3]
        memory = graphs.memory
        model.between = between
        for _ in range(4):
            assert torch.equal(model(x.clone()), model(x.clone(), recorded=False))
        assert [len(names) for names in graphs.stretches] == [1, 2]
        assert 1000 <= graphs.memory - memory < 2000, "two graphs now, and the one before is gone"
        model.between = lambda place, x, states: states
        assert torch.equal(model(x), model(x, recorded=False))
    assert tape.records == 3


@pytest.mark.parametrize("seed", range(6))
def test_whatever_works_between_the_blocks_the_bits_are_the_same(tape, graphs, seed):
    """Forwards of a few kinds by turns; in each, anything may be done after a block, or blocks be passed over."""
    torch.manual_seed(seed)
    blocks = [Step() for _ in range(4)]
    calls = [graphs.call_of(str(n), block, block._call_impl) for n, block in enumerate(blocks)]

    def forward(calls, x, kind):
        choose = random.Random(kind)
        scale, states, kept = x * 0.5, (x, x * 2), []
        for call in calls:
            match choose.choice(["nothing"] * 6 + ["skip", "add", "write", "swap", "scale", "earlier", "fail"]):
                case "skip":
                    continue
                case "add":
                    states = (states[0] + 1, states[1])
                case "write":
                    states[1].add_(1)
                case "swap":
                    states = states[::-1]
                case "scale":
                    scale = scale * 1.1
                case "earlier" if kept:
                    states = (choose.choice(kept), states[1])
                case "fail":
                    return None
            states = call(*states, scale=scale)
            kept.append(states[0])
        return sum(kept, states[0] + states[1])

    order = random.Random(seed)
    kinds = [order.randrange(10**6) for _ in range(4)]
    with torch.no_grad():
        for number in range(40):
            x, kind = torch.randn(2, 4), order.choice(kinds)
            expected, found = forward(blocks, x.clone(), kind), forward(calls, x.clone(), kind)
            assert (expected is None and found is None) or torch.equal(found, expected)
            if number == 30:
                records = tape.records
    assert tape.replays > 0
    assert tape.records == records, "it settles"


def test_in_inference_mode_where_nobody_counts_writes_each_block_is_a_graph(tape, graphs):
    model = Model(graphs, written_states)
    with torch.inference_mode():
        for seed in range(4):
            torch.manual_seed(seed)
            x = torch.randn(2, 4)
            assert torch.equal(model(x.clone()), model(x.clone(), recorded=False))
    assert [len(names) for names in graphs.stretches] == [1, 1, 1]
    assert tape.replays == 9


def test_a_forward_that_fails_leaves_no_half_stretch(tape, graphs):
    def failing(place, x, states):
        raise ValueError("no more")

    model = Model(graphs)
    block = model.blocks[1]
    with torch.no_grad():
        x = torch.randn(2, 4)
        own, block.inner.weight.data = block.inner.weight.data, torch.ones(3, 3)
        with pytest.raises(RuntimeError, match="shapes"):
            model(x)
        block.inner.weight.data = own
        for _ in range(3):
            assert torch.equal(model(x), model(x, recorded=False))
        assert [len(names) for names in graphs.stretches] == [3]
        model.between = failing
        with pytest.raises(ValueError, match="no more"):
            model(x)
        model.between = lambda place, x, states: states
        assert torch.equal(model(x), model(x, recorded=False))
        assert torch.equal(model(x), model(x, recorded=False))


def test_traces_keep_nothing_alive(graphs):
    seen = []
    model = Model(graphs, lambda place, x, states: [seen.extend(map(weakref.ref, states)), states][1])
    with torch.no_grad():
        x = torch.randn(2, 4)
        model(x)
        seen.append(weakref.ref(x))
        del x
    assert len(seen) == 7
    assert not any(one() is not None for one in seen)


def test_a_controlnets_residuals_part_the_stack(qwen_pipe, tape, graphs):
    def output(seed, residuals):
        generator = torch.Generator().manual_seed(seed)
        hidden, encoder = (torch.randn(1, *size, generator=generator) for size in ((16, 64), (5, 32)))
        added = [0.5 * torch.randn(1, 16, 64, generator=generator) for _ in range(residuals)] or None
        with torch.no_grad():
            return qwen_pipe.transformer(
                hidden_states=hidden,
                encoder_hidden_states=encoder,
                timestep=torch.tensor([0.5]),
                img_shapes=[[(1, 4, 4)]],
                controlnet_block_samples=added,
                return_dict=False,
            )[0]

    cases = [(0, 0), (1, 0), (2, 0), (3, 2), (4, 4), (5, 2), (6, 4), (7, 0)]
    expected = [output(*case) for case in cases]
    with omni_kernels.patched(qwen_pipe, fuse=False, graphs=graphs):
        for number, case in enumerate(cases):
            assert torch.equal(output(*case), expected[number])
            if number == 2:
                assert [len(names) for names in graphs.stretches] == [4]
        assert [len(names) for names in graphs.stretches] == [1, 1, 1, 1]
    assert not graphs.reasons


def test_states_of_another_graph_are_not_written(tape, graphs):
    """The model still has them: here it swaps them, or adds one to what a later block returns."""
    swapped = Model(graphs, lambda place, x, states: (states[0] + 0, states[1]) if place == 0 else states)
    with torch.no_grad():
        for number in range(8):
            x = torch.randn(2, 4, generator=torch.Generator().manual_seed(number))
            if number == 2:
                swapped.between = lambda place, x, states: states
            if number == 5:
                swapped.between = exchanged_states
            assert torch.equal(swapped(x.clone()), swapped(x.clone(), recorded=False))
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    calls = [graphs.call_of(f"single {n}", block, block._call_impl) for n, block in enumerate((first, second))]

    def forward(a, b, x, residual):
        y = a(x)
        return b(y if residual is None else y + residual) + y

    with torch.no_grad():
        for residual in (1.0, None, None, 1.0, 1.0, None, 1.0):
            x = torch.randn(2, 4)
            assert torch.equal(forward(*calls, x, residual), forward(first, second, x, residual))


class Passes(torch.nn.Module):
    """Returns one of its arguments as it is."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, a, b):
        return self.inner(a), b


def test_what_a_block_passes_on_is_not_overwritten(graphs):
    blocks = [Passes() for _ in range(3)]
    calls = [graphs.call_of(str(n), block, block._call_impl) for n, block in enumerate(blocks)]

    def forward(calls, x, e1, e2):
        a, p = calls[0](x, e1)
        b, q = calls[1](x + 1, e2)
        c, r = calls[2](a + b, p * 1)
        return a + b + c + p + q + r

    with torch.no_grad():
        for _ in range(4):
            given = [torch.randn(2, 4) for _ in range(3)]
            assert torch.equal(forward(calls, *given), forward(blocks, *given))


class Returning(torch.nn.Module):
    def __init__(self, returning):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)
        self.returning = returning

    def forward(self, x):
        return self.returning(self.inner(x))


@pytest.mark.parametrize(
    "returning",
    [lambda h: {"a": h, "b": None}, lambda h: [h, h + 1], lambda h: (h, 3), lambda h: None, lambda h: (h, [h * 2])],
    ids=["dict", "list", "number", "None", "nested"],
)
def test_blocks_may_return_what_they_like(tape, graphs, returning):
    blocks = [Returning(returning), torch.nn.Linear(4, 4)]
    call, other = (graphs.call_of(str(n), block, block._call_impl) for n, block in enumerate(blocks))
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(2, 4)
            found, expected = call(x), blocks[0](x)
            leaves, structure = pytree.tree_flatten(found)
            assert structure == pytree.tree_flatten(expected)[1]
            for there, wanted in zip(leaves, pytree.tree_leaves(expected), strict=True):
                assert torch.equal(there, wanted) if isinstance(wanted, torch.Tensor) else there == wanted
            if isinstance(found, list | dict):
                found.clear()
            assert torch.equal(other(x), blocks[1](x))
    assert not graphs.reasons
    assert tape.records == 2


@pytest.mark.parametrize("values", [(1, True, 1), ([1], [True], [1]), (1, 1.0, 1)], ids=["bool", "in a list", "float"])
def test_equal_values_of_other_types_are_others(graphs, values):
    block = torch.nn.Linear(4, 4)
    call = graphs.call_of("block", block, lambda x, i: block(x)[i] if isinstance(i, int) else block(x) * i[0])
    with torch.no_grad():
        for value in values * 3:
            if isinstance(value, float):
                continue
            x = torch.randn(2, 4)
            expected = block(x)[value] if isinstance(value, int) else block(x) * value[0]
            assert torch.equal(call(x, value), expected)


def test_a_plain_value_that_becomes_a_tensor_parts_the_stretch(graphs):
    blocks = [torch.nn.Linear(4, 4) for _ in range(2)]
    runs = [lambda x, scale, block=block: block(x) * scale["by"] for block in blocks]
    calls = [graphs.call_of(str(n), block, run) for n, (block, run) in enumerate(zip(blocks, runs, strict=True))]
    with torch.no_grad():
        for scale in (1.5, 1.5, 1.5, torch.tensor([1.0, 2.0, 3.0, 4.0]), 1.5):
            x = torch.randn(2, 4)
            found = calls[1](calls[0](x, {"by": 1.5}), {"by": scale})
            assert torch.equal(found, runs[1](runs[0](x, {"by": 1.5}), {"by": scale}))


def test_blocks_that_write_to_what_they_are_given_run_as_ever(graphs):
    block = torch.nn.Linear(4, 4)

    def run(x, counter):
        counter.add_(1)
        return block(x) * counter

    call, counter, other = graphs.call_of("block", block, run), torch.zeros(1), torch.zeros(1)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(2, 4)
            assert torch.equal(call(x, counter), run(x, other))
    assert counter == other == 4
    assert graphs.reasons == {"block": "it writes to what it is given"}


class Remembering:
    """An argument that hashes, and is another each time it is used."""

    mode = "read"


def test_objects_with_a_state_run_as_ever(graphs):
    block = torch.nn.Linear(4, 4)
    call = graphs.call_of("block", block, lambda x, cache: block(x) * (2 if cache.mode == "read" else 3))
    cache = Remembering()
    with torch.no_grad():
        x = torch.randn(2, 4)
        for cache.mode, factor in (("read", 2), ("skip", 3)) * 3:
            assert torch.equal(call(x, cache), block(x) * factor)
    assert graphs.reasons == {"block": "an argument is neither a tensor nor a plain value"}
    kept = weakref.ref(cache)
    del cache
    assert kept() is None


def test_hooks_for_all_modules_are_called(graphs):
    block, seen = torch.nn.Linear(4, 4), []
    call = graphs.call_of("block", block, block._call_impl)
    with torch.no_grad():
        x = torch.randn(2, 4)
        for _ in range(3):
            call(x)
        hook = torch.nn.modules.module.register_module_forward_hook(lambda *of_the_call: seen.append(1))
        try:
            call(x)
        finally:
            hook.remove()
    assert seen == [1]
    assert graphs.reasons == {"block": "all modules are hooked"}


def test_inference_mode_may_come_first(tape, graphs):
    block = torch.nn.Linear(4, 4)
    call = graphs.call_of("block", block, block._call_impl)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        for _ in range(3):
            with mode():
                x = torch.randn(2, 4)
                assert torch.equal(call(x), block(x))
    assert not graphs.reasons
    assert tape.records == 2


def test_a_request_that_fails_costs_no_other_its_graphs(tape, graphs):
    block = torch.nn.Linear(4, 4)
    call = graphs.call_of("block", block, block._call_impl)
    with torch.no_grad():
        for _ in range(3):
            call(torch.randn(2, 4))
            with pytest.raises(RuntimeError, match="shapes"):
                call(torch.randn(2, 3))
        call(torch.randn(2, 4))
    assert tape.records == 1


def test_what_changes_all_the_time_is_left_to_itself(tape, graphs):
    """Every other block settles; nothing is recorded again and again."""
    model = Model(graphs)
    with torch.no_grad():
        for number in range(20):
            hook = model.blocks[1].register_forward_hook(lambda *of_the_call: None) if number % 2 else None
            x = torch.randn(2, 4)
            assert torch.equal(model(x), model(x, recorded=False))
            if hook is not None:
                hook.remove()
            if number == 14:
                records = tape.records
    assert tape.records == records
    assert graphs.reasons == {"1": "it keeps changing"}
    assert [len(names) for names in graphs.stretches] == [1, 1]


def test_one_transformers_change_leaves_the_others_graphs(tape, graphs):
    models = [Model(graphs), Model(graphs)]
    with torch.no_grad():
        x = torch.randn(2, 4)
        for _ in range(3):
            for model in models:
                model(x)
        records = tape.records
        weight = models[1].blocks[2].inner.weight
        weight.data = weight.data * 2
        for _ in range(3):
            for model in models:
                assert torch.equal(model(x), model(x, recorded=False))
    assert tape.records == records + 1


def test_undone_the_graphs_are_gone_and_the_report_is_left(qwen_pipe, tape, graphs):
    with omni_kernels.patched(qwen_pipe, graphs=graphs) as handle:
        latents(qwen_pipe)
        latents(qwen_pipe, seed=1)
        assert len(tape.alive) == 2
        told = str(handle.graphs)
    gc.disable()
    try:
        assert not tape.alive, "without waiting for the collector"
    finally:
        gc.enable()
    assert handle.graphs.memory == 0
    assert str(handle.graphs).partition(" MB")[0].startswith(told.partition(", ")[0])
    with omni_kernels.patched(qwen_pipe, graphs=graphs):
        latents(qwen_pipe)
        assert set(graphs.recorded.values()) == {2}, "of both text lengths, and of this patch alone"


def test_a_tuple_with_none_is_known_again(graphs):
    blocks = [torch.nn.Linear(4, 4) for _ in range(3)]
    runs = [lambda x, both, options, block=block: block(x) * both[0] * options["by"] for block in blocks]
    calls = [graphs.call_of(str(n), block, run) for n, (block, run) in enumerate(zip(blocks, runs, strict=True))]
    with torch.no_grad():
        for _ in range(4):
            x, both, options = torch.randn(2, 4), (torch.randn(1), None), {"by": torch.randn(1), "how": "so"}
            found, expected = x, x
            for call, run in zip(calls, runs, strict=True):
                found, expected = call(found, both, options), run(expected, both, options)
            assert torch.equal(found, expected)
    assert [len(names) for names in graphs.stretches] == [3]


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


def test_compiled_blocks_are_recorded(qwen_pipe):
    tape = Tape(operators=False)
    graphs = Graphs(tape, "cpu")
    torch._dynamo.reset()
    expected = latents(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, fuse=False, compile={"backend": "eager"}, graphs=graphs) as handle:
        assert len(handle.compiled) == 4
        assert torch.equal(latents(qwen_pipe), expected)
    assert tape.replays > tape.records > 0


# CUDA's own, on a machine without


class Told:
    """Stands for a module, and for whatever it returns; keeps what was asked of it."""

    def __init__(self, asked, name):
        self.asked, self.name = asked, name

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.asked.append(f"{self.name}.{name}")

    def __enter__(self):
        self.asked.append(f"in {self.name}")

    def __exit__(self, *error):
        self.asked.append(f"out of {self.name}")


@pytest.fixture
def cuda(monkeypatch):
    asked = []
    reserved = iter((5000, 8000))
    here = Told(asked, "here")
    for name in ("device", "Stream", "stream", "CUDAGraph", "graph", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name, **kwargs: Told(asked, name))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: asked.append(f"back to {stream.name}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: next(reserved))
    return asked


def test_a_graph_is_captured_once_what_it_needs_is_there(cuda):
    def run(keep):
        cuda.append("call")
        keep(0, torch.ones(2))
        keep(1, (torch.ones(3), None))

    graphs = CudaGraphs()
    replay, returned = graphs.record(run, torch.device("cpu"))
    aside = ["Stream.wait_stream", "in stream", "call", "call", "out of stream", "here.wait_stream", "synchronize"]
    capture = ["in graph", "call", "out of graph", "back to here"]
    assert cuda == ["in device", *aside, *capture, "out of device"]
    assert returned[0].tolist() == [1.0, 1.0], "what is captured copies it there"
    assert returned[1][1] is None
    assert graphs.memory() == 3000
    cuda.clear()
    replay()
    assert cuda == ["in device", "CUDAGraph.replay", "out of device"]
    del replay
    assert graphs.memory() == 0


def test_a_capture_that_fails_leaves_the_stream_as_it_was(cuda):
    def run(keep):
        if "in graph" in cuda:
            raise RuntimeError("not permitted when stream is capturing")
        keep(0, torch.ones(2))

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaGraphs().record(run, torch.device("cpu"))
    assert cuda[-2:] == ["back to here", "out of device"]
