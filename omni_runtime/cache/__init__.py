"""Step caches for diffusion transformers: four choices (site, signal, gate, forecaster) and two seams.

`methods.METHODS` is the table of methods; `models.MODELS` is the table of transformer classes.
"""

from omni_runtime.cache.report import BranchReport, CacheReport, Decision, StepEvent

__all__ = ["BranchReport", "CacheReport", "Decision", "StepEvent"]
