"""A row for a model that the table does not know: TeaCache works with AuraFlow.

    python examples/new_model_row.py

Most caches need no row. TeaCache and SeaCache do, because they watch how block 0 modulates its input, which cannot be
seen from outside. The pipeline here is a tiny AuraFlow with random weights. With the full-size one
(`AuraFlowPipeline.from_pretrained("fal/AuraFlow")`), calibrate the polynomial: `omni calibrate tea_cache`.

It prints:

    without a row: tea_cache watches block 0's modulated input: …
    the row describes what block 0 attends to: True
    with the row, … of 12 steps are skipped; expect at least 3
"""

import diffusers
import torch

import omni_kernels
from omni_kernels import ops
from omni_runtime.cache.models import MODELS, ModelRow, Modulation


def tiny_aura_flow():
    """AuraFlow with random weights, without text encoder and VAE."""
    torch.manual_seed(0)
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=3,
        num_single_dit_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    return diffusers.AuraFlowPipeline(None, None, None, transformer.eval(), scheduler)


def latents(pipe):
    """The latents of one request."""
    text, mask = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0)), torch.ones(1, 12)
    given = {"prompt_embeds": text, "prompt_attention_mask": mask, "guidance_scale": 1.0, "output_type": "latent"}
    return pipe(**given, height=64, width=64, num_inference_steps=12, generator=torch.Generator().manual_seed(0)).images


def modulation(block, arguments):
    """norm(h)·(1 + scale) + shift, as AuraFlow's `AdaLayerNormZero` computes it from the time embedding."""
    norm = block.norm1
    shift, scale = norm.linear(norm.silu(arguments["temb"])).chunk(6, dim=-1)[:2]
    return Modulation("layer", scale, shift, None, norm.norm.eps)


pipe = tiny_aura_flow()
pipe.set_progress_bar_config(disable=True)
config = {"rel_l1_thresh": 0.2, "coefficients": [0, 0, 0, 1, 0]}  # no polynomial: the distance itself
try:
    omni_kernels.patch(pipe, "tea_cache", config)
except ValueError as error:
    print(f"without a row: {error}")

MODELS["AuraFlowTransformer2DModel"] = ModelRow(
    depths=("num_mmdit_layers", "num_single_dit_layers"),
    modulation=modulation,
    pipelines=("AuraFlowPipeline",),
)

# Check the row: what it describes is what block 0 hands to its attention.
block, made, taken = pipe.transformer.joint_transformer_blocks[0], [], []


def describe(_, args, kwargs):
    """Compute block 0's modulated input from the row."""
    how = modulation(block, kwargs)
    described = ops.modulated_relative_l1(
        kwargs["hidden_states"], how.scale, how.shift, None, norm=how.norm, weight=how.weight, eps=how.eps
    )
    made.append(described[0])


def take(_, args, kwargs):
    """Keep what the attention is given."""
    taken.append(kwargs["hidden_states"])


parts = {block: describe, block.attn: take}
hooks = [part.register_forward_pre_hook(hook, with_kwargs=True) for part, hook in parts.items()]
latents(pipe)
for hook in hooks:
    hook.remove()
same = all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(made, taken, strict=True))
print(f"the row describes what block 0 attends to: {same}")

with omni_kernels.patched(pipe, "tea_cache", config) as handle:
    latents(pipe)
print(f"with the row, {len(handle.report.skipped)} of 12 steps are skipped; expect at least 3")
