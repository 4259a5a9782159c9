"""Outputs of a comparison: the printed table, the contact sheet, the HTML report, and the numbers as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omni_runtime import files
from omni_runtime.compare import contact_sheet, report_html
from omni_runtime.compare.comparison import spread_over
from omni_runtime.compare.report_html import typical
from omni_runtime.generation.result import write_png

SHEET_ROWS = 24  # most rows of the contact sheet; of more prompts and seeds, it shows evenly spread ones

#: Columns of the printed table: measure, statistic, heading.
COLUMNS = (
    ("nfe", "mean", "NFE"),
    ("blocks", "mean", "blocks"),
    ("seconds", "median", "s/image"),
    ("speedup", "median", "speedup"),
    ("psnr", "spread", "PSNR dB"),
    ("psnr", "p5", "p5"),
    ("motion_psnr", "mean", "motion dB"),
    ("ssim", "mean", "SSIM"),
    ("ms_ssim", "mean", "MS-SSIM"),
    ("latents_psnr", "mean", "latents dB"),
    ("lpips", "mean", "LPIPS"),
)


def table(document: Mapping[str, Any]) -> str:
    """Return the runs as aligned text: means, medians of times, the standard deviation and 5th percentile of PSNR.

    The reference's quality is shown as "–", because quality is measured against the reference.
    """
    measures = document["measures"]
    columns = [column for column in COLUMNS if column[0] in measures]
    lines = [["run", *(heading for _, _, heading in columns)]]
    for number, run in enumerate(document["runs"]):
        entries = [
            "–" if number == 0 and not measures[name]["cost"] else _told(run[name], statistic, measures[name])
            for name, statistic, _ in columns
        ]
        lines.append([run["name"], *entries])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _told(values: Mapping[str, Any], statistic: str, measure: Mapping[str, Any]) -> str:
    value = typical(values) if statistic == "median" else values["mean" if statistic == "spread" else statistic]
    if value is None:
        return "identical"
    unit = measure["unit"] if measure["unit"] in ("%", "×") else ""
    text = f"{value:.{measure['digits']}f}{unit}"
    return f"{text} ± {values['std']:.{measure['digits']}f}" if statistic == "spread" else text


def sheet(document: Mapping[str, Any], picture: Callable[[Mapping[str, Any]], Any]) -> Any:
    """Draw the contact sheet: one row per prompt and seed, one column per run; at most `SHEET_ROWS` rows.

    Args:
        document: the result of `evaluate`.
        picture: returns the image of one of the document's cells, or the frames of its video, of which three are drawn.
    """
    runs = document["runs"]
    several_seeds = len({cell["seed"] for cell in runs[0]["cells"]}) > 1
    columns = [[run["name"], f"{run['nfe']['mean']:.0f} forwards, {typical(run['speedup']):.2f}x"] for run in runs]
    rows, images, captions = [], [], []
    for row in spread_over(list(zip(*(run["cells"] for run in runs), strict=True)), SHEET_ROWS):
        rows.append((row[0]["prompt"] or "") + (f" (seed {row[0]['seed']})" if several_seeds else ""))
        images.append([_still(report_html.frames_of(picture(cell))) for cell in row])
        captions.append(["reference", *(_decibels(cell["psnr"]) for cell in row[1:])])
    return contact_sheet.draw(images, captions, rows, columns)


def _still(frames: list[Any]) -> Any:
    """A picture as it is; of a video, the first, the middle and the last frame side by side."""
    if len(frames) == 1:
        return frames[0]
    from PIL import Image

    width, height = frames[0].size
    still = Image.new("RGB", (3 * width, height))
    for number, frame in enumerate((frames[0], frames[len(frames) // 2], frames[-1])):
        still.paste(frame, (number * width, 0))
    return still


def _decibels(value: float | None) -> str:
    return "identical" if value is None else f"{value:.1f} dB"


def write(document: Mapping[str, Any], directory: str | Path) -> list[Path]:
    """Write `report.html`, `contact_sheet.png` and `results.json` to the directory that was given to `compare`."""
    directory = Path(directory)
    paths = [directory / name for name in ("report.html", "contact_sheet.png", "results.json")]
    files.write(paths[2], to_json(document))
    report_html.write(directory)
    settings = {key: value for key, value in document.items() if key != "runs"}
    settings["runs"] = [
        {key: run[key] for key in ("name", "cache_backend", "cache_config", "steps")} for run in document["runs"]
    ]
    write_png(sheet(document, report_html.pictures_in(directory)), paths[1], settings)
    return paths


def to_json(document: Mapping[str, Any]) -> str:
    """Return the document as JSON text: indented, with each list of numbers on one line."""
    text = json.dumps(document, indent=1, allow_nan=False)
    return re.sub(r"\[[-\d\s.,eE+nul]*\]", lambda found: " ".join(found[0].split()), text) + "\n"
