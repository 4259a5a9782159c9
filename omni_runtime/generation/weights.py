"""Checks after loading that a model's weights are complete and finite.

If a model's files lack weights, diffusers only warns, and initialises them or leaves them empty. So the names in the
files' headers are compared with those of the model. Values are checked on the device that holds them: every byte is
read once (7 GB/s of bfloat16 by one core of a CPU), with one transfer to the host for each component and device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["check_finite", "check_present"]

_FILE = re.compile(
    r"diffusion_pytorch_model(?P<variant>(\.[\w-]+?)??)(-\d+-of-\d+)?(?P<later>(\.[\w-]+)?)\.safetensors"
)
NAMED = 3  # how many weights a message names


def check_present(components: Mapping[str, Any], variant: str | None = None) -> None:
    """Check that the files of each diffusers model hold all of its weights.

    Args:
        components: name → part of a pipeline that was just loaded from a directory. A part is not checked if it is not
            a diffusers model, was not loaded from safetensors files, or was quantised while loading.
        variant: as given to `from_pretrained`.

    Raises:
        ValueError: weights are missing; the message names the directory and the first of them.
    """
    for name, component in components.items():
        directory = Path(str(getattr(getattr(component, "config", None), "_name_or_path", None) or ""))
        rename = getattr(component, "_fix_state_dict_keys_on_load", None)
        if not isinstance(component, torch.nn.Module) or rename is None or getattr(component, "hf_quantizer", None):
            continue
        held = dict.fromkeys(_names_in(_weight_files(directory, variant)))
        if not held:
            continue
        rename(held)
        missing = sorted(component.state_dict().keys() - held.keys())
        if missing:
            raise ValueError(
                f"the {name}'s files in {directory} lack {len(missing)} of its weights, such as "
                f"{', '.join(missing[:NAMED])}: the model is incomplete; download or save it again"
            )


def _weight_files(directory: Path, variant: str | None) -> list[Path]:
    """Return the safetensors files that diffusers loads: those of the variant, else those without a variant."""
    found: dict[str, list[Path]] = {}
    for path in sorted(directory.glob("diffusion_pytorch_model*.safetensors")):
        match = _FILE.fullmatch(path.name)
        if match is not None:
            found.setdefault((match["variant"] or match["later"]).removeprefix("."), []).append(path)
    return found.get(variant or "") or found.get("") or []


def _names_in(paths: Iterable[Path]) -> Iterable[str]:
    from safetensors import safe_open

    for path in paths:
        with safe_open(path, framework="pt") as file:
            yield from file.keys()


def check_finite(components: Mapping[str, Any]) -> None:
    """Check that every parameter is finite. Quantised and offloaded parameters, and the meta device, are not checked.

    Args:
        components: name → part of a pipeline.

    Raises:
        ValueError: some are not finite; the message names the first of them and where they were loaded from.
    """
    for name, component in components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        damaged = _not_finite(component)
        if damaged:
            origin = getattr(getattr(component, "config", None), "_name_or_path", None) or "memory"
            raise ValueError(
                f"the {name} (from {origin}) has weights that are not finite (NaN or infinite) in "
                f"{_dtype(component, damaged[0])}: {', '.join(damaged[:NAMED])}"
                f"{f' and {len(damaged) - NAMED} more' if len(damaged) > NAMED else ''}; its files are damaged "
                f"(download them again), or this dtype cannot hold them"
            )


@torch.no_grad()
def _not_finite(module: torch.nn.Module) -> list[str]:
    by_device: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, one in module.named_parameters():
        plain = type(one) is torch.nn.Parameter and one.layout is torch.strided
        if (
            plain
            and one.dtype.is_floating_point
            and one.dtype.itemsize > 1
            and one.device.type != "meta"
            and one.numel()
        ):
            low, high = torch.aminmax(one.detach())  # NaN appears in both; takes 1/40 of isfinite's time on a CPU
            by_device.setdefault(one.device, {})[name] = (low - low + (high - high)).float()
    found: list[str] = []
    for sums in by_device.values():
        finite = torch.stack(list(sums.values())).isfinite().tolist()
        found += [name for name, good in zip(sums, finite, strict=True) if not good]
    return found


def _dtype(module: torch.nn.Module, name: str) -> str:
    return str(module.get_parameter(name).dtype).removeprefix("torch.")
