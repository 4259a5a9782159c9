"""Patching of pipeline instances, and of the cache-dit library: what is installed is recorded, and undone exactly."""

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
