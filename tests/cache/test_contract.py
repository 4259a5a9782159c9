"""Block contracts: what is found by watching a forward is what the rows say, and what works is the same picture."""

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
