"""Random mixes of requests in one engine: each picture is that of the request alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tiny
import torch
from diffusers.models.transformers import Flux2Transformer2DModel

from omni_runtime import Omni
from omni_runtime.serving.forwards import Call, Forwards

TEXTS = ("a cat", "a red fox on a very green hill", "x", "a cat and a dog")
#: As many tokens, in other shapes.
SIZES = ((64, 64), (64, 128), (128, 64), (32, 128))
REFERENCES = ((64, 64), (64, 128), (128, 64))
METHODS: tuple[tuple[str | None, dict[str, Any]], ...] = (
    (None, {}),
    ("velocity_cache", {"budget": 3}),
    ("easy_cache", {"thresh": 0.3, "ret_steps": 2}),
    ("first_block_cache", {"threshold": 0.12}),
    ("cache_dit", {"residual_diff_threshold": 0.2, "max_warmup_steps": 2, "Fn_compute_blocks": 1}),
)
PIPELINES = {
    "qwen_image": lambda: tiny.qwen_image(layers=2),
    "qwen_image_edit": lambda: tiny.qwen_image_edit(layers=2),
    "qwen_image_edit_plus": lambda: tiny.qwen_image_edit(layers=2, plus=True),
    "z_image": lambda: tiny.z_image(layers=2),
    "flux": tiny.flux,
    "chroma": tiny.chroma,
    "wan": tiny.wan,
}


@pytest.fixture(autouse=True)
def _small(small_references: None) -> None:
    """References of edit pipelines are small."""


def scaled(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """A callback that changes the latents."""
    return {"latents": tensors["latents"] * 1.01}


def request(pipe: Any, draws: random.Random, embeddings: dict[str, Any]) -> dict[str, Any]:
    """One request; most of what may differ between two is drawn."""
    own = tiny.default_arguments(pipe)
    needed = ("image", "num_frames", "max_sequence_length")
    one = dict(own) if draws.random() < 0.6 else {key: value for key, value in own.items() if key in needed}
    if "image" in one:
        size = draws.choice(REFERENCES)
        several = isinstance(one["image"], list)
        pictures = [tiny.reference_image(96, seed).resize(size) for seed in range(2 if several else 1)]
        one["image"] = pictures[: draws.randint(1, 2)] if several else pictures[0]
    height, width = draws.choice(SIZES)
    one |= {"prompt": draws.choice(TEXTS), "height": height, "width": width, "seed": draws.randrange(4)}
    one |= {"num_inference_steps": draws.choice((4, 5)), "output_type": "latent"}
    if embeddings and draws.random() < 0.3:
        one |= embeddings | {"prompt": None}
    if draws.random() < 0.2:
        one["callback_on_step_end"] = scaled
    if draws.random() < 0.2 and "Wan" not in type(pipe).__name__:
        one["num_images_per_prompt"] = 2
    backend, config = draws.choice(METHODS)
    return one | {"cache_backend": backend, "cache_config": config or None}


def transposed(one: dict[str, Any]) -> dict[str, Any]:
    """The same request, with its size and its references transposed, and another seed."""
    other = one | {"height": one["width"], "width": one["height"], "seed": one["seed"] + 1}
    if "image" in one:
        pictures = one["image"] if isinstance(one["image"], list) else [one["image"]]
        turned = [picture.resize(picture.size[::-1]) for picture in pictures]
        other["image"] = turned if isinstance(one["image"], list) else turned[0]
    return other


def furthest(name: str, seed: int, count: int) -> tuple[float, float]:
    """The largest difference of a picture from its own alone, of its largest value; and the mean batch."""
    draws = random.Random(f"{name} {seed}")
    pipe = PIPELINES[name]()
    tiny.damp(pipe.transformer)
    pipe.set_progress_bar_config(disable=True)
    embeddings: dict[str, Any] = {}
    if name == "qwen_image":
        embeds, _ = pipe.encode_prompt("a house")
        embeddings = {"prompt_embeds": embeds, "prompt_embeds_mask": torch.ones(embeds.shape[:2], dtype=torch.bool)}
    drawn = [request(pipe, draws, embeddings) for _ in range(count // 2)]
    requests = [one for each in drawn for one in (each, transposed(each))]
    expected: list[torch.Tensor] = []
    for one in requests:
        alone = {key: value for key, value in one.items() if not key.startswith("cache_")}
        with Omni(pipe, cache_backend=one["cache_backend"], cache_config=one["cache_config"]) as omni:
            expected.append(latents(omni.generate(**alone)[0]))
    off = 0.0
    with Omni(pipe, cache_backend=None) as omni, omni.engine() as engine:
        for one in drawn[:2]:  # what is checked once is checked with equal sizes
            for job in [engine.submit(**one | {"cache_backend": None, "cache_config": None}) for _ in range(2)]:
                job.result(240)
        jobs = [engine.submit(**one) for one in requests]
        for job, other in zip(jobs, expected, strict=True):
            off = max(off, float((latents(job.result(240)) - other).abs().max() / other.abs().max()))
        return off, engine.forwards.samples / engine.forwards.made


def latents(result: Any) -> torch.Tensor:
    made = result.images if result.images is not None else result.frames
    assert isinstance(made, torch.Tensor)
    return made


@pytest.mark.parametrize("name", ["qwen_image", "qwen_image_edit_plus"])
def test_a_mix_with_transposed_sizes_is_as_alone(name: str) -> None:
    off, batch = furthest(name, 0, 12)
    assert off < 1e-5
    assert batch > 1.2, "some forwards were shared"


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("name", PIPELINES)
def test_more_mixes(name: str, seed: int) -> None:
    assert furthest(name, seed, 24)[0] < 1e-5


def test_equal_sizes_are_joined_after_unequal_ones() -> None:
    """Under a cache of blocks, too: that two calls cannot be joined says nothing of others."""
    pipe = tiny.qwen_image(layers=2)
    one = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "latent"}
    with Omni(pipe, cache_backend="first_block_cache") as omni, omni.engine() as engine:
        for job in [engine.submit(**one, height=64, width=128), engine.submit(**one, height=128, width=64)]:
            job.result(60)
        made, samples = engine.forwards.made, engine.forwards.samples
        for job in [engine.submit(**one, height=64, width=64, seed=seed) for seed in range(4)]:
            job.result(60)
        assert engine.forwards.samples - samples >= 3 * (engine.forwards.made - made)


def test_a_form_that_fails_is_apart_and_others_of_its_structure_are_joined() -> None:
    """A fault of this one form, which is drawn from the number of tokens."""

    class Odd(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
            return (hidden_states * (len(hidden_states) if hidden_states.shape[1] == 3 else 1),)

    forwards, odd = Forwards(8), Odd()

    def run(tokens: int) -> list[int]:
        calls = [Call(odd, (), {"hidden_states": torch.full((1, tokens, 2), float(place))}) for place in range(3)]
        while left := [call for call in calls if call.result is None]:
            forwards.run(forwards.group(left))
        for place, call in enumerate(calls):
            assert torch.equal(call.result[0], torch.full((1, tokens, 2), float(place)))
        return [call.batch for call in calls]

    assert run(3)[2] == 1
    assert run(3) == [1, 1, 1]
    run(4)
    assert run(4) == [3, 3, 3]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_positions_that_are_read_from_the_first_sample_are_equal_in_a_batch(dtype: torch.dtype) -> None:
    """FLUX.2 reads the positions of its tokens from the first sample."""
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16, mlp_ratio=2.0,
    ).eval()  # fmt: skip

    def call(height: int, width: int, seed: int, count: int = 1) -> Call:
        draws = torch.Generator().manual_seed(seed)
        one = torch.tensor([0])
        ids = torch.cartesian_prod(one, torch.arange(height), torch.arange(width), one).to(dtype)
        given = {
            "hidden_states": torch.randn(count, height * width, 16, generator=draws),
            "encoder_hidden_states": torch.randn(count, 3, 32, generator=draws),
            "timestep": torch.full((count,), 0.1 * (seed + 1)),
            "guidance": torch.full((count,), 2.0),
            "img_ids": ids[None].expand(count, -1, -1),
            "txt_ids": torch.zeros(count, 3, 4, dtype=dtype),
            "return_dict": False,
        }
        return Call(model, (), given)

    forwards = Forwards(8)
    for _ in range(2):  # the first batch of a structure is checked
        calls = [call(2, 4, 0), call(2, 4, 1), call(4, 2, 2), call(2, 4, 3, count=2)]
        while left := [one for one in calls if one.result is None]:
            group = forwards.group(left)
            forwards.run(group)
        for one in calls:
            with torch.no_grad():
                torch.testing.assert_close(one.result[0], model(**one.kwargs)[0], rtol=1e-4, atol=1e-5)
    assert [one.batch for one in calls] == [4, 4, 1, 4]
