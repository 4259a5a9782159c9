"""OmniGen."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import diffusers
import numpy as np
import torch
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen
from PIL import Image

from benchmarks.models.tiny import Tiny, flow, kl_vae, picture, tiny

VOCABULARY = 64


class _Processor(processor_omnigen.OmniGenMultiModalProcessor):
    """The processor of OmniGen with a letter for a token, and without torchvision."""

    def __init__(self, text_tokenizer: None, max_image_size: int = 1024) -> None:
        self.max_image_size = max_image_size
        self.collator = processor_omnigen.OmniGenCollator()

    def text_tokenizer(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[2 + ord(letter) % (VOCABULARY - 2) for letter in text[-24:]])

    def process_image(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def _pipe() -> diffusers.OmniGenPipeline:
    transformer = diffusers.OmniGenTransformer2DModel(
        in_channels=4,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=64,
        num_layers=4,
        pad_token_id=0,
        vocab_size=VOCABULARY,
        rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
        pos_embed_max_size=16,
        time_step_dim=16,
    )
    scheduler = flow(invert_sigmas=True, num_train_timesteps=1)
    with mock.patch.object(pipeline_omnigen, "OmniGenMultiModalProcessor", _Processor, create=True):
        return diffusers.OmniGenPipeline(transformer, scheduler, kl_vae(4), None)


_REQUEST = {"prompt": "a cat", "height": 64, "width": 64}
_LARGER = {"width": 96}


@tiny("OmniGenPipeline")
def omnigen() -> Tiny:
    return Tiny(_pipe(), _REQUEST, larger=_LARGER)


@tiny("OmniGenPipeline (editing)")
def edit() -> Tiny:
    request = _REQUEST | {"prompt": "<img><|image_1|></img> a cat", "input_images": [picture()]}
    return Tiny(_pipe(), request, larger=_LARGER)
