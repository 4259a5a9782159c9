"""Block contracts: what is found by watching a forward is what the rows say, and what works is the same picture."""

import contextlib
import copy

import diffusers
import pytest
import tiny
import torch
from pairs import in_turn

import omni_kernels
from omni_runtime.cache.blocks import ListRow

METHODS = {
    "first_block_cache": {"threshold": 0.2},
    "cache_dit": {"residual_diff_threshold": 0.3, "Bn_compute_blocks": 1, "enable_taylorseer": True},
    "mag_cache": {"threshold": 0.3, "mag_ratios": [1.0, 1.02, 0.97]},
}


def latents(pipe, **arguments):
    return tiny.generate(pipe, output_type="latent", **{"num_inference_steps": 6} | arguments)


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_what_is_found_of_the_known_models(name):
    """In the first request; a later request whose forward has other arguments skips the same steps."""
    two = ("hidden_states", "encoder_hidden_states", ("encoder", "hidden"))
    rows = {
        "QwenImageTransformer2DModel": [("transformer_blocks", *two)],
        "ZImageTransformer2DModel": [("layers", "x", None, "hidden")],
        "FluxTransformer2DModel": [("transformer_blocks", *two), ("single_transformer_blocks", *two)],
    }
    pipe = tiny.PIPELINES[name]()
    with omni_kernels.patched(pipe, "first_block_cache") as handle:
        assert handle.blocks is None
        latents(pipe)
        found = handle.blocks["transformer"]
    expected = [ListRow(*row) for row in rows[type(pipe.transformer).__name__]]
    assert list(found.lists) == expected
    assert found.stretches == (len(expected),)
    assert f"{expected[0].name}: {len(getattr(pipe.transformer, expected[0].name))} × " in str(found)


# Models that no row knows

SKIPPING = {"residual_diff_threshold": 1.0, "max_warmup_steps": 0}


def twice(pipe, handle, call):
    """What the transformer returns for the same input in two steps: a computed one, and a skipped one."""
    with torch.no_grad(), handle.sampling():
        pipe.scheduler.set_timesteps(3, mu=0.5)
        outputs = []
        for step in range(2):
            outputs.append(pipe.transformer(**call, return_dict=False)[0])
            pipe.scheduler.step(torch.ones(1), pipe.scheduler.timesteps[step], torch.ones(1))
        report = handle.report
    assert next(iter(report.branches.values())).skipped == [1]
    return outputs


def chroma_call(pipe):
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 7, 32, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(7, 3),
    }


@pytest.mark.parametrize(("first", "blocks"), [(1, 1), (2, 2)], ids=["within a stretch", "where streams are joined"])
@pytest.mark.parametrize("last", [0, 1])
def test_a_model_that_joins_its_streams_is_cached_in_stretches(first, blocks, last):
    """With the same input, a skipped step returns what the computed one did, and runs only the blocks outside."""
    pipe = tiny.chroma(layers=2, single_layers=3)
    config = SKIPPING | {"Fn_compute_blocks": first, "Bn_compute_blocks": last}
    with omni_kernels.patched(pipe, "cache_dit", config) as handle:
        computed, skipped = twice(pipe, handle, chroma_call(pipe))
        assert handle.blocks["transformer"].stretches == (1, 1)
        assert handle.report.blocks_run == 5 + blocks + last
    torch.testing.assert_close(skipped, computed, rtol=1e-5, atol=2e-5)


#: Settings that skip something in models of random weights.
LOOSE = {
    "first_block_cache": {"threshold": 0.7, "forecaster": "newton"},
    "cache_dit": {"residual_diff_threshold": 0.9, "max_warmup_steps": 2, "enable_taylorseer": True},
    "mag_cache": {"threshold": 0.3, "mag_ratios": [1.0, 1.02, 0.97], "forecaster": "newton"},
}


@pytest.mark.parametrize(("build", "backend"), in_turn([tiny.wan, tiny.chroma], METHODS))
def test_nothing_skipped_is_the_same_picture_and_a_second_request_too(build, backend):
    pipe = build()
    plain = latents(pipe)
    never = {"first_block_cache": {"threshold": 0.0}, "cache_dit": {"residual_diff_threshold": 0.0}}
    with omni_kernels.patched(pipe, backend, never.get(backend, {"threshold": -1.0, "mag_ratios": [1.0]})) as handle:
        assert torch.equal(latents(pipe), plain)
        assert handle.report.blocks_run == handle.report.blocks_total > 0
    with omni_kernels.patched(pipe, backend, LOOSE[backend]) as handle:
        cached = latents(pipe)
        assert handle.report.forwards_saved > 0
        assert torch.equal(latents(pipe), cached)
    assert torch.equal(latents(pipe), plain)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(8, 8)

    def forward(self, tokens, words, scale=1.0):
        return tokens + scale * torch.tanh(self.mix(tokens)) * 0.1, words + 0.01 * tokens.mean()


class Strange(torch.nn.Module):
    """A transformer that diffusers has never seen: names of its own, calls by position, a list in a part."""

    def __init__(self, blocks=4):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.trunk = torch.nn.Module()
            self.trunk.stack = torch.nn.ModuleList(Block() for _ in range(blocks))
        self.dtype = torch.float32
        self.between = lambda step, tokens: tokens
        self.step = 0

    def forward(self, hidden_states, timestep=None, return_dict=False):
        tokens, words = hidden_states, hidden_states[:, :2]
        for number, block in enumerate(self.trunk.stack):
            made = block(tokens, words, scale=0.5)
            tokens, words = made[0], made[1]
            tokens = self.between(number, tokens)
        self.step += 1
        return (tokens + words.mean(),)


class Pipe:
    """A loop of somebody's own around it."""

    def __init__(self, transformer):
        self.transformer = transformer
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()

    @torch.no_grad()
    def __call__(self, steps=6):
        x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.transformer(x, t)[0], t, x, return_dict=False)[0]
        return x


@pytest.mark.parametrize("backend", METHODS)
def test_a_transformer_that_nobody_has_seen_just_works(backend):
    pipe = Pipe(Strange())
    plain = pipe()
    with omni_kernels.patched(pipe, backend, METHODS[backend]) as handle:
        cached = pipe()
        assert handle.report.forwards_saved > 0
        assert str(handle.blocks) == "trunk.stack: 4 × Block, tokens and words"
        assert torch.equal(pipe(), cached)
        assert (cached - plain).norm() < 0.1 * plain.norm()
    assert torch.equal(pipe(), plain)


def test_what_the_model_does_between_blocks_is_done_in_a_skipped_step_too():
    pipe = Pipe(Strange())
    pipe.transformer.between = lambda number, tokens: tokens + 0.1 * number
    plain = pipe()
    with omni_kernels.patched(pipe, "first_block_cache", {"threshold": 0.3}) as handle:
        cached = pipe()
        assert handle.report.forwards_saved > 0
    assert (cached - plain).norm() < 0.1 * plain.norm()


# What cannot be followed


class ByIndex(Strange):
    def forward(self, hidden_states, timestep=None, return_dict=False):
        tokens, words = hidden_states, hidden_states[:, :2]
        for number in range(len(self.trunk.stack)):
            tokens, words = self.trunk.stack[number](tokens, words)
        return (tokens,)


class Rearranged(Strange):
    def forward(self, hidden_states, timestep=None, return_dict=False):
        tokens, words = hidden_states, hidden_states[:, :2]
        for block in reversed(list(self.trunk.stack)):
            tokens, words = block(tokens, words)
        return (tokens,)


class Dicts(Strange):
    class Block(Block):
        def forward(self, tokens, words, scale=1.0):
            return ({"tokens": tokens}, words)

    def __init__(self):
        super().__init__()
        self.trunk.stack = torch.nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, hidden_states, timestep=None, return_dict=False):
        tokens, words = hidden_states, hidden_states[:, :2]
        for block in self.trunk.stack:
            made, words = block(tokens, words)
            tokens = made["tokens"]
        return (tokens,)


class Sliced(Strange):
    """Its loop runs over two slices of its list."""

    def forward(self, hidden_states, timestep=None, return_dict=False):
        tokens, words = hidden_states, hidden_states[:, :2]
        for part in (self.trunk.stack[:2], self.trunk.stack[2:]):
            for block in part:
                tokens, words = block(tokens, words)
        return (tokens + words.mean(),)


class InADict(Strange):
    """Its list is in a dict of lists."""

    def __init__(self):
        super().__init__()
        self.trunk = torch.nn.ModuleDict({"stack": self.trunk.stack})

    def forward(self, hidden_states, timestep=None, return_dict=False):
        tokens, words = hidden_states, hidden_states[:, :2]
        for block in self.trunk["stack"]:
            tokens, words = block(tokens, words)
        return (tokens + words.mean(),)


class Counting(Strange):
    """It must see all blocks of its loop, as a model that pairs them with a ControlNet's outputs does."""

    def forward(self, hidden_states, timestep=None, return_dict=False):
        tokens, words, left = hidden_states, hidden_states[:, :2], len(self.trunk.stack)
        for block in self.trunk.stack:
            tokens, words = block(tokens, words)
            left -= 1
        if left:
            raise ValueError("some blocks were not seen")
        return (tokens + words.mean(),)


class Jumping(Strange):
    """What the first blocks return goes to the last ones, too, as in a U-Net."""

    def forward(self, hidden_states, timestep=None, return_dict=False):
        tokens, words, jumps = hidden_states, hidden_states[:, :2], []
        for number, block in enumerate(self.trunk.stack):
            scale = jumps.pop() if number >= len(self.trunk.stack) // 2 else torch.ones(())
            tokens, words = block(tokens, words, scale)
            if number < len(self.trunk.stack) // 2:
                jumps.append(tokens)
        return (tokens + words.mean(),)


class TextFirst(Strange):
    """Its blocks take and return the text before the noise, and the text depends on nothing."""

    class Block(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, und_seq, gen_seq):
            return und_seq + 1, self.block(gen_seq, gen_seq)[0]

    def __init__(self):
        super().__init__()
        self.trunk.stack = torch.nn.ModuleList(map(self.Block, self.trunk.stack))

    def forward(self, hidden_states, timestep=None, return_dict=False):
        text, noise = torch.ones(1, 5, 8), hidden_states
        for block in self.trunk.stack:
            text, noise = block(text, noise)
        return (noise,)


@pytest.mark.parametrize("kind", [Sliced, InADict, Counting, Jumping, TextFirst])
def test_loops_of_other_kinds_work_too(kind):
    pipe = Pipe(kind())
    plain = pipe()
    with omni_kernels.patched(pipe, "first_block_cache", {"threshold": 1e-9}) as handle:
        assert torch.equal(pipe(), plain), "the stream of noise is watched"
        assert handle.report.forwards_saved == 0
    with omni_kernels.patched(pipe, "first_block_cache", METHODS["first_block_cache"]) as handle:
        cached = pipe()
        report = handle.report
        assert report.forwards_saved > 0
        assert report.blocks_run == 4 * report.forwards + report.forwards_saved
        assert torch.equal(pipe(), cached)
        assert (cached - plain).norm() < 0.1 * plain.norm()
    assert torch.equal(pipe(), plain)


def test_jumps_out_of_the_skipped_blocks_are_refused():
    pipe = Pipe(Jumping(6))
    with (
        omni_kernels.patched(pipe, "cache_dit", METHODS["cache_dit"]),
        pytest.raises(ValueError, match=r"cannot be followed: one (takes what an earlier|has its output)"),
    ):
        pipe()


class Renamed(Strange):
    """Its list is known under two names."""

    def __init__(self):
        super().__init__()
        self.layers = self.trunk.stack


class Inference(Pipe):
    """A loop in inference mode, whose tensors have no versions."""

    def __call__(self, steps=6):
        with torch.inference_mode():
            return super().__call__(steps)


@pytest.mark.parametrize("backend", METHODS)
@pytest.mark.parametrize("make", [lambda: Pipe(Renamed()), lambda: Inference(Strange())], ids=["names", "inference"])
def test_two_names_of_a_list_and_inference_mode_change_nothing(make, backend):
    with omni_kernels.patched(Pipe(Strange()), backend, METHODS[backend]) as handle:
        expected = handle._pipe()
        skipped = handle.report.skipped
    pipe = make()
    plain = pipe()
    with omni_kernels.patched(pipe, backend, METHODS[backend]) as handle:
        for _ in range(2):
            assert torch.equal(pipe(), expected)
            assert handle.report.skipped == skipped != []
    assert torch.equal(pipe(), plain)


class Alternating(Pipe):
    """Two transformers take turns in the only branch."""

    def __init__(self):
        super().__init__(Strange())
        self.transformer_2 = Strange(blocks=3)

    @torch.no_grad()
    def __call__(self, steps=6):
        x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
        self.scheduler.set_timesteps(steps)
        for step, t in enumerate(self.scheduler.timesteps):
            output = (self.transformer, self.transformer_2)[step % 2](x, t)[0]
            x = self.scheduler.step(output, t, x, return_dict=False)[0]
        return x


@pytest.mark.parametrize("backend", METHODS)
def test_transformers_that_take_turns_get_nothing_of_each_other(backend):
    pipe = Alternating()
    plain = pipe()
    with omni_kernels.patched(pipe, backend, METHODS[backend]) as handle:
        assert torch.equal(pipe(), plain)
        (branch,) = handle.report.branches.values()
        assert {one.reason for one in branch.decisions} == {"nothing cached yet"}


@pytest.mark.parametrize("backend", METHODS)
def test_a_second_transformer_is_cached_too(backend):
    """Wan 2.2 changes to another transformer for the last steps."""
    pipe = tiny.wan(layers=3, two_stages=True)
    plain = latents(pipe, num_inference_steps=10)
    with omni_kernels.patched(pipe, backend, LOOSE[backend]) as handle:
        cached = latents(pipe, num_inference_steps=10)
        report = handle.report
        assert str(handle.blocks).count("blocks: 3 × WanTransformerBlock, hidden_states") == 2
        assert {name: len(branch.decisions) for name, branch in report.branches.items()} == {"cond": 10, "uncond": 10}
        reasons = [one.reason for one in report.branches["cond"].decisions]
        assert reasons.count("nothing cached yet") == 2
        second = reasons.index("nothing cached yet", 1)
        assert any(step > second for step in report.skipped), "steps of the second one"
        assert any(step < second for step in report.skipped) or backend == "cache_dit"
        assert torch.equal(latents(pipe, num_inference_steps=10), cached)
    assert torch.equal(latents(pipe, num_inference_steps=10), plain)


class Announcing(Strange):
    """It can be told the step, as diffusers' models can."""

    @contextlib.contextmanager
    def cache_context(self, name, **where):
        yield


class Elsewhere(Pipe):
    """A loop that steps a copy of its scheduler, and tells the step."""

    @torch.no_grad()
    def __call__(self, steps=6):
        x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
        self.scheduler.set_timesteps(steps)
        scheduler = copy.deepcopy(self.scheduler)
        for step, t in enumerate(scheduler.timesteps):
            with self.transformer.cache_context("cond", step_index=step, sigma=float(scheduler.sigmas[step])):
                output = self.transformer(x, t)[0]
            x = scheduler.step(output, t, x, return_dict=False)[0]
        return x


def test_a_step_that_the_pipeline_tells_and_no_scheduler_makes_ends_the_request():
    pipe = Elsewhere(Announcing())
    plain = pipe()
    with omni_kernels.patched(pipe, "first_block_cache", {"threshold": 1.0}) as handle:
        with pytest.warns(UserWarning, match="Elsewhere is at step 1, and its scheduler has made 0.*caches nothing"):
            assert torch.equal(pipe(), plain)
        assert "is at step 1" in handle.report.notes[-1]


def looping(body, result=lambda tokens, kept: tokens):
    """A Strange whose loop is `tokens, words = body(block, tokens, words, kept)`."""

    class Looping(Strange):
        def forward(self, hidden_states, timestep=None, return_dict=False):
            tokens, words, kept = hidden_states, hidden_states[:, :2], []
            for block in self.trunk.stack:
                tokens, words = body(block, tokens, words, kept)
            return (result(tokens, kept),)

    return Looping


def changed_in_place(block, tokens, words, kept):
    tokens, words = block(tokens, words)
    return tokens.add_(0.1), words


def collected(block, tokens, words, kept):
    tokens, words = block(tokens, words)
    kept.append(tokens.tanh())
    return tokens, words


def beside_each_other(block, tokens, words, kept):
    kept.append(block(tokens, words)[0])
    return tokens, words


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (looping(changed_in_place), "has its output changed in place"),
        (looping(collected, lambda tokens, kept: sum(kept)), "a skipped step of the same input is off by"),
        (looping(beside_each_other, lambda tokens, kept: sum(kept)), "take the same tokens, one beside the other"),
        (ByIndex, "are not taken from a list of modules in turn"),
        (Rearranged, "of trunk.stack do not run one after the other"),
        (Dicts, "of trunk.stack cannot be followed: one returns dict, Tensor"),
    ],
)
def test_blocks_that_cannot_be_followed_are_refused_each_time_and_nothing_is_left(kind, reason):
    pipe = Pipe(kind())
    plain = pipe()
    with omni_kernels.patched(pipe, "first_block_cache"):
        for _ in range(2):
            with pytest.raises(ValueError, match=f"cannot follow the blocks of this {kind.__name__}.*{reason}"):
                pipe()
    assert torch.equal(pipe(), plain)


def test_a_sampling_within_another_finds_the_blocks_for_both():
    outer = Pipe(Strange())
    inner = Pipe(outer.transformer)
    plain = outer()
    config = {"threshold": 0.2}
    with omni_kernels.patched(inner, "mag_cache", METHODS["mag_cache"]):
        alone = inner()
    with omni_kernels.patched(outer, "first_block_cache", config) as handle:
        cached = outer()
        with omni_kernels.patched(inner, "mag_cache", METHODS["mag_cache"]), handle.sampling():
            assert torch.equal(inner(), alone)
        assert torch.equal(outer(), cached)
    assert torch.equal(outer(), plain)


class Asking(Strange):
    """It asks of each module of a list what it is, and leaves out what it does not know."""

    def __init__(self):
        super().__init__()
        self.entry = torch.nn.ModuleList([torch.nn.Linear(8, 8)])

    def forward(self, hidden_states, timestep=None, return_dict=False):
        for layer in self.entry:
            if isinstance(layer, torch.nn.Linear) and layer == self.entry[0]:
                hidden_states = layer(hidden_states)
        return super().forward(hidden_states)


def test_a_module_in_the_watched_forward_is_what_it_is():
    pipe = Pipe(Asking())
    plain = pipe()
    with omni_kernels.patched(pipe, "first_block_cache", {"threshold": 0.0}):
        assert torch.equal(pipe(), plain)


def test_a_block_that_returns_something_else_later_ends_the_request():
    pipe = Pipe(Strange())
    plain = pipe()
    block = pipe.transformer.trunk.stack[3]
    original = type(block).forward
    with omni_kernels.patched(pipe, "first_block_cache", {"threshold": 0.0}) as handle:
        calls = []

        def later(tokens, words, scale=1.0):
            calls.append(1)
            made = original(block, tokens, words, scale)
            return made if len(calls) < 3 else (*made, None)

        block.forward = later
        with pytest.raises(RuntimeError, match="a Block returned something else than in the first forward"):
            pipe()
        assert handle._installed.held_tensors() == []
        del block.forward
        assert torch.equal(pipe(), plain)


def longer(tokens, words):
    return torch.cat([tokens, tokens[:, :1]], 1), words


def in_another_dtype(tokens, words):
    return tokens.double(), words


def longer_text(tokens, words):
    return tokens, torch.cat([words, words], 1)


#: Settings with which steps 3 and 5 of 6 are computed, and step 4 is skipped.
COMPUTES_AGAIN = {
    "cache_dit": {"residual_diff_threshold": 1.0, "max_warmup_steps": 1, "max_continuous_cached_steps": 1},
    "mag_cache": {"threshold": 9.0, "mag_ratios": [1.0], "retention_ratio": 0.1, "max_skip_steps": 1},
}


@pytest.mark.parametrize("backend", COMPUTES_AGAIN)
@pytest.mark.parametrize("change", [longer, in_another_dtype, longer_text])
def test_a_block_that_returns_another_shape_or_dtype_later_ends_the_request(backend, change):
    """In a computed step; in a skipped step, the block does not run."""
    pipe = Pipe(Strange())
    plain = pipe()
    block = pipe.transformer.trunk.stack[3]
    original = type(block).forward
    with omni_kernels.patched(pipe, backend, COMPUTES_AGAIN[backend]) as handle:
        calls = []

        def later(tokens, words, scale=1.0):
            calls.append(1)
            made = original(block, tokens, words, scale)
            return made if len(calls) < 3 else change(*made)

        block.forward = later
        with pytest.raises(RuntimeError, match=r"the blocks took torch\.float32 \(1, \d, 8\) and returned"):
            pipe()
        assert len(calls) == 3
        assert handle._installed.held_tensors() == []
        del block.forward
        pipe()
        assert handle.report.complete
    assert torch.equal(pipe(), plain)


def test_a_block_before_the_skipped_ones_with_another_text_later_has_the_step_computed():
    """The first block runs in every step of cache_dit. The report says that the shape has changed."""
    pipe = Pipe(Strange())
    block, calls = pipe.transformer.trunk.stack[0], []
    original = type(block).forward

    def later(tokens, words, scale=1.0):
        calls.append(1)
        made = original(block, tokens, words, scale)
        return made if pipe.transformer.step < 6 else longer_text(*made)

    block.forward = later
    with omni_kernels.patched(pipe, "cache_dit", COMPUTES_AGAIN["cache_dit"]) as handle:
        pipe()
    decisions = handle.report.branches["0"].decisions
    assert [one.computed for one in decisions if one.reason == "shape changed"] == [True]


@pytest.mark.parametrize("change", [lambda stack: stack.append(Block()), lambda stack: stack.__delitem__(3)])
@pytest.mark.parametrize("backend", METHODS)
def test_a_list_that_changes_its_length_during_a_request_ends_it(backend, change):
    """What was kept of its blocks would be wrong in a skipped step, and a list of 3 would end before a list of 4."""
    pipe = Pipe(Strange())
    plain = pipe()
    stack = pipe.transformer.trunk.stack
    blocks = list(stack)
    step = pipe.scheduler.step

    def stepping(output, t, *args, **kwargs):
        if t == pipe.scheduler.timesteps[2]:
            change(stack)
        return step(output, t, *args, **kwargs)

    with omni_kernels.patched(pipe, backend, METHODS[backend]) as handle:
        pipe.scheduler.step = stepping
        with pytest.raises(RuntimeError, match=r"a list of Block has [35] blocks, and had 4 when the"):
            pipe()
        assert not handle.report.complete
        assert handle._installed.held_tensors() == []
        del pipe.scheduler.step
        stack._modules.clear()
        stack.extend(blocks)
        pipe()
        assert handle.report.complete
    assert torch.equal(pipe(), plain)


def test_a_list_of_another_length_is_refused_by_name():
    pipe = Pipe(Strange())
    with omni_kernels.patched(pipe, "first_block_cache") as handle:
        pipe()
        pipe.transformer.trunk.stack.append(Block())
        with pytest.raises(ValueError, match=r"this Strange has 5 blocks in trunk\.stack, and had 4 when a cache"):
            pipe()
        del pipe.transformer.trunk.stack[4]
        pipe()
        assert handle.report.complete


class Controlled(Strange):
    """What it adds after some blocks is an argument: a list for all blocks, or a dict by the number of the block."""

    def forward(self, hidden_states, timestep=None, control=None, return_dict=False):
        tokens, words = hidden_states, hidden_states[:, :2]
        for number, block in enumerate(self.trunk.stack):
            tokens, words = block(tokens, words)
            if control is not None and number in control:
                tokens = tokens + control[number]
        return (tokens + words.mean(),)


class Controlling(Pipe):
    """A loop that passes some arguments on."""

    @torch.no_grad()
    def __call__(self, steps=6, **arguments):
        x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.transformer(x, t, **arguments)[0], t, x, return_dict=False)[0]
        return x


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("backend", ["first_block_cache", "cache_dit"])
def test_other_arguments_are_checked_and_learned_anew(backend, place):
    """What an earlier request showed does not hold for calls with other arguments."""
    pipe, control = Controlling(Controlled()), {place: torch.full((1, 5, 8), 0.5)}
    with omni_kernels.patched(pipe, backend, METHODS[backend]) as handle:
        alone = pipe(control=control)
        assert handle.report.forwards_saved > 0
    with omni_kernels.patched(pipe, backend, METHODS[backend]):
        pipe()
        pipe(control={})
        for _ in range(2):
            assert torch.equal(pipe(control=control), alone)


class Unusual(Strange):
    """With `collect`, it uses what each of its blocks has returned."""

    def forward(self, hidden_states, timestep=None, collect=False, return_dict=False):
        tokens, words, made = hidden_states, hidden_states[:, :2], []
        for block in self.trunk.stack:
            tokens, words = block(tokens, words)
            made.append(tokens.tanh())
        return (sum(made) if collect else tokens,)


def test_arguments_with_which_a_model_cannot_be_followed_are_refused_later_too():
    pipe = Controlling(Unusual())
    plain = pipe(collect=True)
    with omni_kernels.patched(pipe, "first_block_cache"):
        pipe()
        for _ in range(2):
            with pytest.raises(ValueError, match="Unusual: a skipped step of the same input is off by"):
                pipe(collect=True)
    assert torch.equal(pipe(collect=True), plain)


class Remembering(Strange):
    """It writes into an argument, draws random numbers, and counts its calls."""

    def forward(self, hidden_states, timestep=None, notes=None, return_dict=False):
        notes["seen"].append(len(notes["seen"]))
        noise = 0.01 * torch.rand(())
        return (super().forward(hidden_states)[0] + noise,)


def test_the_check_leaves_no_traces():
    pipe, notes, calls = Controlling(Remembering()), {"seen": []}, []
    torch.manual_seed(0)
    plain = pipe(notes={"seen": []})
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    with omni_kernels.patched(pipe, "first_block_cache", {"threshold": 0.0}):
        assert torch.equal(pipe(notes=notes), plain)
    assert notes["seen"] == list(range(6))
    assert len(calls) == 6


class Memorising(Strange):
    """It calls its blocks for an input that it has not seen."""

    def forward(self, hidden_states, timestep=None, return_dict=False):
        known = vars(self).setdefault("known", {})
        key = hidden_states.sum().item()
        if key not in known:
            known[key] = super().forward(hidden_states)
        return known[key]


def test_a_check_in_which_nothing_was_skipped_does_not_count():
    pipe = Pipe(Memorising())
    with (
        omni_kernels.patched(pipe, "first_block_cache"),
        pytest.raises(ValueError, match="a skipped step of the same input is off by inf"),
    ):
        pipe()


class Unnamed(Strange):
    """Nothing in the names says which of its streams is the text, which never changes."""

    class Block(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, a, b):
            return a + 1, self.block(b, b)[0]

    def __init__(self):
        super().__init__()
        self.trunk.stack = torch.nn.ModuleList(map(self.Block, self.trunk.stack))

    def forward(self, hidden_states, timestep=None, return_dict=False):
        a, b = torch.ones(1, 5, 8), hidden_states
        for block in self.trunk.stack:
            a, b = block(a, b)
        return (b,)


def test_a_stream_that_never_changes_decides_nothing():
    pipe = Pipe(Unnamed())
    plain = pipe()
    with omni_kernels.patched(pipe, "first_block_cache", {"threshold": 0.5}) as handle:
        assert torch.equal(pipe(), plain)
        assert "the watched stream has not changed at all" in {
            one.reason for one in handle.report.branches["0"].decisions
        }
