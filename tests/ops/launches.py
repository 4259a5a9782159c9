"""The package's launches, and one of a kernel that does what none of the package's does."""

import torch
import triton
import triton.language as tl

from omni_kernels.validation import launches


@triton.jit
def control_kernel(p_x, p_out, n, stride, BLOCK: tl.constexpr):
    """What no kernel of the package does: a mask on every block, a product of 32 bits, a floating-point atomic."""
    o = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.atomic_add(p_out, tl.sum(tl.load(p_x + o, mask=o < n, other=0.0).to(tl.float32)))


def control() -> None:
    x = torch.empty(1, 4096 * 3072 + 1, dtype=torch.bfloat16)
    control_kernel[(1,)](x, torch.empty(1), x.numel(), 4096, BLOCK=4096, enable_fp_fusion=True)


def table() -> dict:
    return {"control": control, **launches.table()}
