"""Tiny random-weight pipelines that run end to end on the CPU, offline: Qwen-Image, its edit pipelines, Z-Image,
FLUX, Wan, Chroma.

All classes are the real ones of diffusers and transformers, built from a config; nothing is downloaded. `generate` runs
8 steps at 64×64 pixels with a fixed seed, in 0.1–0.3 s on one thread. Every build gives the same weights.

    pipe = tiny.qwen_image(layers=6)
    latents = tiny.generate(pipe, seed=1, num_inference_steps=20)
    image = tiny.generate(pipe, output_type="pt")     # float tensor 1×3×64×64 in [0, 1]
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import diffusers
import torch
import transformers
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.utils import is_torchvision_available

QWEN_SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
QWEN_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# Pipelines


def _built_once(build: Callable[..., Any]) -> Callable[..., Any]:
    """Build a pipeline once for each set of arguments. Every call returns a copy that shares only tokenizers with it.

    A copy takes 9 ms, where building Qwen-Image takes 34 and `copy.deepcopy` 32.
    """
    built: dict[str, Any] = {}

    @functools.wraps(build)
    def copied(*args: Any, **kwargs: Any) -> Any:
        key = repr((args, sorted(kwargs.items())))
        if key not in built:
            built[key] = build(*args, **kwargs)
        pipe = built[key]
        shared = ("tokenizer", "tokenizer_2", "processor")
        parts = {name: part if name in shared else _copy(part) for name, part in pipe.components.items()}
        others = {name: value for name, value in pipe.config.items() if name not in parts and name[0] != "_"}
        with processor_without_video():
            return type(pipe)(**parts, **others)

    return copied


def _copy(part: Any) -> Any:
    """As `copy.deepcopy`, which takes four times as long for modules: most of their attributes cannot change."""
    if not isinstance(part, torch.nn.Module):
        return copy.deepcopy(part)
    memo: dict[int, Any] = {}
    for module in part.modules():
        memo[id(module)] = type(module).__new__(type(module))
    for tensor in (*part.parameters(), *part.buffers()):
        data = tensor.detach().clone()
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(data, tensor.requires_grad) if is_parameter else data
    for module in part.modules():
        attributes = memo[id(module)].__dict__
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                attributes[name] = {key: memo.get(id(one), one) for key, one in value.items()}
            elif value is None or type(value) in (bool, int, float, str):
                attributes[name] = value
            elif type(value) in (dict, collections.OrderedDict) and not value:  # hooks
                attributes[name] = type(value)()
            else:
                attributes[name] = copy.deepcopy(value, memo)
    return memo[id(part)]


@_built_once
def qwen_image(layers: int = 4, **transformer: Any) -> diffusers.QwenImagePipeline:
    """Text to image, two transformer calls a step if there is a negative prompt."""
    with _fixed_weights():
        return diffusers.QwenImagePipeline(**_qwen_components(layers, transformer))


@_built_once
def qwen_image_edit(layers: int = 4, plus: bool = False, **transformer: Any) -> diffusers.DiffusionPipeline:
    """Image editing; `plus=True` takes a list of references. `zero_cond_t=True` builds the 2511 form.

    Run it under `small_references()`: the pipelines scale every reference to about 1024² pixels.
    """
    cls = diffusers.QwenImageEditPlusPipeline if plus else diffusers.QwenImageEditPipeline
    with _fixed_weights(), processor_without_video():
        return cls(processor=_qwen_processor(), **_qwen_components(layers, transformer))


@_built_once
def z_image(layers: int = 4, refiners: int = 1, **transformer: Any) -> diffusers.ZImagePipeline:
    """Text to image, both guidance branches in one batched transformer call."""
    with _fixed_weights():
        config: dict[str, Any] = {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 16,
            "dim": 64,
            "n_layers": layers,
            "n_refiner_layers": refiners,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 32,
            "axes_dims": [8, 12, 12],
            "axes_lens": [1024, 512, 512],
        }
        model = diffusers.ZImageTransformer2DModel(**config | transformer).eval()
        with torch.no_grad():  # torch.empty in the model's constructor
            model.x_pad_token.fill_(0.02)
            model.cap_pad_token.fill_(0.02)
        return diffusers.ZImagePipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
            vae=_kl_vae(),
            text_encoder=_qwen3_text_encoder(),
            tokenizer=qwen_tokenizer(),
            transformer=damp(model, weight=0.1),
        )


@_built_once
def flux(layers: int = 2, single_layers: int = 2, **transformer: Any) -> diffusers.FluxPipeline:
    """Text to image with embedded guidance: one transformer call a step, double blocks, then single blocks."""
    with _fixed_weights():
        config: dict[str, Any] = {
            "in_channels": 64,
            "num_layers": layers,
            "num_single_layers": single_layers,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "guidance_embeds": True,
            "axes_dims_rope": (8, 12, 12),
        }
        return diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.15),
            vae=_kl_vae(),
            text_encoder=_clip_text_encoder(),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_t5_text_encoder(),
            tokenizer_2=_t5_tokenizer(),
            transformer=damp(diffusers.FluxTransformer2DModel(**config | transformer).eval()),
        )


@_built_once
def wan(layers: int = 2, two_stages: bool = False, **transformer: Any) -> diffusers.WanPipeline:
    """Text to video, two transformer calls a step with guidance; `two_stages` has a second transformer for low noise.

    Block caches have no row for its transformer.
    """
    with _fixed_weights():
        config: dict[str, Any] = {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "text_dim": 32,
            "freq_dim": 32,
            "ffn_dim": 48,
            "num_layers": layers,
            "rope_max_seq_len": 32,
        }
        models = [diffusers.WanTransformer3DModel(**config | transformer).eval() for _ in range(1 + two_stages)]
        return diffusers.WanPipeline(
            tokenizer=_t5_tokenizer(),
            text_encoder=_umt5_text_encoder(),
            vae=diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=models[0],
            transformer_2=models[1] if two_stages else None,
            boundary_ratio=0.6 if two_stages else None,
        )


@_built_once
def chroma(layers: int = 2, single_layers: int = 2) -> diffusers.ChromaPipeline:
    """Text to image, two transformer calls a step with guidance; block caches have no row for its transformer."""
    with _fixed_weights():
        model = diffusers.ChromaTransformer2DModel(
            in_channels=64,
            num_layers=layers,
            num_single_layers=single_layers,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(8, 12, 12),
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=1,
        )
        return diffusers.ChromaPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.15),
            vae=_kl_vae(),
            text_encoder=_t5_text_encoder(),
            tokenizer=_t5_tokenizer(),
            transformer=model.eval(),
        )


PIPELINES: dict[str, Callable[..., Any]] = {
    "qwen_image": qwen_image,
    "qwen_image_edit": qwen_image_edit,
    "qwen_image_edit_plus": functools.partial(qwen_image_edit, plus=True),
    "z_image": z_image,
    "flux": flux,
}


# Running them


def reference_image(side: int = 96, seed: int = 0) -> Image.Image:
    """An RGB picture of low-frequency noise, the same for the same seed."""
    coarse = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse[None], size=(side, side), mode="bicubic")[0].clamp(0, 1)
    return Image.fromarray((fine * 255).byte().permute(1, 2, 0).contiguous().numpy(), "RGB")


def default_arguments(pipe: Any) -> dict[str, Any]:
    """The arguments that `generate` adds by default: guidance, and references if the pipeline takes them."""
    guidance: dict[str, Any] = {"negative_prompt": " ", "true_cfg_scale": 4.0}
    return {
        "QwenImagePipeline": guidance,
        "QwenImageEditPipeline": guidance | {"image": reference_image()},
        "QwenImageEditPlusPipeline": guidance | {"image": [reference_image(), reference_image(seed=1)]},
        "ZImagePipeline": {"guidance_scale": 5.0},
        "FluxPipeline": {"guidance_scale": 3.5, "max_sequence_length": 64},
        "ChromaPipeline": {"negative_prompt": " ", "guidance_scale": 5.0, "max_sequence_length": 64},
        "WanPipeline": {"guidance_scale": 5.0, "num_frames": 5, "max_sequence_length": 64},
    }[type(pipe).__name__]


def generate(pipe: Any, seed: int = 0, **overrides: Any) -> torch.Tensor:
    """Run one request, by default 8 steps, 64×64, "a cat", and return its latents, which need no decoding.

    With `output_type="pt"`, return float images N×3×H×W in [0, 1], or a video N×F×3×H×W.
    """
    arguments: dict[str, Any] = {
        "prompt": "a cat",
        "height": 64,
        "width": 64,
        "num_inference_steps": 8,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
    }
    pipe.set_progress_bar_config(disable=True)
    with small_references(), torch.no_grad():
        (made,) = pipe(**arguments | default_arguments(pipe) | overrides | {"return_dict": False})
    return made


@contextlib.contextmanager
def small_references(side: int = 64) -> Iterator[None]:
    """While open, the edit pipelines scale references to about side² pixels instead of 384² or 1024²."""
    with contextlib.ExitStack() as stack:
        for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
            scaled = _limited_area(module.calculate_dimensions, side * side)
            stack.enter_context(mock.patch.object(module, "calculate_dimensions", scaled))
        yield


def _limited_area(calculate_dimensions: Callable[..., Any], limit: int) -> Callable[..., Any]:
    return lambda target_area, ratio: calculate_dimensions(min(target_area, limit), ratio)


# Components


def damp(transformer: torch.nn.Module, weight: float = 0.3, bias_std: float = 0.3) -> torch.nn.Module:
    """Make a random transformer smooth in time, so that caches find something to reuse.

    With random modulation, consecutive steps differ too much (relative distances 0.7–0.9). Scaled down, they are
    0.05–0.5.
    """
    modulation = ("img_mod.", "txt_mod.", "adaLN", ".norm.linear", ".norm1.linear", ".norm1_context.linear")
    with torch.no_grad():
        for name, layer in transformer.named_modules():
            if isinstance(layer, torch.nn.Linear) and any(part in name for part in modulation):
                layer.weight.mul_(weight)
                layer.bias.normal_(0.0, bias_std)
    return transformer


@contextlib.contextmanager
def _fixed_weights() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _qwen_components(layers: int, transformer: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": layers,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (8, 12, 12),
    }
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            time_shift_type="exponential",
            shift_terminal=0.02,
        ),
        "vae": diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True]
        ).eval(),
        "text_encoder": _qwen25_vl_text_encoder(),
        "tokenizer": qwen_tokenizer(),
        "transformer": damp(diffusers.QwenImageTransformer2DModel(**config | transformer).eval()),
    }


def _kl_vae() -> diffusers.AutoencoderKL:
    """16 latent channels, 8× smaller, as in Z-Image and FLUX."""
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 16, 16, 16],
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def _qwen25_vl_text_encoder() -> transformers.Qwen2_5_VLForConditionalGeneration:
    token = qwen_tokenizer().convert_tokens_to_ids
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": len(qwen_tokenizer()),
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def _qwen3_text_encoder() -> transformers.Qwen3Model:
    config = transformers.Qwen3Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,  # the pipeline reads hidden_states[-2]
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=len(qwen_tokenizer()),
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return transformers.Qwen3Model(config).eval()


def _clip_text_encoder() -> transformers.CLIPTextModel:
    tokenizer = _clip_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.CLIPTextModel(config).eval()


def _t5_text_encoder() -> transformers.T5EncoderModel:
    config = transformers.T5Config(
        vocab_size=len(_t5_tokenizer()),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        is_encoder_decoder=False,
    )
    return transformers.T5EncoderModel(config).eval()


def _umt5_text_encoder() -> transformers.UMT5EncoderModel:
    config = transformers.UMT5Config(
        vocab_size=len(_t5_tokenizer()), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2
    )
    return transformers.UMT5EncoderModel(config).eval()


# Tokenizers and processors


@functools.cache
def qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    """Byte-level BPE, trained so that the pipelines' template prefixes are the 34 and 64 tokens that they cut off."""
    classes = (diffusers.QwenImagePipeline, diffusers.QwenImageEditPipeline)
    prefixes = [_template_prefix(cls).replace("<|im_start|>", "").replace("<|im_end|>", "") for cls in classes]
    words = ["user\n", "assistant\n", "system\n", "Picture 1: ", "a cat", " a dog"]
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=2,
        show_progress=False,
        special_tokens=QWEN_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator((prefixes + words) * 50, trainer)
    trained = json.loads(model.to_str())["model"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        extra_special_tokens=QWEN_SPECIAL_TOKENS[1:],
        model_max_length=4096,
    )
    tokenizer.chat_template = QWEN_CHAT_TEMPLATE
    return tokenizer


def _template_prefix(pipeline_class: type) -> str:
    """The text that a pipeline puts before the prompt, read from the pipeline."""
    parts = ["scheduler", "vae", "text_encoder", "tokenizer", "transformer"]
    if pipeline_class is not diffusers.QwenImagePipeline:
        parts.append("processor")
    empty = pipeline_class(**dict.fromkeys(parts))
    return empty.prompt_template_encode.split("{}")[0].split("<|vision_start|>")[0]


@functools.cache
def _clip_tokenizer() -> transformers.CLIPTokenizer:
    """Single bytes, in the middle and at the end of a word; no merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


@functools.cache
def _t5_tokenizer() -> transformers.T5Tokenizer:
    """Single printable characters, all equally likely."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(code) for code in range(33, 127))]
    return transformers.T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0, model_max_length=512)


def _qwen_processor() -> transformers.Qwen2VLProcessor:
    if is_torchvision_available():
        image, video = transformers.Qwen2VLImageProcessor(), transformers.Qwen2VLVideoProcessor()
    else:
        image, video = transformers.Qwen2VLImageProcessorPil(), None
    return transformers.Qwen2VLProcessor(image, qwen_tokenizer(), video, chat_template=QWEN_CHAT_TEMPLATE)


@contextlib.contextmanager
def processor_without_video() -> Iterator[None]:
    """While open, a Qwen2-VL processor can be made, saved and loaded without torchvision, which only video needs."""

    def get_attributes(cls: type) -> Sequence[str]:
        return ["image_processor", "tokenizer"]

    if is_torchvision_available():
        yield
        return
    with mock.patch.object(transformers.Qwen2VLProcessor, "get_attributes", classmethod(get_attributes)):
        yield
