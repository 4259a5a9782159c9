"""The text parts that the models share: a byte-level tokenizer trained on a model's prompts, and rounding of the random
text encoders.

Words of the vocabulary are single tokens with nearly orthogonal embeddings. The transformer needs nothing more here, so
the text encoder is small, random and frozen. Some pipelines drop a fixed number of tokens from the front of their
prompt template; the tokenizer is trained so that the template's prefix has exactly that many.
"""

from __future__ import annotations

import json

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from .scenes import COLOURS, EMOJI, caption_of

__all__ = ["SPECIAL_TOKENS", "TEXT_DIM", "all_captions", "encode_texts", "freeze", "new_tokenizer", "pad_rows"]

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


def all_captions() -> list[str]:
    """Every caption of a single emoji on a colour; together they have every word of the vocabulary."""
    return [caption_of((name,), colour, article) for name in EMOJI for colour in COLOURS for article in (False, True)]


def new_tokenizer(prompts: list[str], prefix: str = "", dropped: int = 0) -> Qwen2Tokenizer:
    """Byte-level BPE on `prompts` and the template's prefix, with Qwen's pre-tokenizer and special tokens.

    Raises:
        ValueError: the prefix does not have `dropped` tokens, the number that the pipeline cuts off.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    plain_prefix = prefix.replace("<|im_start|>", "").replace("<|im_end|>", "")
    corpus = [plain_prefix] * 3000 + ["user\n", "assistant\n", "system\n"] * 3000 + prompts * 100
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


def freeze(encoder: torch.nn.Module) -> torch.nn.Module:
    """Freeze an encoder, with word embeddings far apart, and weights rounded to bf16, as they will be saved."""
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=1.0)
    return encoder.eval().requires_grad_(False).to(torch.bfloat16).float()


@torch.no_grad()
def encode_texts(
    tokenizer: Qwen2Tokenizer,
    encoder: torch.nn.Module,
    texts: list[str],
    layer: int = -1,
    dropped: int = 0,
    batch: int = 256,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded hidden states of a layer, without the first `dropped`: [count, length, TEXT_DIM] and mask [count, length].

    Args:
        tokenizer, encoder: the model's.
        texts: whole prompts, including the template.
        layer: index of the encoder's hidden states.
        dropped: tokens that the pipeline cuts off the front.
        batch: texts encoded at once.
    """
    rows: list[torch.Tensor] = []
    for start in range(0, len(texts), batch):
        tokens = tokenizer(texts[start : start + batch], padding=True, return_tensors="pt")
        states = encoder(**tokens, output_hidden_states=True).hidden_states[layer]
        rows += [row[kept.bool()][dropped:] for row, kept in zip(states, tokens.attention_mask, strict=True)]
    return pad_rows(rows)


def pad_rows(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [length, width] of different lengths to [count, length, width] and the mask [count, length]."""
    lengths = torch.tensor([len(row) for row in rows])
    embeddings = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return embeddings, torch.arange(embeddings.shape[1]) < lengths[:, None]
