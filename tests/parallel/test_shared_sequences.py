"""Caches of blocks under parallelism: two ranks that run a transformer decide together, as one alone would.

FLUX splits its sequences before its blocks, Qwen-Image and Wan as they enter block 0, Wan the frames' alone, and of an
edit's tokens rank 0 has all that are noise and rank 1 none. Both ranks are processes (`two_ranks`); what every test
asserts was computed by both, at once for all tests.
"""

import contextlib
import itertools
import math
from types import SimpleNamespace
from unittest import mock

import diffusers
import pytest
import tiny
import torch
from two_ranks import NEEDED, RANKS, RING, TENSOR, ULYSSES, UNEVEN, enable, of_each_rank

import omni_kernels
from omni_runtime.cache.ranks import Ranks, Shard

pytestmark = NEEDED

STEPS = 10
IDENTITY = [0.0, 0.0, 0.0, 1.0, 0.0]
TEA = {"rel_l1_thresh": 0.3, "coefficients": IDENTITY}
DBCACHE = {"max_warmup_steps": 2, "residual_diff_threshold": 0.25}
RATIOS = [1.0, 1.3, 1.2, 1.1, 1.02, 1.01, 0.98, 0.95, 0.9, 0.8]
MASK = [1, 1, 0, 1, 0, 0, 1, 0, 0, 1]
#: name → (backend, configuration); each computes some steps and skips some.
CACHES = {
    "tea_cache": ("tea_cache", TEA),
    "tea_cache, replayed": ("tea_cache", TEA | {"decision": "replay", "drift_tolerance": 1.0}),
    "first_block_cache": ("first_block_cache", {"threshold": 0.2}),
    "mag_cache": ("mag_cache", {"mag_ratios": RATIOS}),
    "sea_cache": ("sea_cache", {"threshold": 0.25}),
    "cache_dit, F2B1": ("cache_dit", DBCACHE | {"Fn_compute_blocks": 2, "Bn_compute_blocks": 1}),
    "cache_dit, dynamic mask": ("cache_dit", DBCACHE | {"steps_computation_mask": MASK}),
    "cache_dit, static mask": (
        "cache_dit",
        DBCACHE | {"steps_computation_mask": MASK, "scm_steps_policy": "static", "enable_taylorseer": True},
    ),
    **{
        f"cache_dit, {forecaster}": ("cache_dit", DBCACHE | {"forecaster": forecaster})
        for forecaster in ("newton", "hermite", "foca")
    },
    # It is fitted from four evenly spaced steps on.
    "cache_dit, dmd": ("cache_dit", DBCACHE | {"forecaster": "dmd", "max_warmup_steps": 6}),
}
FEW = ("tea_cache", "first_block_cache", "mag_cache", "sea_cache")

#: To be split into even halves, prompts must have an even number of tokens.
EVEN = {"prompt": "two cats"}
#: name → (pipeline, arguments of a request, how the sequence is shared, which caches)
SHARED = {
    "flux": (tiny.flux, {}, ULYSSES, tuple(CACHES)),
    "qwen_image": (tiny.qwen_image, EVEN, ULYSSES, tuple(CACHES)),
    "qwen_image_edit": (tiny.qwen_image_edit, EVEN, ULYSSES, (*FEW, "tea_cache, replayed")),
    "wan": (lambda: tiny.wan(layers=4), {}, ULYSSES, ("first_block_cache", "mag_cache", "cache_dit, F2B1")),
    "flux, uneven shards": (tiny.flux, {"height": 80, "width": 48}, UNEVEN, (*FEW, "cache_dit, dmd")),
    "qwen_image_edit, uneven shards": (tiny.qwen_image_edit, {"height": 80, "width": 48}, UNEVEN, FEW),
    "qwen_image, ring": (tiny.qwen_image, EVEN, RING, FEW),
    "qwen_image_edit, tensor parallel": (tiny.qwen_image_edit, {}, TENSOR, (*FEW, "cache_dit, dmd")),
}
#: Every cache once, and every way of sharing, uneven shards and tensor parallelism of a measure that sums up; the other
#: pairs are long.
CHOSEN = {
    "flux": ("tea_cache, replayed", "cache_dit, static mask", "cache_dit, newton"),
    "qwen_image": ("cache_dit, dynamic mask", "cache_dit, hermite", "cache_dit, foca"),
    "qwen_image_edit": ("tea_cache", "first_block_cache"),
    "wan": ("cache_dit, F2B1",),
    "flux, uneven shards": ("first_block_cache", "cache_dit, dmd"),
    "qwen_image_edit, uneven shards": ("sea_cache",),
    "qwen_image, ring": ("mag_cache",),
    "qwen_image_edit, tensor parallel": ("tea_cache", "cache_dit, dmd"),
}
OTHERS = {name: tuple(cache for cache in caches if cache not in CHOSEN[name]) for name, (*_, caches) in SHARED.items()}


def each(*names):
    """Pairs of a way of sharing and a cache, as parameters."""
    return [
        pytest.param(name, cache, marks=() if cache in CHOSEN[name] else pytest.mark.long)
        for name in names
        for cache in SHARED[name][-1]
    ]


def request(pipe, handle, seed=0, **arguments):
    """The latents, and what is to be said of them."""
    held = []

    def count(pipe, step, timestep, tensors):
        held.append(sum(tensor.numel() for tensor in handle._installed.held_tensors()))
        return {}

    made = tiny.generate(
        pipe, seed, num_inference_steps=STEPS, output_type="latent", callback_on_step_end=count, **arguments
    )
    branches = handle.report.branches
    decisions = {name: [list(decision) for decision in branch.decisions] for name, branch in branches.items()}
    return made, {"decisions": decisions, "held": max(held)}


def cached(pipe, cache, arguments, fuse=False):
    """Of a second request where a first one's schedule is replayed, of the first elsewhere."""
    with omni_kernels.patched(pipe, *CACHES[cache], fuse=fuse) as handle:
        if "replayed" in cache:
            request(pipe, handle, seed=1, **arguments)
        return request(pipe, handle, **arguments)


def own_rank():
    return torch.distributed.get_rank()


def of_all_ranks(one):
    made = [None] * RANKS
    torch.distributed.all_gather_object(made, one)
    return made


def off(made, expected):
    return ((made - expected).abs().max() / expected.abs().max()).item()


def shared(name, caches):
    """Each of the caches on one rank alone, by turns, and then on all together; the first over fused blocks, too."""
    build, arguments, parallel, _ = SHARED[name]
    pipe, alone = build(), {}
    for of_a_rank in of_all_ranks({cache: cached(pipe, cache, arguments) for cache in caches[own_rank() :: RANKS]}):
        alone |= of_a_rank
    enable(pipe.transformer, parallel)
    results = {}
    for cache, (expected, told) in alone.items():
        made, together = cached(pipe, cache, arguments)
        results[cache] = {"alone": told, "together": together, "off": off(made, expected)}
    made, together = cached(pipe, caches[0], arguments, fuse=True)
    results["fused"] = {"alone": alone[caches[0]][1], "together": together, "off": off(made, alone[caches[0]][0])}
    return results


def contents(pipe):
    """What is hung on the transformer's modules, and on the pipeline."""
    modules = [{**vars(module), "_modules": dict(module._modules)} for module in pipe.transformer.modules()]
    return modules, dict(vars(pipe)), dict(vars(pipe.scheduler))


def installed_before(name):
    """Parallelism is enabled under a cache; and all that a cache does is undone."""
    build, arguments, parallel, _ = SHARED[name]
    pipe = build()
    handle = omni_kernels.patch(pipe, *CACHES["tea_cache"])
    expected, alone = request(pipe, handle, **arguments)
    enable(pipe.transformer, parallel)
    made, together = request(pipe, handle, **arguments)

    def fail(pipe, step, timestep, tensors):
        if step == 4:
            raise RuntimeError("left on all ranks")
        return {}

    with contextlib.suppress(RuntimeError):
        tiny.generate(pipe, num_inference_steps=STEPS, callback_on_step_end=fail, **arguments)
    leaked = len(handle._installed.held_tensors())
    again, _ = request(pipe, handle, **arguments)
    omni_kernels.unpatch(pipe)
    plain = tiny.generate(pipe, output_type="latent", **arguments)
    before = contents(pipe)
    omni_kernels.patch(pipe, *CACHES["first_block_cache"]).undo()
    put_back = contents(pipe) == before
    undone = tiny.generate(pipe, output_type="latent", **arguments)
    return {
        "alone": alone,
        "together": together,
        "off": off(made, expected),
        "leaked": leaked,
        "as before the failure": torch.equal(again, made),
        "undone": put_back and torch.equal(undone, plain),
    }


def on_either_side(name):
    """A threshold between what either rank measures of its own tokens."""
    build, arguments, parallel, _ = SHARED[name]
    pipe, pipe_alone = build(), build()
    enable(pipe.transformer, parallel)
    with (
        mock.patch.object(Ranks, "add", lambda self, summands: summands),
        omni_kernels.patched(pipe, "first_block_cache", {"threshold": 1e-9}) as handle,
    ):
        _, told = request(pipe, handle, **arguments)
    own = of_all_ranks(next(iter(told["decisions"].values()))[1][3])
    config = {"threshold": sum(own) / RANKS}
    with omni_kernels.patched(pipe_alone, "first_block_cache", config) as handle:
        expected, alone = request(pipe_alone, handle, **arguments)
    with omni_kernels.patched(pipe, "first_block_cache", config) as handle:
        made, together = request(pipe, handle, **arguments)
    return {"own": own, **config, "alone": alone, "together": together, "off": off(made, expected)}


def replayed_at_another_size():
    """15 tokens, split into 8 and 7, and then 14, of which rank 1 has 7 again, at the same noise levels."""
    pipe = tiny.flux()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    enable(pipe.transformer, UNEVEN)
    with omni_kernels.patched(pipe, *CACHES["tea_cache, replayed"]) as handle:
        sizes = [(80, 48), (112, 32), (80, 48), (112, 32)]
        return [
            request(pipe, handle, seed, height=height, width=width)[1] for seed, (height, width) in enumerate(sizes)
        ]


def recorded_before():
    """Each rank has recorded a schedule of its own, while it was alone."""
    pipe = tiny.flux()
    with omni_kernels.patched(pipe, *CACHES["tea_cache, replayed"]) as handle:
        request(pipe, handle, seed=own_rank())
        enable(pipe.transformer)
        return request(pipe, handle)[1]


@torch.no_grad()
def reshaped_within_a_request():
    """From step 5 on there are 14 tokens, of which rank 1 has 7 as it had of 15."""
    pipe = tiny.flux()
    enable(pipe.transformer, UNEVEN)
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 15, 64, generator=draw), torch.randn(1, 64, 32, generator=draw)
    handle = omni_kernels.patch(pipe, *CACHES["first_block_cache"])
    with handle.sampling():
        pipe.scheduler.set_timesteps(STEPS, mu=0.5)
        for step, timestep in enumerate(pipe.scheduler.timesteps):
            latents = latents[:, : 15 if step < 5 else 14]
            (velocity,) = pipe.transformer(
                hidden_states=latents,
                encoder_hidden_states=text,
                pooled_projections=torch.ones(1, 32),
                timestep=timestep[None] / 1000,
                img_ids=torch.arange(3.0 * latents.shape[1]).view(-1, 3),
                txt_ids=torch.zeros(64, 3),
                guidance=torch.ones(1),
                return_dict=False,
            )
            (latents,) = pipe.scheduler.step(velocity, timestep, latents, return_dict=False)
    return [list(decision) for decision in handle.report.branches["0"].decisions]


def compiled_blocks(build, arguments, parallel, fuse=False, compile="eager"):
    """Compiled blocks under a cache, on one rank alone and on both together."""
    torch._dynamo.reset()
    pipe = build()
    with omni_kernels.patched(pipe, *CACHES["tea_cache"]) as handle:
        expected, alone = request(pipe, handle, **arguments)
    enable(pipe.transformer, parallel)
    with omni_kernels.patched(pipe, *CACHES["tea_cache"], fuse=fuse, compile={"backend": compile}) as handle:
        made, together = request(pipe, handle, **arguments)
        compiled = len(handle.compiled)
    return {"alone": alone, "together": together, "off": off(made, expected), "compiled": compiled}


def uneven_compiled_blocks():
    """What is said of compiled blocks whose shards are uneven: diffusers' exchange cannot be traced."""
    pipe = tiny.flux(layers=1, single_layers=1)
    enable(pipe.transformer, UNEVEN)
    handle = omni_kernels.patch(pipe, *CACHES["tea_cache"], compile={"backend": "eager"})
    try:
        request(pipe, handle)
    except ValueError as error:
        return str(error)


def on_a_rank():
    """All that is asserted, but for the long ones."""
    return {name: shared(name, caches) for name, caches in CHOSEN.items()} | {
        "installed before": {name: installed_before(name) for name in ("flux", "qwen_image")},
        "either side": {name: on_either_side(name) for name in ("flux", "qwen_image")},
        "another size": replayed_at_another_size(),
        "recorded before": recorded_before(),
        "reshaped": reshaped_within_a_request(),
        "compiled": compiled_blocks(lambda: tiny.flux(layers=1, single_layers=1), {}, ULYSSES, fuse=True),
        "uneven, compiled": uneven_compiled_blocks(),
    }


def others_on_a_rank():
    compiled = {
        "ulysses, fused, inductor": compiled_blocks(lambda: tiny.qwen_image(layers=2), EVEN, ULYSSES, True, "inductor"),
        "ring": compiled_blocks(lambda: tiny.qwen_image(layers=2), EVEN, RING),
        "tensor": compiled_blocks(lambda: tiny.qwen_image(layers=2), {}, TENSOR),
    }
    return {name: shared(name, caches) for name, caches in OTHERS.items()} | {"compiled": compiled}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank has computed."""
    return of_each_rank(on_a_rank, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """The same, of the pairs that are long."""
    return of_each_rank(others_on_a_rank, tmp_path_factory.mktemp("others"))


@pytest.fixture
def pair(request, name, cache):
    """Each rank's results of a way of sharing under a cache."""
    computed = request.getfixturevalue("ranks" if cache in CHOSEN[name] else "others")
    return [rank[name][cache] for rank in computed]


def settled(told):
    """Which steps were computed and why, by branch."""
    return {name: [decision[:3] for decision in made] for name, made in told["decisions"].items()}


def distances(told):
    """What was held against the thresholds; NaN where nothing was."""
    decisions = itertools.chain(*told["decisions"].values())
    return torch.tensor([[math.nan if x is None else x for x in decision[3:]] for decision in decisions])


def check(results, kinds=frozenset({True, False})):
    """Each rank's results: all did the same, and the same as one alone, with steps of these kinds, computed or not."""
    for one in results:
        alone, together = one["alone"], one["together"]
        assert together["decisions"] == results[0]["together"]["decisions"]  # to the last bit of their distances
        assert settled(together) == settled(alone)
        for computed in settled(together).values():
            assert {decision[1] for decision in computed} >= kinds
        torch.testing.assert_close(distances(together), distances(alone), rtol=1e-4, atol=1e-7, equal_nan=True)
        assert one["off"] < 1e-5


@pytest.mark.parametrize(("name", "cache"), each(*SHARED))
def test_ranks_decide_together_as_one_alone(pair, name, cache):
    check(pair)


@pytest.mark.parametrize("name", SHARED)
def test_ranks_decide_together_over_fused_blocks(ranks, name):
    check([rank[name]["fused"] for rank in ranks])


@pytest.mark.parametrize(("name", "cache"), each(*(name for name in SHARED if SHARED[name][2] is not TENSOR)))
def test_a_rank_holds_its_share_alone(pair, name, cache):
    """Of shards that are uneven, the largest has 8 of 15 tokens, and of an edit's noise rank 0 has all."""
    most = 0.55 if "edit" not in name or cache in ("first_block_cache", "mag_cache", "sea_cache") else 0.7
    for one in pair:
        assert 0 < one["together"]["held"] <= most * one["alone"]["held"]


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_parallelism_is_enabled_under_a_cache(ranks, name):
    check([rank["installed before"][name] for rank in ranks])


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_a_request_that_fails_leaves_nothing_and_undo_everything_as_it_was(ranks, name):
    for rank in ranks:
        one = rank["installed before"][name]
        assert one["leaked"] == 0
        assert one["as before the failure"]
        assert one["undone"]


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_ranks_whose_own_tokens_would_have_them_part_decide_alike(ranks, name):
    results = [rank["either side"][name] for rank in ranks]
    assert min(results[0]["own"]) < results[0]["threshold"] < max(results[0]["own"])
    check(results, kinds=set())


def test_a_schedule_is_replayed_at_the_size_of_the_whole_sequence(ranks):
    """Whatever a rank's own share of it is: rank 1 has as many tokens of both sizes."""
    for rank in ranks:
        told = rank["another size"]
        replays = [any("replayed" in decision[2] for decision in one["decisions"]["cond"]) for one in told]
        assert replays == [False, False, True, True]
        assert [settled(one) for one in told] == [settled(one) for one in ranks[0]["another size"]]


def test_what_a_rank_has_recorded_alone_is_not_replayed_together(ranks):
    for rank in ranks:
        assert settled(rank["recorded before"]) == settled(ranks[0]["recorded before"])
        assert not any("replayed" in decision[2] for decision in rank["recorded before"]["decisions"]["cond"])


def test_a_shape_that_changes_on_one_rank_has_changed_for_all(ranks):
    for rank in ranks:
        assert rank["reshaped"] == ranks[0]["reshaped"]
        assert [decision[0] for decision in rank["reshaped"] if decision[2] == "shape changed"] == [5]


def test_ranks_decide_together_over_compiled_blocks(ranks):
    check([rank["compiled"] for rank in ranks])
    assert [rank["compiled"]["compiled"] for rank in ranks] == [2, 2]


@pytest.mark.long
@pytest.mark.parametrize("name", ["ulysses, fused, inductor", "ring", "tensor"])
def test_every_kind_of_parallelism_has_compiled_blocks(others, name):
    check([rank["compiled"][name] for rank in others])


def test_compiled_blocks_with_uneven_shards_are_refused_by_name(ranks):
    for rank in ranks:
        assert "FluxTransformer2DModel are compiled, and its ranks have unequal numbers" in rank["uneven, compiled"]


def test_of_the_noise_tokens_each_of_three_ranks_has_what_lies_in_its_part():
    sizes = [4, 3, 2]
    shard = Shard(SimpleNamespace(split=True, count=3, rank=2, tokens=lambda own, device: sizes))
    shard.measure(torch.zeros(1, 2, 8), None)
    assert shard.parts(9) == [4, 3, 2]
    assert shard.parts(6) == [4, 2, 0]
    assert shard.parts(8) == [4, 3, 1]
    assert shard.part(0, 8) == (0, 1)
    assert shard.part(3, 9) == (0, 2)
    shard.measure(torch.zeros(1, 2, 8), (3, 9))
    assert shard.watched == 6
    assert shard.parts(6) == [1, 3, 2]
    assert shard.parts(2) == [1, 1, 0]
