"""The table of transformer classes: rows that fit diffusers, distances over the noise, and a model added by a row."""

import dataclasses
import inspect
import itertools
import math

import diffusers
import pytest
import tiny
import torch

import omni_kernels
from benchmarks.models.tiny import build
from omni_kernels import ops
from omni_runtime.cache import models
from omni_runtime.cache.models import MODELS, ModelRow
from omni_runtime.cache.signals import wiener

NOISE_TOKENS = 16  # 64×64 pixels


def latents(pipe, **arguments):
    return tiny.generate(pipe, output_type="latent", **{"num_inference_steps": 5} | arguments)


def distance(now, then):
    """The relative L1 distance, in float64."""
    return ((now.double() - then.double()).abs().sum() / then.double().abs().sum()).item()


# Rows


def test_row_tells_the_number_of_blocks(any_pipe):
    transformer = any_pipe.transformer
    name = type(transformer).__name__
    assert type(any_pipe).__name__ in MODELS[name].pipelines
    with omni_kernels.patched(any_pipe, "first_block_cache") as handle:
        latents(any_pipe)
        found = handle.blocks["transformer"].blocks
    assert models.describe({"_class_name": name, **transformer.config}) == models.TransformerFacts(name, found)


def test_rows_name_pipelines_that_exist():
    for row in MODELS.values():
        for name in row.pipelines:
            assert issubclass(getattr(diffusers, name), diffusers.DiffusionPipeline)


def test_config_without_a_depth_is_named():
    with pytest.raises(ValueError, match=r"FluxTransformer2DModel lacks num_single_layers"):
        models.describe({"_class_name": "FluxTransformer2DModel", "num_layers": 2})


@pytest.mark.parametrize("backend", ["tea_cache", "cache_dit", "mag_cache"])
def test_empty_block_list_is_refused(qwen_pipe, backend):
    qwen_pipe.transformer.transformer_blocks = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="QwenImageTransformer2DModel has no list of blocks: there is nothing to skip"):
        omni_kernels.patch(qwen_pipe, backend)


# Edit pipelines: reference images never change, and dilute every distance that they are counted in


@pytest.fixture(params=[(plus, zero) for plus in (False, True) for zero in (False, True)], ids=str)
def edit_pipe(request):
    plus, zero_cond_t = request.param
    return tiny.qwen_image_edit(plus=plus, zero_cond_t=zero_cond_t)


def recorded(pipe, module, get, backend, config):
    """What `get` finds in each call of `module` by the first CFG branch, and that branch's decisions."""
    seen = []
    hook = module.register_forward_hook(
        lambda _, args, kwargs, output: seen.append(get(args, kwargs, output)), with_kwargs=True
    )
    with omni_kernels.patched(pipe, backend, config) as handle:
        latents(pipe)
    hook.remove()
    return seen[::2], handle.report.branches["cond"].decisions


def assert_distances_of(seen, decisions, tokens):
    assert len(seen) == len(decisions) == 5
    for (then, now), decision in zip(itertools.pairwise(seen), decisions[1:], strict=True):
        over_all, over_noise = distance(now, then), distance(now[:, :NOISE_TOKENS], then[:, :NOISE_TOKENS])
        assert over_all != pytest.approx(over_noise, rel=1e-2), "the references dilute it"
        assert decision.distance == pytest.approx(distance(now[:, :tokens], then[:, :tokens]), rel=1e-4)


def test_edits_first_block_distance_is_over_all_tokens_as_the_libraries_is(edit_pipe):
    block = edit_pipe.transformer.transformer_blocks[0]
    seen, decisions = recorded(
        edit_pipe,
        block,
        lambda args, kwargs, output: output[1] - kwargs["hidden_states"],
        "first_block_cache",
        {"threshold": 1e-9},
    )
    assert seen[0].shape[1] > NOISE_TOKENS
    assert_distances_of(seen, decisions, None)


def test_edits_modulated_distance_is_over_the_noise_alone(edit_pipe):
    attention = edit_pipe.transformer.transformer_blocks[0].attn
    seen, decisions = recorded(
        edit_pipe,
        attention,
        lambda args, kwargs, output: kwargs["hidden_states"],
        "tea_cache",
        {"rel_l1_thresh": 1e-9},
    )
    assert_distances_of(seen, decisions, NOISE_TOKENS)


@pytest.mark.parametrize(
    ("segments", "layered", "tokens"),
    [
        ([(1, 4, 4)], False, None),
        ([(1, 4, 4), (1, 2, 2)], False, (0, 16)),
        ([(1, 4, 4), (1, 2, 2), (1, 2, 2)], False, (0, 16)),
        ([(1, 4, 4), (1, 4, 4), (1, 4, 4), (1, 2, 2)], True, (0, 48)),
    ],
)
def test_noise_comes_before_the_references(segments, layered, tokens):
    arguments = {"img_shapes": [segments] * 2, "additional_t_cond": torch.zeros(2) if layered else None}
    assert MODELS["QwenImageTransformer2DModel"].noise_tokens(None, arguments) == tokens


#: Pipelines with an image that is given: the attention of block 0, which of its tokens are noise, and their grid.
WITH_AN_IMAGE = {
    "FluxKontextPipeline": ("transformer_blocks.0.attn", slice(0, 16), (1, 4, 4)),
    "Flux2Pipeline (image)": ("transformer_blocks.0.attn", slice(0, 16), (1, 4, 4)),
    "HunyuanVideoImageToVideoPipeline (the picture as first tokens)": (
        "transformer_blocks.0.attn",
        slice(16, None),
        (1, 4, 4),
    ),
    "LTXImageToVideoPipeline": ("transformer_blocks.0.attn1", slice(64, None), (1, 8, 8)),
    "WanImageToVideoPipeline (2.2, a timestep for each token)": ("blocks.0.attn1", slice(16, None), (1, 4, 4)),
}


@pytest.mark.parametrize("name", WITH_AN_IMAGE)
@pytest.mark.parametrize("backend", ["tea_cache", "sea_cache"])
def test_distance_is_over_the_tokens_that_are_noise(name, backend):
    """The noise comes before a reference image, and after the first frame of a video."""
    model = build(name)
    attention, noise, grid = WITH_AN_IMAGE[name]
    seen = []
    model.pipe.transformer.get_submodule(attention).register_forward_hook(
        lambda _, args, kwargs, output: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    config = {"rel_l1_thresh": 1e-9, "coefficients": [0, 0, 0, 1, 0]} if backend == "tea_cache" else {"threshold": 1e-9}
    with omni_kernels.patched(model.pipe, backend, config) as handle:
        model.generate()
    (branch,) = handle.report.branches.values()
    assert len(seen) == len(branch.decisions) == model.steps
    assert seen[0][:, noise].shape[1] == math.prod(grid)
    levels = itertools.pairwise(model.pipe.scheduler.sigmas.tolist())

    def watched(modulated, level):
        tokens = modulated[:, noise]
        return wiener(tokens.unflatten(1, grid), level, 3.0) if backend == "sea_cache" else tokens

    for (then, now), (before, level), decision in zip(
        itertools.pairwise(seen[:-1]), levels, branch.decisions[1:-1], strict=False
    ):
        over_noise = distance(watched(now, level), watched(then, before))
        assert decision.distance == pytest.approx(over_noise, rel=1e-3)
        if backend == "tea_cache":
            assert distance(now, then) != pytest.approx(over_noise, rel=1e-2), "the image dilutes it"


def test_layered_distance_is_over_all_layers():
    pipe = tiny.qwen_image(use_additional_t_cond=True, use_layer3d_rope=True)
    generator = torch.Generator().manual_seed(0)
    noise, reference = torch.randn(2, 1, 48, 64, generator=generator), torch.randn(1, 4, 64, generator=generator)
    inputs = []
    hook = pipe.transformer.transformer_blocks[0].attn.register_forward_hook(
        lambda _, args, kwargs, output: inputs.append(kwargs["hidden_states"]), with_kwargs=True
    )
    config = {"rel_l1_thresh": 1e-9, "coefficients": [0, 0, 0, 1, 0]}
    with omni_kernels.patched(pipe, "tea_cache", config) as handle, handle.sampling(), torch.no_grad():
        pipe.scheduler.set_timesteps(3, mu=0.5)
        for step in range(2):
            pipe.transformer(
                hidden_states=torch.cat([noise[step], reference], dim=1),
                encoder_hidden_states=torch.ones(1, 5, 32),
                timestep=torch.tensor([0.5]),
                img_shapes=[[(1, 4, 4)] * 3 + [(1, 2, 2)]],
                additional_t_cond=torch.zeros(1, dtype=torch.long),
            )
            pipe.scheduler.step(torch.ones(1), pipe.scheduler.timesteps[step], torch.ones(1))
        measured = handle.report.branches["0"].decisions[1].distance
    hook.remove()
    then, now = inputs
    assert measured == pytest.approx(distance(now[:, :48], then[:, :48]), rel=1e-4)


def test_edit_skips_and_stays_near(edit_pipe):
    expected = latents(edit_pipe)
    for backend, config in {
        "first_block_cache": {"threshold": 0.3},
        "tea_cache": {"rel_l1_thresh": 0.15, "coefficients": [0, 0, 0, 1, 0]},
    }.items():
        with omni_kernels.patched(edit_pipe, backend, config) as handle:
            near = latents(edit_pipe)
            assert handle.report.forwards_saved > 0
        assert (near - expected).norm() < 0.1 * expected.norm()


#: A tiny pipeline of each row that is not in `tiny`.
OTHERS = [
    "Flux2Pipeline",
    "QwenImage21Pipeline",
    "ChromaPipeline",
    "StableDiffusion3Pipeline",
    "WanPipeline",
    "WanPipeline (2.2, a timestep for each token)",
    "HunyuanVideoPipeline",
    "HunyuanVideoImageToVideoPipeline (the picture as first tokens)",
    "LTXPipeline",
    "LTXImageToVideoPipeline",
]


def first_block(transformer):
    blocks = getattr(transformer, "transformer_blocks", None) or transformer.blocks
    return blocks[0]


def test_every_row_has_a_tiny_pipeline():
    classes = {type(build(name).pipe.transformer).__name__ for name in OTHERS}
    assert classes | {type(make().transformer).__name__ for make in tiny.PIPELINES.values()} == set(MODELS)


@pytest.mark.parametrize("name", OTHERS)
def test_modulated_input_is_what_block_0_attends_to(name):
    model = build(name)
    row = MODELS[type(model.pipe.transformer).__name__]
    block = first_block(model.pipe.transformer)
    attention = next(part for name, part in block.named_children() if name.startswith("attn"))
    names, made, taken = list(inspect.signature(block.forward).parameters), [], []

    def before(_, args, kwargs):
        arguments = dict(zip(names, args, strict=False)) | kwargs
        how = row.modulation(block, arguments)
        made.append(
            ops.modulated_relative_l1(
                arguments["hidden_states"], how.scale, how.shift, None, norm=how.norm, weight=how.weight, eps=how.eps
            )[0]
        )

    block.register_forward_pre_hook(before, with_kwargs=True)
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: taken.append(kwargs["hidden_states"] if not args else args[0]), with_kwargs=True
    )
    model.generate(num_inference_steps=2)
    assert len(made) == len(taken) > 1
    for one, other in zip(made, taken, strict=True):  # the tokens of a given picture come first, with t = 0
        noise = slice(one.shape[1] // 2 if "as first tokens" in name else 0, None)
        torch.testing.assert_close(one[:, noise], other[:, noise], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "config"),
    [
        ("first_block_cache", {"threshold": 0.9}),
        ("cache_dit", {"residual_diff_threshold": 0.9, "max_warmup_steps": 1, "Bn_compute_blocks": 1}),
    ],
    ids=["first block", "either side"],
)
@pytest.mark.parametrize("name", OTHERS)
def test_the_check_that_a_row_leaves_out_passes(name, backend, config, monkeypatch):
    """Without its row a class is checked, and the steps and the result are the same as with it."""
    model = build(name)
    kind = type(model.pipe.transformer).__name__
    guided = bool(model.guided)
    with omni_kernels.patched(model.pipe, backend, config) as handle:
        made = model.generate(guided=guided)
        expected = {name: branch.decisions for name, branch in handle.report.branches.items()}
        assert handle.report.forwards_saved > 0
    monkeypatch.setitem(MODELS, kind, dataclasses.replace(MODELS[kind], depths=(), between=()))
    with omni_kernels.patched(model.pipe, backend, config) as handle:
        assert torch.equal(model.generate(guided=guided), made)
        assert {name: branch.decisions for name, branch in handle.report.branches.items()} == expected


@pytest.mark.parametrize("name", OTHERS)
def test_the_grid_has_as_many_tokens_as_there_are(name):
    model = build(name)
    transformer = model.pipe.transformer
    row, grids, tokens = MODELS[type(transformer).__name__], [], []
    names = list(inspect.signature(transformer.forward).parameters)
    block = first_block(transformer)
    transformer.register_forward_pre_hook(
        lambda _, args, kwargs: grids.append(row.noise_grid(dict(zip(names, args, strict=False)) | kwargs)),
        with_kwargs=True,
    )
    block.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append((kwargs.get("hidden_states") if not args else args[0]).shape[1]),
        with_kwargs=True,
    )
    model.generate(num_inference_steps=3)
    assert tokens[-1] == math.prod(grids[-1])


# A model of somebody else

SD3 = ModelRow(depths=("num_layers",))


@pytest.fixture
def sd3_pipe():
    """A tiny Stable Diffusion 3 pipeline, which no row knows, and its denoiser's inputs instead of text encoders."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=16,
            pos_embed_max_size=16,
        ).eval()
        others = dict.fromkeys(["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
        return diffusers.StableDiffusion3Pipeline(
            transformer=tiny.damp(transformer),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder_3=None,
            tokenizer_3=None,
            **others,
        )


def sd3_latents(pipe):
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 1, 7, 32, generator=generator)
    pooled = torch.randn(2, 1, 16, generator=generator)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        pooled_prompt_embeds=pooled[0],
        negative_pooled_prompt_embeds=pooled[1],
        height=64,
        width=64,
        num_inference_steps=8,
        output_type="latent",
        generator=generator,
    ).images


def test_pipeline_may_have_the_second_transformer_alone():
    model = build("WanPipeline (2.2, two transformers)")
    model.pipe.register_modules(transformer=None)
    model.pipe.register_to_config(boundary_ratio=2.0)  # all steps are the second one's
    plain = model.generate()
    for backend, config in [("first_block_cache", {"threshold": 1.0}), ("velocity_cache", {"budget": 4})]:
        with omni_kernels.patched(model.pipe, backend, config, fuse=True) as handle:
            model.generate()
            assert handle.report.forwards_saved > 0
            assert handle.fused.replaced
        assert torch.equal(model.generate(), plain)


def test_pipeline_with_a_unet_is_named():
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, down_block_types=["DownBlock2D"],
        up_block_types=["UpBlock2D"], layers_per_block=1,
    )  # fmt: skip
    pipe = diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match=r"DDPMPipeline denoises with a `unet` \(UNet2DModel\)"):
        omni_kernels.patch(pipe, "first_block_cache")


def test_first_block_cache_needs_no_row(sd3_pipe):
    expected = sd3_latents(sd3_pipe)
    with omni_kernels.patched(sd3_pipe, "first_block_cache", {"threshold": 0.0}):
        assert torch.equal(sd3_latents(sd3_pipe), expected)
    with omni_kernels.patched(sd3_pipe, "first_block_cache", {"threshold": 0.2}) as handle:
        near = sd3_latents(sd3_pipe)
        assert 0 < handle.report.forwards_saved < 8
        assert handle.report.blocks_run == 8 + 3 * handle.report.forwards
    assert (near - expected).norm() < 0.1 * expected.norm()
    assert torch.equal(sd3_latents(sd3_pipe), expected)


def test_a_controlnet_needs_no_row(sd3_pipe):
    """SD3 asks each block of its loop for an attribute when a ControlNet is there."""
    generator = torch.Generator().manual_seed(0)
    call = {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 7, 32, generator=generator),
        "pooled_projections": torch.randn(1, 16, generator=generator),
        "timestep": torch.tensor([500.0]),
        "block_controlnet_hidden_states": [torch.randn(1, 16, 32, generator=generator) for _ in range(2)],
    }
    with torch.no_grad():
        expected = sd3_pipe.transformer(**call).sample
        with (
            omni_kernels.patched(
                sd3_pipe, "cache_dit", {"max_warmup_steps": 0, "residual_diff_threshold": 1}
            ) as handle,
            handle.sampling(),
        ):
            sd3_pipe.scheduler.set_timesteps(3)
            assert torch.equal(sd3_pipe.transformer(**call).sample, expected)
            sd3_pipe.scheduler.step(torch.ones(1), sd3_pipe.scheduler.timesteps[0], torch.ones(1))
            torch.testing.assert_close(sd3_pipe.transformer(**call).sample, expected, atol=2e-5, rtol=1e-5)
            assert handle.report.branches["0"].skipped == [1]


def test_tea_cache_says_what_a_row_lacks(sd3_pipe, monkeypatch):
    monkeypatch.setitem(MODELS, "SD3Transformer2DModel", SD3)
    with pytest.raises(ValueError, match=r"tea_cache .* ModelRow gives no modulation"):
        omni_kernels.patch(sd3_pipe, "tea_cache")

    def modulation(block, arguments):
        shift, scale = block.norm1.linear(block.norm1.silu(arguments["temb"])).chunk(6, dim=-1)[:2]
        return models.Modulation("layer", scale, shift, None, 1e-6)

    row = ModelRow(**{**vars(SD3), "modulation": modulation})
    monkeypatch.setitem(MODELS, "SD3Transformer2DModel", row)
    with pytest.raises(ValueError, match=r"no TeaCache coefficients are known .* 'coefficients'"):
        omni_kernels.patch(sd3_pipe, "tea_cache")
    config = {"rel_l1_thresh": 0.2, "coefficients": [0, 0, 0, 1, 0]}
    with omni_kernels.patched(sd3_pipe, "tea_cache", config) as handle:
        sd3_latents(sd3_pipe)
        assert handle.report.forwards_saved > 0


def test_what_a_row_lacks_is_known_before_weights_are_loaded(monkeypatch):
    monkeypatch.setitem(MODELS, "SD3Transformer2DModel", SD3)
    facts = models.describe({"_class_name": "SD3Transformer2DModel", "num_layers": 4})
    with pytest.raises(ValueError, match="gives no modulation"):
        omni_kernels.patching.backends.get("tea_cache").check(None, facts)


def test_a_class_that_no_row_tells_of_has_no_known_depth():
    assert models.describe({"_class_name": "Another"}) == models.TransformerFacts("Another", None)
