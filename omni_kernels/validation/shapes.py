"""The shapes to measure: H, the hidden states [B, S, D] of a transformer at a denoising step.

- Qwen-Image at 1024²: 60 blocks, 24 heads × 128 = 3072 channels, 128 × 128 latents in 2 × 2 patches = 4096 tokens
  (`transformer/config.json` of Qwen/Qwen-Image). Guidance is two forwards, so the batch is 1.
- Qwen-Image-Edit: the noise's 4096 tokens are followed by the reference image's 4096.
- Z-Image at 1024²: 3840 channels (Tongyi-MAI/Z-Image), 4096 image tokens and the prompt's, padded to a multiple of 32,
  here 128, in one sequence; guidance is a batch of 2.
- FLUX at 1024²: 3072 channels (black-forest-labs/FLUX.1-dev); in the single blocks, the prompt's 512 tokens are
  followed by the 4096 image tokens. The benchmarks omit it: for a kernel, it hardly differs from Qwen-Image.
- Wan 2.1 14B at 832 × 480, 17 frames: 5120 channels (Wan-AI/Wan2.1-T2V-14B), 5 × 60 × 104 latents in 1 × 2 × 2 patches
  = 7800 tokens; more frames only add more of these. The benchmarks omit it, too.
- tiny: a model of 192 channels at 64 × 64 pixels, 4 × 4 tokens, in fp32: only overhead.
- large: not a model, but four samples of the edit shape. Every op moves far more than the 100 MB from which it has to
  reach its share of the copy bandwidth, and far more than any cache holds.

On the CPU, the number of tokens is divided by 16, and `large` is omitted. The whole then takes seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """One H: B samples of S tokens of D channels."""

    name: str
    B: int
    S: int
    D: int
    dtype: torch.dtype

    @property
    def size(self) -> tuple[int, int, int]:
        """[B, S, D]."""
        return self.B, self.S, self.D

    @property
    def nbytes(self) -> int:
        """Bytes of one H."""
        return math.prod(self.size) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} {self.B}×{self.S}×{self.D} {str(self.dtype)[6:]}"


QWEN_IMAGE = Shape("qwen-image-1024", 1, 4096, 3072, torch.bfloat16)
QWEN_IMAGE_EDIT = Shape("qwen-image-edit-1024", 1, 8192, 3072, torch.bfloat16)
Z_IMAGE = Shape("z-image-1024", 2, 4224, 3840, torch.bfloat16)
FLUX = Shape("flux-1024", 1, 4608, 3072, torch.bfloat16)
WAN = Shape("wan-480p", 1, 7800, 5120, torch.bfloat16)
TINY = Shape("tiny-64", 1, 16, 192, torch.float32)
LARGE = Shape("large", 4, 8192, 3072, torch.bfloat16)

FULL = (QWEN_IMAGE, QWEN_IMAGE_EDIT, Z_IMAGE, TINY, LARGE)

CPU_DIVISOR = 16
ON_CPU = (
    *(Shape(s.name, s.B, s.S // CPU_DIVISOR, s.D, s.dtype) for s in (QWEN_IMAGE, QWEN_IMAGE_EDIT, Z_IMAGE)),
    TINY,
)


def shapes_for(device: torch.device) -> tuple[Shape, ...]:
    """The shapes to measure on `device`."""
    return ON_CPU if device.type == "cpu" else FULL
