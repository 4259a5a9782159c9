"""What the plug-in sees of vLLM-Omni 0.30.0, in small: interfaces, a pipeline with guidance, and Qwen-Image's block.

`installed` puts it in the place of the package's modules. The names, arguments and formulas are those of the package;
`test_real.py` runs the package itself.
"""

import contextlib
import dataclasses
import importlib.util
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import field
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn
from torch.nn import functional as F

MODULES = (
    "vllm_omni",
    "vllm_omni.diffusion.cache.base",
    "vllm_omni.diffusion.cache.selector",
    "vllm_omni.diffusion.data",
    "vllm_omni.diffusion.distributed.cfg_parallel",
    "vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter",
)
RUNNER = "vllm_omni.diffusion.worker.diffusion_model_runner"
__version__ = "0.30.0"


@contextlib.contextmanager
def installed():
    """Context manager: the modules of the package are this one, loaded again under the package's name."""
    spec = importlib.util.spec_from_file_location("vllm_omni.stand_in", __file__)
    module = importlib.util.module_from_spec(spec)
    runner = types.ModuleType(RUNNER)
    names = {**dict.fromkeys((*MODULES, spec.name), module), RUNNER: runner}
    former = {name: sys.modules.get(name) for name in names}
    sys.modules.update(names)
    try:
        spec.loader.exec_module(module)
        runner.get_cache_backend = module.get_cache_backend  # imported by its name
        module.runner = runner
        yield module
    finally:
        for name, one in former.items():
            sys.modules.pop(name, None)
            if one is not None:
                sys.modules[name] = one


@dataclasses.dataclass
class DiffusionCacheConfig:
    rel_l1_thresh: float | None = None
    num_inference_steps: int | None = None
    velocity_sim_thresholds: list[float] = field(default_factory=lambda: [0.95, 0.93])
    _extra_params: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_dict(cls, data):
        names = {one.name for one in dataclasses.fields(cls)}
        known = {key: value for key, value in data.items() if key in names}
        return cls(**known, _extra_params={key: value for key, value in data.items() if key not in names})


class CacheBackend(ABC):
    def __init__(self, config):
        self.config, self.enabled = config, False

    @abstractmethod
    def enable(self, pipeline): ...

    @abstractmethod
    def refresh(self, pipeline, num_inference_steps, verbose=True): ...

    def is_enabled(self):
        return self.enabled


def get_cache_backend(cache_backend, cache_config):
    if cache_backend is None or cache_backend == "none":
        return
    raise ValueError(f"Unsupported cache backend: {cache_backend}")


class CFGParallelMixin:
    def predict_noise_maybe_with_cfg(
        self, do_true_cfg, true_cfg_scale, positive_kwargs, negative_kwargs, cfg_normalize=True, output_slice=None
    ):
        positive = self.predict_noise(**positive_kwargs)
        if not do_true_cfg:
            return positive
        negative = self.predict_noise(**negative_kwargs)
        return negative + true_cfg_scale * (positive - negative)

    def predict_noise_with_multi_branch_cfg(
        self, do_true_cfg, true_cfg_scale, branches_kwargs, cfg_normalize=False, output_slice=None
    ):
        return self.predict_noise_maybe_with_cfg(do_true_cfg, true_cfg_scale, *branches_kwargs[:2])

    def predict_noise(self, **kwargs):
        return self.transformer(**kwargs)[0]


class DiffusersAdapterPipeline(nn.Module):
    def __init__(self, od_config):
        super().__init__()
        self.od_config = od_config
        self._raise_unsupported_features()

    def _raise_unsupported_features(self):
        if self.od_config.cache_backend not in ("none", None):
            raise NotImplementedError(f"Cache backend {self.od_config.cache_backend!r} is not supported")
        if self.od_config.enforce_eager:
            raise NotImplementedError("Eager execution is not supported")

    def forward(self, **kwargs):
        return self._pipeline(**kwargs)


class Transformer(nn.Module):
    """A velocity that depends on the time and the "prompt", and counts its calls."""

    def __init__(self, dim=8):
        super().__init__()
        self.layer = nn.Linear(dim, dim)
        self.calls = 0

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        self.calls += 1
        return (torch.tanh(self.layer(hidden_states)) * (1 + timestep) + encoder_hidden_states,)


class Pipeline(nn.Module, CFGParallelMixin):
    """A pipeline of the package: a module whose `forward` makes a request."""

    def __init__(self, several=False, **options):
        super().__init__()
        self.transformer = Transformer()
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.od_config = SimpleNamespace(model=None, **options)
        self.several, self.fails_at = several, None

    def forward(self, latents, prompt=0.3, negative=None, steps=10, scale=4.0):
        self.scheduler.set_timesteps(steps)
        self.scheduler.set_begin_index(0)
        guided = negative is not None
        for i, t in enumerate(self.scheduler.timesteps):
            if i == self.fails_at:
                raise RuntimeError("interrupted")
            branches = [
                {"hidden_states": latents, "timestep": t / 1000, "encoder_hidden_states": torch.full((1, 1, 1), text)}
                for text in (prompt, 0.0 if negative is None else negative)
            ]
            if self.several:
                predicted = self.predict_noise_with_multi_branch_cfg(guided, scale, branches_kwargs=branches)
            else:
                predicted = self.predict_noise_maybe_with_cfg(guided, scale, *branches)
            latents = self.scheduler.step(predicted, t, latents, return_dict=False)[0]
        return latents


# Qwen-Image's block


@dataclasses.dataclass
class AttentionMetadata:
    attn_mask: torch.Tensor | None = None


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x)


class AdaLayerNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps, self.layernorm = eps, LayerNorm(dim, elementwise_affine=False, eps=eps)

    def forward(self, x, scale, shift):
        return self.layernorm(x) * (1 + scale) + shift


class RotaryEmbedding(nn.Module):
    is_neox_style, interleaved, half_head_dim = False, True, True

    def forward(self, x, cos, sin):
        a, b = x[..., ::2], x[..., 1::2]
        cos, sin = cos[:, None], sin[:, None]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class QKVParallelLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class Attention(nn.Module):
    def forward(self, q, k, v, attn_metadata=None):
        mask = None if attn_metadata is None else attn_metadata.attn_mask[:, None, None, :]
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(dim, 2 * dim), nn.GELU("tanh"), nn.Linear(2 * dim, dim)])

    def forward(self, x):
        for module in self.net:
            x = module(x)
        return x


class QwenImageCrossAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.head_dim, self.query_num_heads, self.kv_num_heads = dim // heads, heads, heads
        self.to_qkv, self.add_kv_proj = QKVParallelLinear(dim, 3 * dim), QKVParallelLinear(dim, 3 * dim)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(self, name, nn.RMSNorm(self.head_dim, eps=1e-6))
        self.to_out, self.to_add_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.attn, self.rope, self.parallel_config = Attention(), RotaryEmbedding(), None

    def forward(
        self, hidden_states, encoder_hidden_states, vid_freqs, txt_freqs, hidden_states_mask=None,
        encoder_hidden_states_mask=None,
    ):  # fmt: skip
        joint = []
        for states, packed, norms, freqs in (
            (encoder_hidden_states, self.add_kv_proj, (self.norm_added_q, self.norm_added_k), txt_freqs),
            (hidden_states, self.to_qkv, (self.norm_q, self.norm_k), vid_freqs),
        ):
            q, k, v = packed(states)[0].unflatten(-1, (3, self.query_num_heads, -1)).unbind(2)
            q, k = (self.rope(norm(one), freqs.real, freqs.imag) for norm, one in zip(norms, (q, k), strict=True))
            joint.append((q, k, v))
        metadata = None
        if encoder_hidden_states_mask is not None:
            rest = torch.ones(hidden_states.shape[:2], dtype=torch.bool)
            metadata = AttentionMetadata(torch.cat([encoder_hidden_states_mask, rest], 1))
        made = self.attn(*(torch.cat(pair, 1) for pair in zip(*joint, strict=True)), metadata).flatten(2, 3)
        T = encoder_hidden_states.shape[1]
        return self.to_out(made[:, T:]), self.to_add_out(made[:, :T])


class QwenImageTransformerBlock(nn.Module):
    def __init__(self, dim, heads, zero_cond_t=False):
        super().__init__()
        self.zero_cond_t = zero_cond_t
        self.attn = QwenImageCrossAttention(dim, heads)
        for stream in ("img", "txt"):
            setattr(self, f"{stream}_mod", nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim)))
            setattr(self, f"{stream}_norm1", AdaLayerNorm(dim))
            setattr(self, f"{stream}_norm2", AdaLayerNorm(dim))
            setattr(self, f"{stream}_mlp", FeedForward(dim))

    def forward(
        self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb,
        joint_attention_kwargs=None, modulate_index=None, hidden_states_mask=None,
    ):  # fmt: skip
        def parts(given):
            return [one.chunk(3, -1) for one in given.chunk(2, -1)]

        def selected(one):
            if modulate_index is None:
                return one.unsqueeze(1)
            first, second = one.chunk(2)
            return torch.where(modulate_index.bool()[..., None], second[:, None], first[:, None])

        image_first, image_second = parts(self.img_mod(temb))
        if self.zero_cond_t:
            temb = temb.chunk(2)[0]
        text_first, text_second = parts(self.txt_mod(temb))
        x, text = hidden_states, encoder_hidden_states
        shift, scale, gate = map(selected, image_first)
        t_shift, t_scale, t_gate = (one.unsqueeze(1) for one in text_first)
        made, t_made = self.attn(
            self.img_norm1(x, scale, shift), self.txt_norm1(text, t_scale, t_shift), *image_rotary_emb,
            hidden_states_mask, encoder_hidden_states_mask,
        )  # fmt: skip
        x, text = x + gate * made, text + t_gate * t_made
        shift, scale, gate = map(selected, image_second)
        t_shift, t_scale, t_gate = (one.unsqueeze(1) for one in text_second)
        x = x + gate * self.img_mlp(self.img_norm2(x, scale, shift))
        text = text + t_gate * self.txt_mlp(self.txt_norm2(text, t_scale, t_shift))
        return text, x


class BlockPipeline(nn.Module):
    """A pipeline with a transformer of Qwen-Image's blocks."""

    def __init__(self, dim=16, heads=2, blocks=2, zero_cond_t=False):
        super().__init__()
        self.transformer = nn.Module()
        made = [QwenImageTransformerBlock(dim, heads, zero_cond_t) for _ in range(blocks)]
        self.transformer.transformer_blocks = nn.ModuleList(made)

    def forward(self, x, text, mask, temb, rotation, index=None):
        for block in self.transformer.transformer_blocks:
            text, x = block(x, text, mask, temb, rotation, modulate_index=index)
        return text, x
