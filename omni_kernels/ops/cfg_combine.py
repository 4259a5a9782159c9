"""cfg_combine: classifier-free guidance from the two predictions, in one pass.

    out = uncond + scale·(cond − uncond)        cond, uncond, out: [B, ...]
    rescale "token":  out ← out·‖cond‖ / ‖out‖, norms over the last dimension

Ho and Salimans 2022, arXiv:2207.12598. With the rescaling, what QwenImagePipeline computes of `noise_pred` and
`neg_noise_pred` at `true_cfg_scale`. ZImagePipeline's pos + s·(pos − neg) is this with scale = 1 + s; its cut of the
norm of a whole image, off by default, is not here, and it keeps fp32 where this rounds to cond's dtype:
`linear_forecast(None, [pos, neg], [1 + s, -s], out=…)` writes fp32. Moves the bytes of cond, uncond and out, once.
"""

from __future__ import annotations

import torch

from omni_kernels.ops import _ascend, _rows, _samples, _tiles
from omni_kernels.ops._checks import alike, unlike
from omni_kernels.ops._triton import tl, triton
from omni_kernels.registration import define, eager_on_cpu, nbytes

RESCALINGS = (None, "token")

# 8 elements a thread: on sm_90 29 registers and 64 KB of loads under way per multiprocessor.
BLOCK = 2048
# With rescaling, a tile is as many rows as fill it, or one row.
TILE = 2048
# A program holds whole rows in registers; longer ones would not fit.
MAX_TRITON_CHANNELS = 16384


def cfg_combine(cond: torch.Tensor, uncond: torch.Tensor, scale: float, *, rescale: str | None = None) -> torch.Tensor:
    """uncond + scale·(cond − uncond), in fp32 until it is stored.

    Args:
        cond: [B, ...], fp32, fp16 or bf16, any strides: the prediction with the prompt.
        uncond: as cond, the prediction without it or with the negative one; the dtype may differ.
        scale: 1 gives cond.
        rescale: None, or "token": every vector of the last dimension gets the norm of cond's. One of norm 0 gives NaN,
            as in diffusers.

    Returns:
        A new contiguous tensor in cond's shape and dtype.

    Raises:
        ValueError: shapes or devices differ, a dtype is not allowed, cond has no dimensions, or the rescaling is
            unknown.
    """
    if not alike(cond, uncond):
        raise unlike("cfg_combine", cond=cond, uncond=uncond)
    if rescale not in RESCALINGS:
        raise ValueError(f"cfg_combine: rescale is {rescale!r}; allowed are None and 'token'")
    scale = float(scale)
    return (reference if eager_on_cpu(cond) else _op)(cond, uncond, scale, rescale)


def bytes_moved(cond: torch.Tensor, uncond: torch.Tensor, scale: float, *, rescale: str | None = None) -> int:
    """Bytes read and written."""
    return nbytes((cond, uncond, cond))


def reference(cond: torch.Tensor, uncond: torch.Tensor, scale: float, rescale: str | None = None) -> torch.Tensor:
    """In plain torch."""
    x = cond.float()
    out = torch.add(uncond, x - uncond, alpha=scale)
    if rescale == "token":
        # `sum` adds pairwise, `vector_norm` does not.
        out.mul_(x.square().sum(-1, keepdim=True).div_(out.square().sum(-1, keepdim=True)).sqrt_())
    return out.to(cond.dtype).contiguous()


@triton.jit(do_not_specialize=["n", "scale", "blocks"])
def cfg_combine_kernel(  # type: ignore[no-untyped-def]
    p_cond, p_uncond, p_out, n, scale, cond_stride, uncond_stride, out_stride, blocks, BLOCK: tl.constexpr
):
    """A program writes one block of one row of n elements."""
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    start = (pid % blocks).to(tl.int64) * BLOCK
    o = tl.arange(0, BLOCK)
    p_cond += row * cond_stride + start
    p_uncond += row * uncond_stride + start
    p_out += row * out_stride + start
    # A mask whose bound may not divide by 16 costs the 128-bit accesses: only the last, incomplete block has one.
    if start + BLOCK <= n:
        cond = tl.load(p_cond + o).to(tl.float32)
        uncond = tl.load(p_uncond + o).to(tl.float32)
        tl.store(p_out + o, (uncond + scale * (cond - uncond)).to(p_out.dtype.element_ty))
    else:
        m = o < (n - start).to(tl.int32)
        cond = tl.load(p_cond + o, mask=m, other=0.0).to(tl.float32)
        uncond = tl.load(p_uncond + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_out + o, (uncond + scale * (cond - uncond)).to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["rows", "scale"])
def cfg_rescale_kernel(  # type: ignore[no-untyped-def]
    p_cond, p_uncond, p_out, rows, scale, cond_stride, uncond_stride, out_stride,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program writes ROWS rows of D elements."""
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_d = tl.arange(0, BLOCK)[None, :]
    m = (o_r < rows) & (o_d < D)
    cond = tl.load(p_cond + o_r * cond_stride + o_d, mask=m, other=0.0).to(tl.float32)
    uncond = tl.load(p_uncond + o_r * uncond_stride + o_d, mask=m, other=0.0).to(tl.float32)
    out = uncond + scale * (cond - uncond)
    out *= tl.sqrt(tl.sum(cond * cond, axis=1, keep_dims=True) / tl.sum(out * out, axis=1, keep_dims=True))
    tl.store(p_out + o_r * out_stride + o_d, out.to(p_out.dtype.element_ty), mask=m)


@_ascend.falls_back(reference)
def launch(cond: torch.Tensor, uncond: torch.Tensor, scale: float, rescale: str | None = None) -> torch.Tensor:
    """With the Triton kernels; rescaled rows too long for one take the plain-torch implementation."""
    D = cond.shape[-1]
    longest = _ascend.tile("cfg_combine", cond, MAX_TRITON_CHANNELS)
    if rescale is not None and longest < D:
        return reference(cond, uncond, scale, rescale)
    out = cond.new_empty(cond.shape)
    if out.numel() == 0:
        return out
    (cond, uncond, target), strides, R, n = _rows.by_row(cond, uncond, out, length=None if rescale is None else D)
    with _samples.on_device_of(out):
        if rescale is None:
            block = _tiles.tile("cfg_combine", out, BLOCK)
            blocks = -(-n // block)
            cfg_combine_kernel[_ascend.grid(out, R * blocks)](
                cond, uncond, target, n, scale, *strides, blocks,
                BLOCK=block, num_warps=_samples.warps(), enable_fp_fusion=True,
            )  # fmt: skip
        else:
            block = max(_samples.MIN_WIDTH, triton.next_power_of_2(D))
            rows = max(1, min(_tiles.tile("cfg_combine", out, TILE) // block, triton.next_power_of_2(R)))
            num_warps = _samples.warps(max(_samples.THREADS, block // 16))
            cfg_rescale_kernel[_ascend.grid(out, -(-R // rows))](
                cond, uncond, target, R, scale, *strides,
                D=D, ROWS=rows, BLOCK=block, num_warps=num_warps, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def fake(cond: torch.Tensor, uncond: torch.Tensor, scale: float, rescale: str | None = None) -> torch.Tensor:
    """The output's shape and dtype."""
    return cond.new_empty(cond.shape)


_op = define(
    "cfg_combine(Tensor cond, Tensor uncond, float scale, str? rescale) -> Tensor",
    reference=reference,
    triton=launch,
    fake=fake,
)
