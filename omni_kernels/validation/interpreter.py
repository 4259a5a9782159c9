"""Corrects Triton's interpreter where it computes other results than a device."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def correct() -> None:
    """Round fp32 to fp8 as devices do.

    The interpreter of Triton 3.9 loses the carry into the exponent: 127.9 becomes 64 in float8_e4m3fn, not 128.
    """
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_fp_to_fp
    fp8 = {interpreter.tl.float8e4nv: torch.float8_e4m3fn, interpreter.tl.float8e4b8: torch.float8_e4m3fnuz}

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if dst_type.scalar not in fp8:
            return original(self, src, dst_type, rounding_mode)
        rounded = torch.from_numpy(src.data).to(fp8[dst_type.scalar]).view(torch.uint8).numpy()
        return interpreter.TensorHandle(rounded, dst_type.scalar)

    interpreter.InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
