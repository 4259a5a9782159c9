"""Imports Triton. If it is not installed, stand-ins let the kernel files be imported anyway.

Importing Triton loads no driver; the first launch does.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Absent:
        """Stand-in for every name that a kernel's decorators and annotations use. Its kernels cannot be launched."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self

        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("Triton is not installed; the plain-torch implementation runs without it")

    triton = tl = _Absent()

__all__ = ["tl", "triton"]
