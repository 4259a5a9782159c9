"""CFG parallelism: two ranks compute one branch of guidance each, and make the picture of one rank.

What every test asserts was computed by two processes (`several_ranks`), at once for all tests. Pipelines that cannot be
shared out are small loops of this module.
"""

import os
import warnings

import diffusers
import pytest
import tiny
import torch
from several_ranks import NEEDED, on_ranks
from test_shared_sequences import CACHES, STEPS

from omni_runtime import Omni

pytestmark = NEEDED

CFG = {"cfg": 2}
PIPELINES = {
    **tiny.PIPELINES,
    "wan": lambda: tiny.wan(layers=4),
    "wan, two stages": lambda: tiny.wan(layers=4, two_stages=True),
    "chroma": tiny.chroma,
}
METHODS = {
    **CACHES,
    "velocity_cache": ("velocity_cache", {"speedup": 2.0}),
    "easy_cache": ("easy_cache", {"thresh": 0.4, "ret_steps": 1}),
}
#: (pipeline, cache): a cache of each kind of gate, over two calls, one call for both branches and two transformers.
CHOSEN = [
    ("qwen_image", "tea_cache, replayed"),
    ("qwen_image", "first_block_cache"),
    ("qwen_image", "cache_dit, dynamic mask"),
    ("qwen_image", "velocity_cache"),
    ("qwen_image", "easy_cache"),
    ("z_image", "first_block_cache"),
    ("z_image", "sea_cache"),
    ("z_image", "cache_dit, dmd"),
    ("z_image", "velocity_cache"),
    ("wan, two stages", "mag_cache"),
    ("wan, two stages", "velocity_cache"),
]
OTHERS = [
    (name, cache)
    for name in ("qwen_image", "qwen_image_edit", "z_image", "flux", "wan", "wan, two stages", "chroma")
    for cache in METHODS
    if (name, cache) not in CHOSEN
]


def request(omni, seed=0, **arguments):
    """The result of a request, and how often this rank has run the first transformer."""
    calls = []
    hook = omni.pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    sizes = {"height": 64, "width": 64, "num_inference_steps": STEPS, "output_type": "latent"}
    try:
        with tiny.small_references(), torch.no_grad():
            defaults = tiny.default_arguments(omni.pipe) | {"prompt": "a cat"} | sizes
            (result,) = omni.generate(**defaults | arguments, seed=seed)
    finally:
        hook.remove()
    return result, len(calls)


def picture(result):
    return result.images if result.frames is None else result.frames


def off(made, expected):
    return ((picture(made) - picture(expected)).abs().max() / picture(expected).abs().max()).item()


def told(result):
    """The report, but for distances, which rounding changes."""
    report = result.cache
    if report is None:
        return None
    steps = {name: [decision[:3] for decision in branch.decisions] for name, branch in report.branches.items()}
    return {"steps": steps, "blocks": [report.blocks_run, report.blocks_total]}


def shared(build, cache=None, how=None, **arguments):
    """A request on one rank, and on two."""
    backend, config = METHODS.get(cache, (None, None))
    alone = Omni(build(), cache_backend=backend, cache_config=config)
    together = Omni(build(), cache_backend=backend, cache_config=config, parallel=CFG, **how or {})
    if cache is not None and "replayed" in cache:
        request(alone, seed=1, **arguments)
        request(together, seed=1, **arguments)
    expected, calls = request(alone, **arguments)
    made, own = request(together, **arguments)
    return {"off": off(made, expected), "calls": [calls, own], "told": [told(expected), told(made)]}


def guidance_that_ends():
    """Z-Image cuts its guidance: one call for both branches in the first steps, one branch afterwards."""
    return {
        cache: shared(tiny.z_image, cache, cfg_normalization=False, cfg_truncation=0.6)
        for cache in (None, "first_block_cache", "velocity_cache")
    }


class Loop(diffusers.DiffusionPipeline):
    """A small loop over Wan's transformer. `between` is applied to the first call's result before the second call."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def __call__(self, prompt, num_inference_steps=4, between=None, calls=None, notes=False, generator=None):
        text = [torch.linspace(-1, 1, 8 * 32).reshape(1, 8, 32) * scale for scale in (1, 0.5, 0.2)]
        latents = torch.randn(1, 16, 1, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        more = {"notes": []} if notes else {}
        with self.progress_bar(total=num_inference_steps) as bar:
            for step, timestep in enumerate(self.scheduler.timesteps):
                made = []
                for branch in range(2 if calls is None else calls[step]):
                    one, *_ = self.transformer(latents, timestep[None], text[branch], return_dict=False, **more)
                    if between is not None and branch == 0:
                        one = getattr(self, between)(one, latents, timestep)
                    made.append(one)
                output = made[0] if len(made) == 1 else made[0] + 2.0 * (made[0] - torch.stack(made[1:]).mean(0))
                (latents,) = self.scheduler.step(output, timestep, latents, return_dict=False)
                bar.update()
        return diffusers.ImagePipelineOutput(images=latents)

    def clean(self, one, latents, timestep):
        """As Cosmos does: computed with the latents, and cast, before the second call."""
        return (0.9 * latents - 0.1 * one.double()).float()

    def picked(self, one, latents, timestep):
        return one[:, torch.arange(15, -1, -1)]

    def normed(self, one, latents, timestep):
        return one / one.norm()

    def measured(self, one, latents, timestep):
        return one * float(one.abs().max())

    def doubled(self, one, latents, timestep):
        return one.mul_(2.0)

    def chained(self, one, latents, timestep):
        self.transformer(one, timestep[None], torch.zeros(1, 8, 32))
        return one


def loop():
    pipe = tiny.wan(layers=2)
    return Loop(pipe.transformer, pipe.scheduler)


class Odd(diffusers.WanTransformer3DModel):
    """A transformer that changes a list which it is given, or returns more than tensors."""

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict=True, notes=None):
        (made,) = super().forward(hidden_states, timestep, encoder_hidden_states, return_dict=False)
        if notes is None:
            return made, object()
        made = made + 0.1 * len(notes)
        notes.append(made)
        return (made,)


def odd():
    pipe = loop()
    pipe.transformer.__class__ = Odd
    return pipe


def looped(build=loop, **arguments):
    """A request of the loop on one rank, and on two."""
    calls = []
    with torch.no_grad():
        expected = Omni(build()).generate("a cat", seed=0, **arguments)[0].images
        omni = Omni(build(), parallel=CFG)
        omni.pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                made = omni.generate("a cat", seed=0, **arguments)[0].images
            except Exception as error:
                return {"error": f"{type(error).__name__}: {error}"}
    said = [str(one.message) for one in caught if "parallel" in str(one.message)]
    return {"off": ((made - expected).abs().max() / expected.abs().max()).item(), "calls": len(calls), "said": said}


def with_state():
    """Qwen-Image 2.1 has a cache of keys for each branch, GLM-Image one for both."""
    from benchmarks.models import tiny as tinier

    found = {}
    for name in ("QwenImage21Pipeline (image)", "GlmImagePipeline (image)"):
        expected = tinier.build(name).generate(guided=True)
        model = tinier.build(name)
        omni = Omni(model.pipe, parallel=CFG)
        try:
            with omni._together(dict), omni._shared():
                made = model.generate(guided=True)
            found[name] = {"off": ((made - expected).norm() / expected.norm()).item()}
        except ValueError as error:
            found[name] = {"error": str(error)}
    return found


def refused(make):
    """What it raises."""
    try:
        make()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def refusals():
    """What CFG parallelism does not do."""
    library = {"engine": "library"}
    return {
        "the library": refused(
            lambda: request(Omni(tiny.flux(), cache_backend="cache_dit", cache_config=library, parallel=CFG))
        ),
        "an engine": refused(lambda: Omni(tiny.flux(), parallel=CFG).engine()),
    }


def on_a_rank():
    """Everything that is asserted, but for what is long."""
    looping = {name: looped(between=name) for name in ("clean", "picked", "normed", "measured", "doubled", "chained")}
    counted = {"1": [1] * 4, "3": [3] * 4, "begins": [1, 1, 2, 2], "ends": [2, 2, 1, 1], "changes": [1, 3, 2, 1]}
    omni = Omni(tiny.qwen_image(), parallel=CFG)
    return {
        "pipelines": {name: shared(build) for name, build in PIPELINES.items()},
        "two images": shared(tiny.qwen_image, num_images_per_prompt=2),
        "two images, one call": shared(tiny.z_image, "first_block_cache", num_images_per_prompt=2),
        "caches": {f"{name}, {cache}": shared(PIPELINES[name], cache) for name, cache in CHOSEN},
        "ends": {str(cache): found for cache, found in guidance_that_ends().items()},
        "loops": looping,
        "counts": {name: looped(calls=calls) for name, calls in counted.items()},
        "odd": {"changes a list": looped(odd, notes=True), "returns an object": looped(odd)},
        "state": with_state(),
        "refusals": refusals(),
        "warm": omni.warmup("a cat", height=64, width=64).seconds,
        "settings": request(omni)[0].settings["parallel"],
    }


def others_on_a_rank():
    how = {"fuse": True, "compile": {"backend": "eager"}}
    found = {
        f"compiled, {name}": shared(PIPELINES[name], "first_block_cache", how, num_inference_steps=6)
        for name in ("qwen_image", "z_image")
    }
    return found | {f"{name}, {cache}": shared(PIPELINES[name], cache) for name, cache in OTHERS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank has found."""
    found = on_ranks(on_a_rank, tmp_path_factory.mktemp("ranks"))
    assert "error" not in found[0], found[0]["error"]
    return found


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """The same, of the pairs that are long."""
    found = on_ranks(others_on_a_rank, tmp_path_factory.mktemp("others"))
    assert "error" not in found[0], found[0]["error"]
    return found


@pytest.mark.parametrize("name", PIPELINES)
def test_two_ranks_make_the_picture_of_one(ranks, name):
    for rank in ranks:
        assert rank["pipelines"][name]["off"] < 1e-5


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in ("flux", "z_image")])
def test_each_rank_makes_half_of_the_calls(ranks, name):
    for rank in ranks:
        alone, own = rank["pipelines"][name]["calls"]
        assert own == alone / 2


def test_one_call_for_both_branches_is_halved_and_checked_once(ranks):
    for rank in ranks:
        alone, own = rank["pipelines"]["z_image"]["calls"]
        assert own == alone + 2


def test_without_two_branches_rank_0_computes(ranks):
    assert [rank["pipelines"]["flux"]["calls"] for rank in ranks] == [[STEPS, STEPS], [STEPS, 0]]


@pytest.mark.parametrize("name", ["two images", "two images, one call"])
def test_several_images_are_those_of_one_rank(ranks, name):
    for rank in ranks:
        assert rank[name]["off"] < 1e-5
        assert rank[name]["told"][0] == rank[name]["told"][1]


def same_decisions(one):
    alone, together = one["told"]
    assert together == alone
    steps = [computed for branch in together["steps"].values() for _, computed, _ in branch]
    return set(steps)


@pytest.mark.parametrize(("name", "cache"), CHOSEN)
def test_a_cache_decides_as_on_one_rank_and_reports_both_branches(ranks, name, cache):
    for rank in ranks:
        one = rank["caches"][f"{name}, {cache}"]
        assert same_decisions(one) == {True, False}
        assert one["off"] < 1e-5


@pytest.mark.long
@pytest.mark.parametrize(("name", "cache"), OTHERS)
def test_every_cache_decides_as_on_one_rank(others, name, cache):
    for rank in others:
        one = rank[f"{name}, {cache}"]
        same_decisions(one)
        assert one["off"] < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_fused_and_compiled_blocks_work_under_it(others, name):
    for rank in others:
        one = rank[f"compiled, {name}"]
        assert same_decisions(one) == {True, False}
        assert one["off"] < 1e-5


@pytest.mark.parametrize("cache", ["None", "first_block_cache", "velocity_cache"])
def test_guidance_that_ends_is_followed(ranks, cache):
    for rank in ranks:
        one = rank["ends"][cache]
        assert one["off"] < 1e-5
        assert one["told"][0] == one["told"][1]


@pytest.mark.parametrize("name", ["clean", "picked"])
def test_elementary_computations_between_the_calls_are_made_later(ranks, name):
    for rank in ranks:
        assert rank["loops"][name]["off"] < 1e-5
        assert rank["loops"][name]["calls"] == 4


@pytest.mark.parametrize(
    ("name", "use"),
    [("normed", "norm"), ("measured", "abs"), ("doubled", "mul_"), ("chained", "a transformer call")],
)
def test_a_pipeline_that_needs_the_first_result_at_once_is_refused_by_name(ranks, name, use):
    for rank in ranks:
        error = rank["loops"][name]["error"]
        assert error.startswith("ValueError: parallel cfg: Loop uses the result of a transformer call before")
        assert use in error
    assert ranks[0]["loops"][name] == ranks[1]["loops"][name]


@pytest.mark.parametrize(
    ("name", "own"), [("1", (4, 0)), ("3", (8, 4)), ("begins", (4, 2)), ("ends", (4, 2)), ("changes", (5, 2))]
)
def test_the_number_of_calls_in_a_step_may_change(ranks, name, own):
    for rank, calls in zip(ranks, own, strict=True):
        assert rank["counts"][name]["off"] < 1e-5
        assert rank["counts"][name]["calls"] == calls


def test_a_request_without_two_branches_is_warned_about(ranks):
    for rank in ranks:
        assert "there was nothing to share: is guidance on?" in rank["counts"]["1"]["said"][0]
        assert not rank["counts"]["ends"]["said"]


@pytest.mark.parametrize("name", ["changes a list", "returns an object"])
def test_calls_that_cannot_be_shared_are_made_by_each_rank(ranks, name):
    for rank in ranks:
        assert rank["odd"][name]["off"] < 1e-5
        assert rank["odd"][name]["calls"] == 8


def test_objects_that_calls_change_may_belong_to_one_branch_only(ranks):
    for rank in ranks:
        assert rank["state"]["QwenImage21Pipeline (image)"]["off"] < 1e-5
        error = rank["state"]["GlmImagePipeline (image)"]["error"]
        assert "for both branches are given the same GlmImageKVCache by GlmImagePipeline" in error


@pytest.mark.parametrize("name", ["the library", "an engine"])
def test_what_does_not_work_together_is_refused(ranks, name):
    for rank in ranks:
        assert "does not work with parallel" in rank["refusals"][name]


def test_warmup_and_settings_know_the_ranks(ranks):
    for rank in ranks:
        assert rank["warm"] > 0
        assert rank["settings"] == {"cfg": 2}


def test_all_ranks_return_the_same(ranks):
    assert os.environ.get("RANK") is None
    for name, found in ranks[0]["pipelines"].items():
        assert found["off"] == ranks[1]["pipelines"][name]["off"]
