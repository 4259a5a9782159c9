"""The text side: a byte-level tokenizer fitted to the captions and a small, frozen, random Qwen2.5-VL text encoder.

Words of the vocabulary are single tokens with nearly orthogonal embeddings, which is all that the transformer needs
from a text encoder here. The pipeline drops a fixed number of tokens from the front of its prompt template; the
tokenizer is fitted so that the template's prefix comes out as exactly that many.
"""

from __future__ import annotations

import json

import torch
from diffusers import QwenImagePipeline
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from .scenes import COLOURS, EMOJI, caption_of

__all__ = ["TEXT_DIM", "encode_captions", "new_text_encoder", "new_tokenizer"]

TEXT_DIM = 128
VOCABULARY_SIZE = 700
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def prompt_template() -> tuple[str, str, int]:
    """The pipeline's template: text before the caption, text after it, and how many tokens it drops from the front."""
    pipeline = QwenImagePipeline(None, None, None, None, None)
    prefix, suffix = pipeline.prompt_template_encode.split("{}")
    return prefix, suffix, pipeline.prompt_template_encode_start_idx


def new_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE on the template and the vocabulary's words, with Qwen's pre-tokenizer and special tokens."""
    prefix, _, dropped = prompt_template()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    plain_prefix = prefix.replace("<|im_start|>", "").replace("<|im_end|>", "")
    names = [(name,) for name in EMOJI]
    captions = [caption_of(name, colour, article) for name in names for colour in COLOURS for article in (False, True)]
    corpus = [plain_prefix] * 3000 + ["user\n", "assistant\n", "system\n"] * 3000 + captions * 100
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL_TOKENS,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fitted = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in fitted["merges"]]
    qwen = Qwen2Tokenizer(vocab=fitted["vocab"], merges=merges, extra_special_tokens=SPECIAL_TOKENS[1:])
    qwen.model_max_length = 4096
    length = len(qwen(prefix).input_ids)
    if length != dropped:
        raise ValueError(
            f"the template's prefix is {length} tokens and the pipeline drops {dropped}; raise VOCABULARY_SIZE"
        )
    return qwen


def new_text_encoder(tokenizer: Qwen2Tokenizer, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Two layers of width TEXT_DIM with random weights, rounded to bf16, as the saved ones will be."""
    torch.manual_seed(seed)
    token = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": TEXT_DIM,
            "intermediate_size": 2 * TEXT_DIM,
            "num_hidden_layers": 2,
            "num_attention_heads": TEXT_DIM // 32,
            "num_key_value_heads": 1,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "bos_token_id": token["<|endoftext|>"],
            "eos_token_id": token["<|im_end|>"],
            "pad_token_id": token["<|endoftext|>"],
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": TEXT_DIM,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [0],
        },
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=1.0)
    return encoder.eval().requires_grad_(False).to(torch.bfloat16).float()


@torch.no_grad()
def encode_captions(
    tokenizer: Qwen2Tokenizer, encoder: Qwen2_5_VLForConditionalGeneration, captions: list[str], batch: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pipeline makes of captions, padded: embeddings [count, length, TEXT_DIM] and mask [count, length]."""
    prefix, suffix, dropped = prompt_template()
    rows = []
    for start in range(0, len(captions), batch):
        texts = [prefix + caption + suffix for caption in captions[start : start + batch]]
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        states = encoder(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True
        ).hidden_states[-1]
        rows += [row[kept.bool()][dropped:] for row, kept in zip(states, tokens.attention_mask, strict=True)]
    lengths = torch.tensor([len(row) for row in rows])
    embeddings = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return embeddings, torch.arange(embeddings.shape[1]) < lengths[:, None]
