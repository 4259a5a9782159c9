"""`omni backends` and `omni models`: list the cache backends and the models.

The list of backends is printed without importing torch, which would take longer than the rest of the command.
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Any

from omni_runtime.cli.options import DEFAULT_MODEL, UsageError
from omni_runtime.cli.output import print_json

#: Our own cache backends, in the order of listings, with the `summary` of each. A test checks that they are equal.
SUMMARIES = {
    "auto": "Auto: quality='high', 'balanced' or 'fast', or a speedup or PSNR in numbers; the rest is chosen for you",
    "velocity_cache": "Velocity cache: skip whole steps on a schedule, and forecast the guided model output there",
    "tea_cache": "TeaCache: skip all blocks while the accumulated change of block 0's modulated input is small",
    "cache_dit": "DBCache, with TaylorSeer and SCM: skip the middle blocks while what the first Fn add has changed "
    "little",
    "first_block_cache": "First-block cache: skip all blocks but the first while its residual has changed little",
    "mag_cache": "MagCache: skip all blocks while calibrated ratios say that the residual's magnitude has changed "
    "little",
    "sea_cache": "SeaCache: TeaCache on block 0's modulated input, filtered for the step's noise level",
    "easy_cache": "EasyCache: skip whole steps while the guided model output is expected to have changed little",
}
#: The largest width of a listing in columns.
WIDEST = 100

USE = """omni generate --prompt TEXT --cache-backend NAME \\
    --cache-config '{"key": value}'"""


def backends(options: argparse.Namespace) -> None:
    """`omni backends`: list every cache backend in one line, or the keys of one backend with their defaults."""
    if options.name is None and not options.json:
        _print_summaries()
        return
    from omni_kernels.patching import backends as registry

    if options.name is None:
        known = registry.available()
        found = {name: known[name] for name in (*SUMMARIES, *known) if name in known}
    else:
        try:
            found = {options.name: registry.get(options.name)}
        except ValueError as error:
            raise UsageError(str(error)) from None
    if options.json:
        fields = ("name", "default", "type_name", "allowed", "doc")
        print_json(
            {
                name: {"summary": one.summary, "keys": [{f: getattr(key, f) for f in fields} for key in one.keys]}
                for name, one in found.items()
            }
        )
        return
    for name, one in found.items():
        print_wrapped(one.summary, f"{name}: ", "  ")
        for key in one.keys:
            print_wrapped(json.dumps(key.default, ensure_ascii=False), f"  {key.name} = ", "      ")
            print_wrapped(f"{key.doc} ({key.allowed})", "      ", "      ")
        others = getattr(one, "spellings", {})
        if others:
            print_wrapped(", ".join(f"{other} for {key}" for other, key in others.items()), "  Other names: ", "      ")
    print(f"\n{USE.replace('NAME', options.name)}")


def _print_summaries() -> None:
    plugins = metadata.entry_points(group="omni_kernels.cache_backends")
    others = {entry.name for entry in plugins if entry.module.partition(".")[0] != "omni_runtime"}
    names = [*SUMMARIES, *sorted(others - SUMMARIES.keys())]
    width = max(map(len, names)) + 2
    for name in names:
        print_wrapped(SUMMARIES.get(name) or _summary(name), f"{name:<{width}}", " " * width)
    if others & SUMMARIES.keys():
        from omni_kernels.patching import backends as registry

        print()
        for reason in registry.refused().values():
            print_wrapped(reason, "Not used: ", "  ")
    print(f"\nThe keys of one, with their defaults: omni backends NAME\n{USE}")


def _summary(name: str) -> str:
    """Return the summary of another distribution's backend, or the reason why it cannot be used."""
    from omni_kernels.patching import backends as registry

    try:
        return registry.get(name).summary
    except ValueError as error:
        return str(error)


def print_wrapped(text: str, first: str, others: str) -> None:
    """Print `text` with `first` before it and `others` before its other lines, no wider than the terminal."""
    columns = max(40, min(WIDEST, shutil.get_terminal_size().columns))
    print(
        textwrap.fill(
            text, columns - 1, initial_indent=first, subsequent_indent=others, break_long_words=False,
            break_on_hyphens=False,
        )
    )  # fmt: skip


def models(options: argparse.Namespace) -> None:
    """`omni models`: the embedded models, and the transformers that the caches know."""
    from omni_runtime.cache import calibration
    from omni_runtime.cache.models import MODELS
    from omni_runtime.generation import loading

    embedded = {name: _embedded(path) for name, path in loading.embedded_models().items()}
    if options.json:
        transformers = {
            name: {
                "pipelines": list(row.pipelines),
                "tea_coefficients": row.tea_coefficients,
                "mag_ratios": row.mag_ratios,
            }
            for name, row in MODELS.items()
        }
        print_json({"embedded": embedded, "transformers": transformers})
        return
    print("Embedded models")
    for name, about in embedded.items():
        print(f"  {name}{' (default)' * (name == DEFAULT_MODEL)}: {about['pipeline']}, {about['bytes'] / 1e6:.1f} MB")
        for key, value in about["defaults"].items():
            print_wrapped(f"{key} {json.dumps(value)}", " " * 4, " " * 6)
        for method, kind in calibration.KINDS.items():
            own = about[method] or kind.otherwise
            print_wrapped(f"{method} {kind.key}: {own}", " " * 4, " " * 6)
    if not embedded:
        print("  none in this installation")
    print()
    print_wrapped(
        "Transformers that the caches know, with their pipelines; any checkpoint of these can be loaded", "", ""
    )
    for transformer, row in MODELS.items():
        print(f"  {transformer}")
        if row.tea_coefficients is not None:
            numbers = ", ".join(f"{one:g}" for one in row.tea_coefficients)
            print_wrapped(f"tea_cache coefficients {numbers}", " " * 4, " " * 6)
        if row.mag_ratios is not None:
            print(f"    mag_cache mag_ratios of {len(row.mag_ratios)} steps")
        for pipeline in row.pipelines:
            print(f"    {pipeline}")


def _embedded(path: Path) -> dict[str, Any]:
    from omni_runtime.cache import calibration

    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    defaults = path / "defaults.json"
    own = {method: calibration.own_file(str(path), method) for method in calibration.KINDS}
    return {
        "pipeline": index["_class_name"],
        "path": str(path),
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "defaults": json.loads(defaults.read_text(encoding="utf-8")) if defaults.is_file() else {},
        **{
            method: f"calibrated on {calibration.summary(calibration.read(file, method))}" if file else None
            for method, file in own.items()
        },
    }
