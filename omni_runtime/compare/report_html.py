"""The report of a comparison: one HTML file, made of results.json and the pictures beside it, and of nothing else.

    report_html.write("out/compare")                 # reads results.json there, writes report.html
    html = report_html.render(document, picture)     # the same in memory

The page has no scripts and fetches nothing: pictures are data URIs, plots inline SVG, and its content security policy
forbids the rest. It follows the reader's light or dark setting, and prints.

It shows, for `document` as `omni_runtime.compare.comparison.evaluate` returns it: a table of all measures; two plots
of PSNR, over speedup and over NFE, with a line per method; for each run which steps were computed, and what its
distances were beside the threshold; and for each prompt and seed the pictures, with their differences
from the reference.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Document = Mapping[str, Any]
Picture = Callable[[Mapping[str, Any]], Any]

#: Differences are shown this many times as large, and clipped at white.
GAIN = 8

#: Pictures up to this size are shown as they are; larger ones are reduced to it.
LONGEST = 320

#: Prompts and seeds whose pictures are shown: so many at most, spread over all, and fewer where there are many runs.
ROWS, PICTURES = 24, 480

#: Width of a character of the plots' labels, in px: an upper estimate, so that no two labels meet.
CHARACTER = 6.6

#: One per method, in turn. The first is for plain sampling.
COLOURS = ("#7d8590", "#1f77b4", "#d9541e", "#159f78", "#b85fa6", "#d99a00", "#5b6ee1", "#a0522d", "#0aa5b5", "#c23b5b")
MARKS = (
    "M-4,-4L4,4M-4,4L4,-4",
    "M0,-4.5A4.5,4.5 0 1 1 0,4.5A4.5,4.5 0 1 1 0,-4.5Z",
    "M-4,-4H4V4H-4Z",
    "M0,-5.5L5,4H-5Z",
    "M0,-5.5L5.5,0L0,5.5L-5.5,0Z",
    "M0,5.5L5,-4H-5Z",
)


def write(directory: str | Path) -> Path:
    """Write `report.html` beside the results.json of a comparison. Returns its path."""
    directory = Path(directory)
    document = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    path = directory / "report.html"
    path.write_text(render(document, pictures_in(directory)), encoding="utf-8")
    return path


def pictures_in(directory: str | Path) -> Picture:
    """A cell of results.json → its picture (PIL), from the file that the cell names."""

    @functools.lru_cache(maxsize=64)
    def read(path: Path) -> Any:
        from PIL import Image

        with Image.open(path) as image:
            return image.convert("RGB")

    return lambda cell: read(Path(directory) / cell["image"])


def render(document: Document, picture: Picture) -> str:
    """The page.

    Args:
        document: what results.json holds; its first run is the reference.
        picture: a cell of it → the image (PIL).
    """
    title = f"{document.get('model', 'Comparison')}: what each run costs, and how near it stays"
    sections = [
        ("Measures", _table(document)),
        ("Trade-off", _trade_off(document)),
        ("Steps", _timelines(document)),
        ("Pictures", _gallery(document, picture)),
        ("How it was made", _provenance(document)),
    ]
    body = "\n".join(f"<section><h2>{heading}</h2>\n{content}\n</section>" for heading, content in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{_text(title)}</title>
<style>{PLOT_STYLE}{STYLE}{_colours()}</style>
</head>
<body>
<header><h1>{_text(document.get("model", "Comparison"))}</h1>
<p>{_introduction(document)}</p></header>
{body}
</body>
</html>
"""


def _text(value: Any) -> str:
    return html.escape(str(value))


def _introduction(document: Document) -> str:
    runs = document["runs"]
    cells = runs[0]["cells"]
    prompts, seeds = len({cell["prompt"] for cell in cells}), len({cell["seed"] for cell in cells})
    return (
        f"{len(runs)} runs of {_count(prompts, 'prompt')} × {_count(seeds, 'seed')}. Each image is measured against "
        f"that of the same prompt and seed under <b>{_text(runs[0]['name'])}</b>, {runs[0]['steps']} steps. "
        "Plain sampling with fewer steps is what one gets for free: a cache has to beat it."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# Methods: a colour and a mark each


def _methods(document: Document) -> dict[str, int]:
    """Method → its number; plain sampling, which has no backend, is 0."""
    compared = document["runs"][1:]
    plain = [run["method"] for run in compared if run["cache_backend"] is None]
    others = [run["method"] for run in compared if run["cache_backend"] is not None]
    numbers = dict.fromkeys(plain, 0)
    for method in others:
        if method not in numbers:
            numbers[method] = 1 + len([number for number in numbers.values() if number])
    return numbers


def _colours() -> str:
    return "".join(f".m{number}{{color:{colour}}}" for number, colour in enumerate(COLOURS))


def _class_of(number: int) -> str:
    return f"m{number if number < len(COLOURS) else 1 + (number - 1) % (len(COLOURS) - 1)}"


def _mark(number: int, x: float = 0, y: float = 0, title: str = "") -> str:
    shape = MARKS[number if number < len(MARKS) else 1 + (number - 1) % (len(MARKS) - 1)]
    about = f"<title>{_text(title)}</title>" if title else ""
    return f'<path class="mark" transform="translate({x:.1f},{y:.1f})" d="{shape}">{about}</path>'


def _swatch(number: int) -> str:
    return f'<svg class="swatch {_class_of(number)}" viewBox="-8 -8 16 16" aria-hidden="true">{_mark(number)}</svg>'


# The table


def _table(document: Document) -> str:
    measures, methods = document["measures"], _methods(document)
    head = "".join(f"<th>{_text(one['label'])}{_unit_of_heading(one)}</th>" for one in measures.values())
    rows = []
    for number, run in enumerate(document["runs"]):
        swatch = _swatch(methods[run["method"]]) if number else ""
        cells = "".join(
            f'<td data-measure="{name}">{_statistics(run[name], one, number == 0)}</td>'
            for name, one in measures.items()
        )
        rows.append(
            f'<tr><th scope="row" title="{_text(_settings(run))}">{swatch}{_text(run["name"])}</th>{cells}</tr>'
        )
    return (
        f'<div class="wide"><table><thead><tr><th>run</th>{head}</tr></thead>\n<tbody>{"".join(rows)}</tbody></table>'
        f"</div>\n<p class=faint>{_legend_of_table(document)}</p>"
    )


def _unit_of_heading(measure: Mapping[str, Any]) -> str:
    return f" <small>{_text(measure['unit'])}</small>" if measure["unit"] in ("dB", "%") else ""


def _statistics(values: Mapping[str, Any], measure: Mapping[str, Any], of_reference: bool) -> str:
    digits = measure["digits"]
    if of_reference and not measure["cost"]:
        return "–"
    if values["mean"] is None:
        return "identical"
    unit = "×" if measure["unit"] == "×" else ""
    spread = f" <span class=faint>± {values['std']:.{digits}f}</span>" if values["std"] >= 0.5 * 10**-digits else ""
    low = "identical" if values["p5"] is None else f"{values['p5']:.{digits}f}{unit}"
    same = f", {values['identical']} identical" if values.get("identical") else ""
    return f"<b>{values['mean']:.{digits}f}{unit}</b>{spread}<small>p5 {low}{same}</small>"


def _settings(run: Mapping[str, Any]) -> str:
    config = json.dumps(run["cache_config"]) if run["cache_config"] else ""
    return f"{run['cache_backend'] or 'no cache'} {config} {run['steps']} steps".replace("  ", " ")


def _legend_of_table(document: Document) -> str:
    scales = document.get("ms_ssim_scales")
    notes = [
        "Mean ± sample standard deviation over prompts × seeds, and below the 5th percentile.",
        "NFE: transformer forwards computed.",
        f"Blocks: transformer blocks run, relative to {_text(document['runs'][0]['name'])}.",
        "Speedup: the reference's time over the run's, image by image.",
        "PSNR, SSIM and MS-SSIM are of the 8-bit pictures, in float arithmetic; latents PSNR has the range of the "
        "reference's latents.",
    ]
    if scales is not None and scales < 5:
        notes.append(f"At this size MS-SSIM has {scales} of its 5 scales.")
    if any(run[name].get("identical") for run in document["runs"][1:] for name in document["measures"]):
        notes.append("Identical images have no PSNR: they are left out of mean and deviation.")
    if document.get("lpips_missing"):
        notes.append(f"Not measured: {_text(document['lpips_missing'])}.")
    return " ".join(notes)


# The plots


AXES = {"speedup": "speedup (×)", "nfe": "NFE: transformer forwards computed per image"}
WIDTH, HEIGHT = 560, 380
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 14, 42


def _trade_off(document: Document) -> str:
    methods = _methods(document)
    entries = "".join(f"<li>{_swatch(number)}{_text(method)}</li>" for method, number in methods.items())
    plots = "".join(
        f"<figure>{_plot(document, name)}<figcaption class=faint>Up and to the {side} is better.</figcaption></figure>"
        for name, side in (("speedup", "right"), ("nfe", "left"))
    )
    identical = [run["name"] for run in document["runs"][1:] if run["psnr"]["mean"] is None]
    note = f"<p>Identical to the reference, and not drawn: {_text(', '.join(identical))}.</p>" if identical else ""
    return (
        f"<p>PSNR against the reference in dB, mean and standard deviation (bars); runs of one method are joined.</p>"
        f'<ul class="legend">{entries}</ul><div class="plots">{plots}</div>{note}'
    )


def _plot(document: Document, measure: str) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="PSNR over {_text(measure)}">'
        f"{_plot_parts(document, measure)}</svg>"
    )


def _plot_parts(document: Document, measure: str) -> str:
    methods = _methods(document)
    reference = document["runs"][0]
    runs = [run for run in document["runs"][1:] if run["psnr"]["mean"] is not None]
    points = [(run[measure]["mean"], run["psnr"]["mean"], run["psnr"]["std"]) for run in runs]
    low_x, high_x, ticks_x = _axis([x for x, _, _ in points] + [reference[measure]["mean"]])
    low_y, high_y, ticks_y = _axis([y + sign * std for _, y, std in points for sign in (-1, 1)] or [0, 1])

    def place_x(value: float) -> float:
        return LEFT + (value - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def place_y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    parts = [_grid(ticks_x, ticks_y, place_x, place_y, AXES[measure])]
    x = place_x(reference[measure]["mean"])
    parts.append(
        f'<line class="reference" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
        f"<title>{_text(reference['name'])}</title></line>"
    )
    for method, number in methods.items():
        chosen = sorted(point for run, point in zip(runs, points, strict=True) if run["method"] == method)
        line = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y, _ in chosen)
        bars = "".join(_bar(place_x(x), place_y(y - std), place_y(y + std)) for x, y, std in chosen)
        parts.append(f'<g class="{_class_of(number)}"><polyline class="method" points="{line}"/>{bars}</g>')
    places = [(place_x(x), place_y(y)) for x, y, _ in points]
    for run, (x, y) in zip(runs, places, strict=True):
        about = f"{run['name']}: {run[measure]['mean']:.2f}, {run['psnr']['mean']:.1f} ± {run['psnr']['std']:.1f} dB"
        number = methods[run["method"]]
        parts.append(f'<g class="point {_class_of(number)}">{_mark(number, x, y, about)}</g>')
    parts.append(_labels([run["name"] for run in runs], places))
    return "".join(parts)


def plot_svg(document: Document, measure: str = "speedup") -> str:
    """PSNR over `measure` ("speedup" or "nfe") as an SVG file of its own, with a key of the methods below."""
    methods = _methods(document)
    longest = 30 + 6.5 * max(map(len, methods), default=0)  # the mark, and a name's letters at their widest
    columns, line = max(1, int((WIDTH - LEFT) / longest)), 20
    height = HEIGHT + line * math.ceil(len(methods) / columns) + 8
    key = []
    for place, (method, number) in enumerate(methods.items()):
        x, y = LEFT + place % columns * (WIDTH - LEFT) / columns, HEIGHT + 14 + place // columns * line
        key.append(f'<g class="{_class_of(number)}">{_mark(number, x, y)}</g>')
        key.append(f'<text class="name" x="{x + 10:.1f}" y="{y + 4}">{_text(method)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f"<style>{PLOT_STYLE}{_colours()}</style>"
        f'<rect class="paper" width="100%" height="100%"/>{_plot_parts(document, measure)}{"".join(key)}</svg>\n'
    )


def _bar(x: float, low: float, high: float) -> str:
    path = f"M{x:.1f},{low:.1f}V{high:.1f}M{x - 3:.1f},{low:.1f}h6M{x - 3:.1f},{high:.1f}h6"
    return f'<path class="spread" d="{path}"/>'


def _axis(values: Sequence[float], wanted: int = 6) -> tuple[float, float, list[float]]:
    """Where an axis begins and ends, with some room around the values, and its ticks: round numbers, evenly spaced."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or max(abs(high) * 0.05, 0.05)
    low, high = low - room, high + room
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step)
    return low, high, [round((first + n) * step, 10) for n in range(math.floor(high / step) - first + 1)]


def _grid(
    ticks_x: Sequence[float],
    ticks_y: Sequence[float],
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
    label: str,
) -> str:
    floor = HEIGHT - BOTTOM
    parts = [f'<path class="frame" d="M{LEFT},{TOP}V{floor}H{WIDTH - RIGHT}"/>']
    for tick in ticks_x:
        x = place_x(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{floor}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 15}" text-anchor="middle">{tick:g}</text>')
    for tick in ticks_y:
        y = place_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{_text(label)}</text>')
    parts.append(f'<text class="axis" x="{LEFT + 6}" y="{TOP + 6}">PSNR (dB)</text>')
    return "".join(parts)


def _labels(names: Sequence[str], places: Sequence[tuple[float, float]]) -> str:
    """A name beside each point, where it meets neither a point nor another name; else only the point's title has it."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    taken.append((LEFT, TOP - 6, LEFT + 80, TOP + 10))  # the axis's own name
    parts = []
    for name, (x, y) in zip(names, places, strict=True):
        width = len(name) * CHARACTER
        for left, base in (
            (x + 9, y + 4),
            (x - 9 - width, y + 4),
            (x - width / 2, y - 10),
            (x - width / 2, y + 18),
            (x + 7, y - 8),
            (x + 7, y + 16),
            (x - 7 - width, y - 8),
            (x - 7 - width, y + 16),
        ):
            box = (left, base - 10, left + width, base + 3)
            inside = box[0] > LEFT and box[2] < WIDTH - RIGHT and box[1] > TOP and box[3] < HEIGHT - BOTTOM
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                parts.append(f'<text class="name" x="{left:.1f}" y="{base:.1f}">{_text(name)}</text>')
                break
    return "".join(parts)


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# Which steps were computed


STRIP_WIDTH, STRIP, CURVES = 540, 14, 84


def _timelines(document: Document) -> str:
    methods = _methods(document)
    figures = []
    for number, run in enumerate(document["runs"]):
        swatch = _swatch(methods[run["method"]]) if number else ""
        threshold = "" if run["threshold"] is None else f", threshold {run['threshold']:g}"
        figures.append(
            f"<figure><figcaption>{swatch}<b>{_text(run['name'])}</b> <span class=faint>{run['nfe']['mean']:.0f} "
            f"forwards computed{threshold}</span></figcaption>{_timeline(run)}</figure>"
        )
    return (
        "<p>A row per guidance branch, a box per step: the fuller its colour, the more of the images had it computed; "
        "faint boxes were skipped in all. Below, what was measured at each step and held against the threshold (dashed "
        "line): the mean over all images, and the range between smallest and largest. What is above it is computed.</p>"
        f'<div class="timelines">{"".join(figures)}</div>'
    )


def _timeline(run: Mapping[str, Any]) -> str:
    cells = run["cells"]
    names = list(dict.fromkeys(name for cell in cells for name in cell["branches"]))
    steps = max((len(b["computed"]) for cell in cells for b in cell["branches"].values()), default=0)
    if not steps:
        return "<p class=faint>The steps of this pipeline are not known.</p>"
    left = 52
    box = (STRIP_WIDTH - left) / steps
    parts, y = [], 2.0
    for number, name in enumerate(names):
        masks = [cell["branches"][name]["computed"] for cell in cells if name in cell["branches"]]
        place = f'x="{left - 6}" y="{y + STRIP - 3}" text-anchor="end"'
        parts.append(f'<text class="branch b{number % 2}" {place}>{_text(name)}</text>')
        for step in range(steps):
            share = sum(mask[step : step + 1] == "1" for mask in masks) / len(masks)
            parts.append(
                f'<rect class="step" x="{left + step * box:.2f}" y="{y:.1f}" width="{box * 0.86:.2f}" height="{STRIP}" '
                f'fill-opacity="{0.1 + 0.9 * share:.2f}"><title>step {step}: computed in {share:.0%}</title></rect>'
            )
        y += STRIP + 3
    curves = _curves(run, names, steps, left, box, y + 4)
    y += CURVES + 8 if curves else 0
    for step in range(0, steps, max(1, round(steps / 10))):
        middle = left + (step + 0.43) * box
        parts.append(f'<text class="tick" x="{middle:.1f}" y="{y + 10:.1f}" text-anchor="middle">{step}</text>')
    height = y + 14
    return (
        f'<svg class="timeline" viewBox="0 0 {STRIP_WIDTH} {height:.0f}" role="img" '
        f'aria-label="steps of {_text(run["name"])}">{"".join(parts)}{curves}</svg>'
    )


def _curves(run: Mapping[str, Any], names: Sequence[str], steps: int, left: float, box: float, top: float) -> str:
    """What was measured at each step, a curve per branch; nothing where nothing was."""
    series = []
    for name in names:
        rows = [cell["branches"][name]["measured"] for cell in run["cells"] if name in cell["branches"]]
        at = [[row[step] for row in rows if step < len(row) and row[step] is not None] for step in range(steps)]
        if any(at):
            series.append((name, at))
    if not series:
        return ""
    threshold = run["threshold"]
    means = [sum(values) / len(values) for _, at in series for values in at if values]
    highest = max([1.15 * value for value in means] + ([1.6 * threshold] if threshold else [])) or 1.0

    def place(step: int, value: float) -> str:
        return f"{left + (step + 0.43) * box:.1f},{top + CURVES * (1 - min(value / highest, 1)):.1f}"

    end = left + steps * box
    parts = [f'<line class="grid" x1="{left}" x2="{end:.1f}" y1="{top + CURVES:.1f}" y2="{top + CURVES:.1f}"/>']
    for number, (name, at) in enumerate(series):
        known = [step for step in range(steps) if at[step]]
        upper = [place(step, max(at[step])) for step in known]
        lower = [place(step, min(at[step])) for step in reversed(known)]
        line = [place(step, sum(at[step]) / len(at[step])) for step in known]
        parts.append(f'<polygon class="range b{number % 2}" points="{" ".join(upper + lower)}"/>')
        title = f"<title>{_text(name)}</title>"
        parts.append(f'<polyline class="distance b{number % 2}" points="{" ".join(line)}">{title}</polyline>')
    for value in (0.0, threshold if threshold and threshold <= highest else highest / 1.15):
        y = top + CURVES * (1 - value / highest)
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{value:.2g}</text>')
    if threshold and threshold <= highest:
        y = top + CURVES * (1 - threshold / highest)
        parts.append(f'<line class="threshold" x1="{left}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
    return "".join(parts)


# Pictures


def _gallery(document: Document, picture: Picture) -> str:
    rows = list(zip(*(run["cells"] for run in document["runs"]), strict=True))
    most = min(ROWS, max(2, PICTURES // len(document["runs"])))
    shown = [rows[i * len(rows) // most] for i in range(most)] if len(rows) > most else rows
    several_seeds = len({row[0]["seed"] for row in rows}) > 1
    parts = [_gallery_note(document, picture(rows[0][0]), len(shown), len(rows))]
    for row in shown:
        seed = f" <span class=faint>seed {row[0]['seed']}</span>" if several_seeds else ""
        reference = picture(row[0]).convert("RGB")
        figures = "".join(
            _figure(run, cell, reference, None if number == 0 else picture(cell).convert("RGB"))
            for number, (run, cell) in enumerate(zip(document["runs"], row, strict=True))
        )
        parts.append(f'<div class="row"><h3>{_text(row[0]["prompt"] or "no prompt")}{seed}</h3>{figures}</div>')
    return "\n".join(parts)


def _gallery_note(document: Document, image: Any, shown: int, of_all: int) -> str:
    note = (
        f"Below each picture its difference from the reference, {GAIN} times as large and clipped at white, and which "
        "steps it computed, a row per guidance branch."
    )
    if shown < of_all:
        note += f" Shown are {shown} of {of_all} prompts × seeds."
    if max(image.size) > LONGEST:
        note += f" Reduced from {image.width}×{image.height}; the files have the full size."
    return f"<p>{note}</p>"


def _figure(run: Mapping[str, Any], cell: Mapping[str, Any], reference: Any, image: Any) -> str:
    if image is None:
        image, difference, words = reference, '<div class="none">reference</div>', f"{cell['seconds']:.2f} s"
    else:
        difference = _image(_difference(reference, image), f"difference of {run['name']}")
        psnr = "identical" if cell["psnr"] is None else f"{cell['psnr']:.1f} dB"
        ssim = f", SSIM {cell['ssim']:.3f}" if cell.get("ssim") is not None else ""
        words = f"{psnr}{ssim}, {cell['speedup']:.2f}×"
    about = f"{run['name']}: {cell['prompt']}"
    return (
        f'<figure class="cell">{_image(image, about)}{difference}{_strip(cell)}'
        f"<figcaption><b>{_text(run['name'])}</b><br>{words}</figcaption></figure>"
    )


def _difference(reference: Any, image: Any) -> Any:
    from PIL import Image

    a, b = (np.asarray(one).astype(np.int16) for one in (reference, image))
    return Image.fromarray((np.abs(a - b) * GAIN).clip(0, 255).astype(np.uint8))


def _image(image: Any, about: str) -> str:
    """An image as data URI: small ones as they are, enlarged pixel by pixel; large ones reduced."""
    from PIL import Image

    if max(image.size) > LONGEST:
        image = image.copy()
        image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
        kind: tuple[str, dict[str, Any]] = ("jpeg", {"quality": 90})
    else:
        kind = ("png", {"optimize": True})
    data = io.BytesIO()
    image.save(data, format=kind[0], **kind[1])
    encoded = base64.b64encode(data.getvalue()).decode()
    factor = max(1, 128 // max(image.size))
    return (
        f'<img src="data:image/{kind[0]};base64,{encoded}" alt="{_text(about)}" '
        f'width="{image.width * factor}" height="{image.height * factor}">'
    )


def _strip(cell: Mapping[str, Any]) -> str:
    """The steps of one image: a row per branch, a box per step."""
    branches = [branch["computed"] for branch in cell["branches"].values()]
    steps = max(map(len, branches), default=0)
    if not steps:
        return ""
    boxes = ""
    for row, mask in enumerate(branches):
        for kind, opacity in (("1", 1), ("0", 0.13)):
            path = "".join(f"M{step * 4},{row * 8}h3v6h-3Z" for step, one in enumerate(mask) if one == kind)
            boxes += f'<path d="{path}" fill-opacity="{opacity}"/>' if path else ""
    return (
        f'<svg class="strip" viewBox="0 0 {steps * 4} {len(branches) * 8}" preserveAspectRatio="none" role="img" '
        f'style="height:{len(branches) * 7}px" aria-label="steps computed: {_text(", ".join(branches))}">{boxes}</svg>'
    )


# How it was made


def _provenance(document: Document) -> str:
    runs = "".join(
        f"<tr><th scope=row>{_text(run['name'])}</th><td>{_text(run['cache_backend'] or '–')}</td>"
        f"<td><code>{_text(json.dumps(run['cache_config']) if run['cache_config'] else '–')}</code>"
        f"{''.join(f'<br>{_text(note)}' for note in run.get('notes') or [])}</td>"
        f"<td>{run['steps']}</td></tr>"
        for run in document["runs"]
    )
    facts = {
        "pipeline": document.get("pipeline"),
        "settings": ", ".join(f"{key} {value!r}" for key, value in (document.get("settings") or {}).items()),
        "precision": document.get("dtype"),
        "device": document.get("device"),
    }
    listed = "".join(f"<dt>{key}</dt><dd>{_text(value)}</dd>" for key, value in facts.items() if value)
    for number, sitting in enumerate(document["sittings"], 1):
        which = f"sitting {number}" if len(document["sittings"]) > 1 else "made"
        listed += f"<dt>{which}</dt><dd>{_text(_sitting(sitting))}</dd>"
    reference = document["runs"][0]["cells"]
    others = [
        base["sitting"] != cell["sitting"] and not cell.get("reference_seconds")
        for run in document["runs"][1:]
        for base, cell in zip(reference, run["cells"], strict=True)
    ]
    apart = sum(others)
    warning = (
        f'<p class="warning">{apart} of {len(others)} images were made in another sitting than their reference, '
        "which was not timed again: their speedups compare times of different sittings.</p>"
        if apart
        else ""
    )
    return (
        f"{warning}<dl>{listed}</dl>"
        '<div class="wide"><table class="settings"><thead><tr><th>run</th><th>backend</th><th>configuration</th>'
        f"<th>steps</th></tr></thead><tbody>{runs}</tbody></table></div>"
    )


def _sitting(sitting: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (sitting.get("versions") or {}).items())
    when = str(sitting.get("started", "")).replace("T", " ").replace("+00:00", " UTC")
    threads = f"{_count(sitting['threads'], 'thread')} on {_count(sitting['cpus'], 'CPU')}"
    return f"{when}, {sitting['device']}, {threads}; Python {sitting.get('python')}, {versions}"


PLOT_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --faint: #666f7a; --line: #e1e4e8;
  --panel: #f6f7f9; --accent: #1f77b4; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e6e8eb; --faint: #98a1ab;
  --line: #30363d; --panel: #1c2126; --accent: #58a6e0; } }
svg { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
.paper { fill: var(--paper); }
svg text { font-size: 11px; fill: var(--faint); }
svg text.name { fill: var(--ink); stroke: var(--paper); stroke-width: 3px; paint-order: stroke; }
svg text.axis { font-size: 12px; }
.grid { stroke: var(--line); stroke-width: 1; }
.frame { fill: none; stroke: var(--faint); stroke-width: 1; }
.reference { stroke: var(--faint); stroke-width: 1; stroke-dasharray: 2 3; }
.method { fill: none; stroke: currentColor; stroke-width: 1.5; opacity: 0.75; }
.spread { fill: none; stroke: currentColor; stroke-width: 1; opacity: 0.45; }
.mark { fill: currentColor; stroke: currentColor; stroke-width: 1.5; }
"""

STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 24px 48px; max-width: 1280px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 36px 0 8px; padding-bottom: 4px; border-bottom: 1px solid var(--line); }
h3 { font-size: 15px; margin: 18px 0 8px; width: 100%; }
p { max-width: 100ch; margin: 4px 0 12px; }
small { font-size: 12px; color: var(--faint); }
.faint { color: var(--faint); font-weight: normal; }
.warning { border-left: 3px solid #d99a00; padding-left: 10px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; min-width: 100%; }
th, td { padding: 5px 10px; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; }
thead th { color: var(--faint); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; }
td small { display: block; }
.settings td, .settings th { text-align: left; }
.settings td:nth-child(3) { white-space: normal; }
code { font: 12px/1.4 ui-monospace, "DejaVu Sans Mono", monospace; }
figure { margin: 0; }
.swatch { width: 14px; height: 14px; margin-right: 6px; vertical-align: -2px; overflow: visible; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 0; margin: 0 0 8px; list-style: none;
  font-size: 14px; }
.plots, .timelines { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr));
  gap: 20px 28px; }
svg { display: block; width: 100%; height: auto; }
svg.swatch { display: inline-block; }
.timelines figcaption { margin-bottom: 4px; }
.step { fill: var(--accent); }
.threshold { stroke: #d9541e; stroke-width: 1.2; stroke-dasharray: 5 3; }
.distance { fill: none; stroke: var(--accent); stroke-width: 1.4; }
.range { fill: var(--accent); opacity: 0.14; }
svg text.branch.b0 { fill: var(--accent); }
svg text.branch.b1 { fill: #b87f00; }
.distance.b1 { stroke: #d99a00; }
.range.b1 { fill: #d99a00; }
.row { display: flex; flex-wrap: wrap; gap: 4px 14px; break-inside: avoid; }
.cell { width: min-content; font-size: 12px; line-height: 1.35; }
.cell img, .none { display: block; max-width: 320px; margin-bottom: 4px; image-rendering: pixelated; }
.none { display: grid; place-items: center; min-width: 128px; min-height: 128px; color: var(--faint);
  background: var(--panel); }
.strip { fill: var(--accent); margin-bottom: 4px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; font-size: 12px; } .wide { overflow: visible; }
  table { font-size: 9px; } table small { font-size: 8px; } th, td { padding: 3px 4px; }
  tbody th { white-space: normal; }
  .plots, .timelines { grid-template-columns: 1fr 1fr; } figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; } }
"""
