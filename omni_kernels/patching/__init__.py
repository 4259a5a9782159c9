"""Patching of pipeline instances: what is installed is recorded, and undone exactly."""

from omni_kernels.patching.api import PatchHandle, handle_of, patch, patched, unpatch
from omni_kernels.patching.engine import Patch, PatchConflictError

__all__ = ["Patch", "PatchConflictError", "PatchHandle", "handle_of", "patch", "patched", "unpatch"]
