"""Triton kernels for diffusion transformers, and patching of diffusers pipelines to use them.

`ops` holds the kernels. `patch`, `unpatch` and `patched` fuse the blocks of one diffusers pipeline, install a cache
backend on it, and undo both. `warmup` compiles what a pipeline will need. Importing this package probes no device,
patches nothing, and loads neither diffusers nor transformers.
"""

from omni_kernels import ops
from omni_kernels.patching import PatchConflictError, PatchHandle, patch, patched, unpatch, warmup

__version__ = "0.1.0"

__all__ = ["PatchConflictError", "PatchHandle", "__version__", "ops", "patch", "patched", "unpatch", "warmup"]
