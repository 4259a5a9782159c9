"""Run diffusers pipelines with step caches: `Omni` in Python, `omni` on the command line.

Importing this package loads neither torch nor diffusers. The names below are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omni_runtime.generation.loading import embedded_pipeline
    from omni_runtime.generation.omni import Omni
    from omni_runtime.generation.quantised_files import load_quantised, save_quantised
    from omni_runtime.generation.result import OmniResult, Timings

__all__ = ["Omni", "OmniResult", "Timings", "embedded_pipeline", "load_quantised", "save_quantised"]

_HOME = {
    "Omni": "omni_runtime.generation.omni",
    "OmniResult": "omni_runtime.generation.result",
    "Timings": "omni_runtime.generation.result",
    "embedded_pipeline": "omni_runtime.generation.loading",
    "load_quantised": "omni_runtime.generation.quantised_files",
    "save_quantised": "omni_runtime.generation.quantised_files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
