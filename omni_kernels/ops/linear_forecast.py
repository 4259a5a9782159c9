"""linear_forecast: a weighted sum of snapshots. Every forecaster has this form.

    out = base + Σ_j weights[j] · history[j]        base, history[j], out: [B, ...]      weights: K numbers in fp32

Reusing a residual is a single weight of 1. TaylorSeer (Liu et al. 2025, arXiv:2503.06923), Newton's divided
differences, Hermite and the others are linear in their snapshots, so they differ only in the weights. Moves the bytes
of its inputs and of `out` once. Computing a series of derivatives moves several times as much.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from omni_kernels.ascend import limits
from omni_kernels.ops import _samples, _tiles
from omni_kernels.ops._checks import DTYPES, alike, unlike
from omni_kernels.ops._triton import tl, triton
from omni_kernels.registration import define

# A program reads all snapshots at once. A higher limit would only cost registers; no forecaster keeps more snapshots.
MAX_HISTORY = 16

# 8 elements per thread: on sm_90, 39 registers with 4 streams and 73 with 9. With 16 elements: 80 and 146.
BLOCK = 2048


def linear_forecast(
    base: torch.Tensor | None,
    history: Sequence[torch.Tensor],
    weights: Sequence[float] | torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """base + Σ_j weights[j]·history[j], accumulated in fp32.

    Args:
        base: [B, ...], fp32, fp16 or bf16, any strides. None means 0.
        history: 0 to 16 tensors like base; dtypes may differ. At least one if base is None.
        weights: one number per snapshot, or a tensor [K] on the snapshots' device, which is not copied to the host.
        out: where to write; None for a new tensor. It may be base or one of the history (such as the oldest snapshot),
            or overlap any of them: the inputs are read before it is written.

    Returns:
        `out`, or a new contiguous tensor in the dtype of base (without base, of history[0]).

    Raises:
        ValueError: shapes or devices differ, a dtype is not allowed, the numbers of weights and snapshots differ,
            there are more than 16 snapshots, or neither base nor a snapshot is given.
    """
    like = base if base is not None else history[0] if history else None
    if like is None:
        raise ValueError("linear_forecast: base is None and history is empty; one of them must be given")
    if len(history) > MAX_HISTORY:
        raise ValueError(f"linear_forecast: history has {len(history)} tensors; allowed are 0 to {MAX_HISTORY}")
    if not alike(like, out, *history):
        names = {f"history[{j}]": t for j, t in enumerate(history)}
        raise unlike("linear_forecast", base=base, **names, out=out)
    if isinstance(weights, torch.Tensor):
        if weights.shape != (len(history),) or weights.device != like.device or weights.dtype not in DTYPES:
            raise _wrong_weights(weights, len(history), like)
        return _op(base, history, weights, out)
    if len(weights) != len(history):
        raise ValueError(
            f"linear_forecast: weights has {len(weights)} numbers; it must have {len(history)}, one per snapshot"
        )
    return _op(base, history, [float(w) for w in weights], out)


def _wrong_weights(weights: torch.Tensor, K: int, like: torch.Tensor) -> ValueError:
    if weights.shape != (K,):
        return ValueError(f"linear_forecast: weights has shape {[*weights.shape]}; it must be [{K}], one per snapshot")
    return unlike("linear_forecast", history=like.new_empty(K), weights=weights)


def reference(base, history, weights, out):
    """In plain torch."""
    scales = weights
    if isinstance(weights, torch.Tensor):
        scales = weights.tolist() if weights.is_cpu else weights.unbind()
    elif out is None and history and base is not None and base.dtype is torch.float32:  # the case of every skipped step
        first = weights[0]
        total = base + history[0] if first == 1.0 else base.add(history[0], alpha=first)
        # After other work, adding 1024 elements takes 8 µs out of place and 13 in place; 2²⁰ elements, 2.2 ms and 0.8.
        small = total.numel() <= _samples.SMALL
        for j in range(1, len(history)):
            add = total.add if small else total.add_
            total = add(history[j], alpha=weights[j])
        return total.contiguous()
    read = list(history) if base is None else [base, *history]
    dtype = read[0].dtype if out is None else out.dtype
    # Sum directly into `out`, unless a later term would still be read from that memory.
    into = out
    if out is not None and (
        dtype != torch.float32
        or any(_samples.overlap(out, t) for t in read[1:])
        or (_samples.overlap(out, read[0]) and not _samples.same_view(out, read[0]))
    ):
        into = None
    if base is None:
        total = into = torch.mul(history[0].float(), scales[0], out=into)
    else:
        total = base.float() if history else base.clone()
    for j in range(base is None, len(history)):
        scale = scales[j]
        if isinstance(scale, torch.Tensor):
            total = torch.addcmul(total, history[j].float(), scale, out=into)
        else:
            total = torch.add(total, history[j], alpha=scale, out=into)
        into = total
    if out is not None:
        return out if total is out else out.copy_(total)
    return total.to(dtype).contiguous()


@triton.jit(do_not_specialize=["n", "blocks"])
def linear_forecast_kernel(
    p_base, p_history, p_weights, weights, p_out, n, base_stride, history_strides, out_stride, blocks,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program writes one block of one sample of n elements. The weights are numbers, or are read from p_weights."""
    pid = tl.program_id(0)
    sample = (pid // blocks).to(tl.int64)
    start = (pid % blocks).to(tl.int64) * BLOCK
    o = tl.arange(0, BLOCK)
    p_out += sample * out_stride + start
    # A mask whose bound is not divisible by 16 prevents 128-bit accesses. So only the last, incomplete block has one.
    if start + BLOCK <= n:
        total = tl.zeros((BLOCK,), tl.float32)
        if p_base is not None:
            total = tl.load(p_base + sample * base_stride + start + o).to(tl.float32)
        for j in tl.static_range(K):
            w = weights[j] if p_weights is None else tl.load(p_weights + j).to(tl.float32)
            total += w * tl.load(p_history[j] + sample * history_strides[j] + start + o).to(tl.float32)
        tl.store(p_out + o, total.to(p_out.dtype.element_ty))
    else:
        m = o < (n - start).to(tl.int32)
        total = tl.zeros((BLOCK,), tl.float32)
        if p_base is not None:
            total = tl.load(p_base + sample * base_stride + start + o, mask=m, other=0.0).to(tl.float32)
        for j in tl.static_range(K):
            w = weights[j] if p_weights is None else tl.load(p_weights + j).to(tl.float32)
            b_history = tl.load(p_history[j] + sample * history_strides[j] + start + o, mask=m, other=0.0)
            total += w * b_history.to(tl.float32)
        tl.store(p_out + o, total.to(p_out.dtype.element_ty), mask=m)


def launch(base, history, weights, out):
    """With the Triton kernel. With an empty history, torch copies the base."""
    if not history:
        return reference(base, history, weights, out)
    read = list(history) if base is None else [base, *history]
    like = read[0]
    if out is None:
        out = like.new_empty(like.shape)
    if out.numel() == 0:
        return out
    target = out
    if not all(_samples.same_view(out, t) or not _samples.overlap(out, t) for t in read) or not out[0].is_contiguous():
        target = out.new_empty(out.shape)
    B, n = out.shape[0], out.numel() // out.shape[0]
    if all(t.is_contiguous() for t in (target, *read)):
        B, n, strides = 1, out.numel(), [0] * (len(read) + 1)
    else:
        views = [_samples.by_sample(t) for t in (target, *read)]
        read, strides = [t for t, _ in views[1:]], [stride for _, stride in views]
    out_stride, *strides = strides
    base, base_stride = (None, 0) if base is None else (read.pop(0), strides.pop(0))
    block = _tiles.tile("linear_forecast", target, BLOCK)
    blocks = -(-n // block)
    p_weights, numbers = (weights, None) if isinstance(weights, torch.Tensor) else (None, tuple(weights))
    with _samples.on_device_of(target):
        linear_forecast_kernel[limits.grid(target, B * blocks)](
            base, tuple(read), p_weights, numbers, target, n, base_stride, tuple(strides), out_stride, blocks,
            K=len(read), BLOCK=block, num_warps=_samples.warps(), enable_fp_fusion=True,
        )  # fmt: skip
    return out if target is out else out.copy_(target)


_op = define(linear_forecast, reference, launch)
