"""Patches pipeline instances and the cache-dit library. Every change is recorded and can be undone exactly."""

from omni_kernels.patching.api import PatchHandle, handle_of, patch, patched, unpatch
from omni_kernels.patching.cache_dit import LibraryHandle
from omni_kernels.patching.changes import Patch, PatchConflictError
from omni_kernels.patching.warming import Warmup, warmup

__all__ = [
    "LibraryHandle",
    "Patch",
    "PatchConflictError",
    "PatchHandle",
    "Warmup",
    "handle_of",
    "patch",
    "patched",
    "unpatch",
    "warmup",
]
