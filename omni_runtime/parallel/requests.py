"""What a request asks for, in a form that ranks can compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from omni_runtime.generation.result import identified


def asked(settings: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, str]:
    """What a request asks for, name → value. Long values are replaced by a digest.

    Args:
        settings: the settings of the request's result.
        arguments: the arguments of the pipeline's call.
    """
    found = {name: value for name, value in settings.items() if name not in arguments and name != "versions"}
    found |= {name: _state(value) for name, value in arguments.items()}
    return {name: _brief(value) for name, value in found.items()}


def _state(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, (list, tuple)) and any(isinstance(one, torch.Generator) for one in value):
        return [_state(one) for one in value]
    return value


def _brief(value: Any) -> str:
    text = json.dumps(identified(value), sort_keys=True)
    return text if len(text) <= 60 else f"a value with digest {hashlib.sha256(text.encode()).hexdigest()[:12]}"
