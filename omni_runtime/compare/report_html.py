"""The report of a comparison: one HTML file, made of results.json and the pictures beside it, and of nothing else.

    report_html.write("out/compare")                 # reads results.json there, writes report.html
    html = report_html.render(document, picture)     # the same in memory

The page fetches nothing: pictures are data URIs, plots inline SVG. Videos are animated WebP, which plays in an <img>.
The page has one small script, which lays a picture over its reference; without it the pictures still show. The content
security policy allows that script, by its hash, and forbids the rest. The page follows the reader's light or dark
setting, and prints.

It shows, for `document` as `omni_runtime.compare.comparison.evaluate` returns it: a table of all measures; two plots
of PSNR, over speedup and over NFE, with a line per method; for each run which steps were computed, and what its
distances were beside the threshold; and for each prompt and seed the pictures, with their differences
from the reference. What the page looks like is in `templates`; here is what it shows, and where.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from omni_runtime import files
from omni_runtime.compare import cells, labels
from omni_runtime.generation import video

Document = Mapping[str, Any]
Picture = Callable[[Mapping[str, Any]], Any]

#: Differences are shown this many times as large, and clipped at white.
GAIN = 8

#: dB. The verdict names the fastest run whose mean PSNR is at least this.
GOOD = 40

#: Measures of time. One disturbed image moves their mean, so their median is shown.
TIMES = ("seconds", "speedup")
#: Measures of which less is better.
LESS = ("nfe", "blocks", "seconds", "lpips")

#: Pictures up to this size are shown as they are; larger ones are reduced to it.
LONGEST = 320

#: Prompts and seeds whose pictures are shown: so many at most, fewer where there are many runs, but the worst of each.
ROWS, PICTURES = 24, 480

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
    document = files.read_object(directory / "results.json", files.JOURNAL_BYTES)
    path = directory / "report.html"
    files.write(path, render(document, pictures_in(directory)))
    return path


def pictures_in(directory: str | Path) -> Picture:
    """A cell of results.json → its picture (PIL), or its video's list of frames, from the file that the cell names."""

    @functools.lru_cache(maxsize=64)
    def read(path: Path) -> Any:
        frames = cells.frames_of(path)
        return frames if path.suffix in video.SUFFIXES else frames[0]

    return lambda cell: read(Path(directory) / cell["image"])


def frames_of(picture: Any) -> list[Any]:
    """The frames of what a `Picture` returns: one for a picture."""
    return list(picture) if isinstance(picture, list | tuple) else [picture]


def render(document: Document, picture: Picture) -> str:
    """The page.

    Args:
        document: what results.json holds; its first run is the reference.
        picture: a cell of it → the image (PIL), or the frames of a video.
    """
    runs = document["runs"]
    rows = list(zip(*(run["cells"] for run in runs), strict=True))
    others = [
        row[0]["sitting"] != cell["sitting"] and not cell.get("reference_seconds") for row in rows for cell in row[1:]
    ]
    worst = _worst(rows)
    script = _templates().get_template("report.js").render()
    shown = {
        "document": document,
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "methods": _methods(document),
        "prompts": len({row[0]["prompt"] for row in rows}),
        "seeds": len({row[0]["seed"] for row in rows}),
        "some_identical": any(run[name].get("identical") for run in runs[1:] for name in document["measures"]),
        "identical": [run["name"] for run in runs[1:] if run["psnr"]["mean"] is None],
        "plots": [_plot(document, measure) for measure in AXES],
        "timelines": [(run, _timeline(run)) for run in runs],
        "gallery": _gallery(runs, rows, worst, picture),
        "worst": [(run, rows[row][run]) for run, row in enumerate(worst) if row is not None],
        "columns": _columns(len(runs)),
        "images": len(rows),
        "size": frames_of(picture(rows[0][0]))[0].size,
        "frames": len(frames_of(picture(rows[0][0]))),
        "gain": GAIN,
        "longest": LONGEST,
        "facts": _facts(document),
        "best": _best(document),
        "verdict": _verdict(document),
        "good": GOOD,
        "apart": sum(others),
        "compared": len(others),
    }
    return _templates().get_template("report.html.j2").render(shown)


def plot_svg(document: Document, measure: str = "speedup") -> str:
    """PSNR over `measure` ("speedup" or "nfe") as an SVG file of its own, with a key of the methods below.

    Names that have no room are left out: it has no list of numbers and names.
    """
    methods = _methods(document)
    longest = 30 + max(map(labels.width, methods), default=0)  # the mark, and the name
    columns, line = max(1, int((WIDTH - LEFT) / longest)), 20
    key = [
        (method, number, LEFT + place % columns * (WIDTH - LEFT) / columns, HEIGHT + 14 + place // columns * line)
        for place, (method, number) in enumerate(methods.items())
    ]
    height = HEIGHT + line * math.ceil(len(methods) / columns) + 8
    template = _templates().get_template("plot_alone.svg.j2")
    plot = _plot(document, measure)
    plot["names"] = [label for label in plot["names"] if not label.numbered]
    return template.render(plot=plot, key=key, height=height)


@functools.cache
def _templates() -> jinja2.Environment:
    """The templates. All text in them is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("omni_runtime.compare"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["palette"] = COLOURS
    environment.filters |= {
        "px": lambda value: f"{value:.1f}",
        "json": json.dumps,
        "counted": _counted,
        "middle": _middle,
        "kind": lambda number: f"m{_turn(number, len(COLOURS))}",
        "shape": lambda number: MARKS[_turn(number, len(MARKS))],
    }
    return environment


def _counted(number: int, noun: str) -> str:
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


def _turn(number: int, count: int) -> int:
    """`number`, begun again at 1 where there are only `count`."""
    return number if number < count else 1 + (number - 1) % (count - 1)


# The plots

AXES = {"speedup": "speedup (×)", "nfe": "NFE: transformer forwards computed per image"}
WIDTH, HEIGHT = 560, 380
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 14, 42


def typical(statistics: Mapping[str, Any]) -> float:
    """The median of times and speedups. Results from before medians were kept have means only."""
    found: float = statistics.get("median", statistics["mean"])
    return found


def _middle(run: Mapping[str, Any], measure: str) -> Any:
    """What is shown for a run's measure: the median of times, else the mean; None for PSNR if all are identical."""
    return typical(run[measure]) if measure in TIMES else run[measure]["mean"]


def _plot(document: Document, measure: str) -> dict[str, Any]:
    """PSNR over a measure: every coordinate in px."""
    methods = _methods(document)
    reference = document["runs"][0]
    runs = [run for run in document["runs"][1:] if run["psnr"]["mean"] is not None]
    points = [(_middle(run, measure), run["psnr"]["mean"], run["psnr"]["std"]) for run in runs]
    low_x, high_x, ticks_x = _axis([x for x, _, _ in points] + [_middle(reference, measure)])
    low_y, high_y, ticks_y = _axis([y + sign * std for _, y, std in points for sign in (-1, 1)] or [0, 1])

    def place_x(value: float) -> float:
        return LEFT + (value - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def place_y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    lines = []
    for method, number in methods.items():
        chosen = sorted(point for run, point in zip(runs, points, strict=True) if run["method"] == method)
        lines.append((number, [(place_x(x), place_y(y), place_y(y - s), place_y(y + s)) for x, y, s in chosen]))
    places = [(place_x(x), place_y(y)) for x, y, _ in points]
    frame = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
    own = (LEFT, TOP - 6, LEFT + 80, TOP + 10)  # where the axis's own name is
    # The reference and presets come first: their names have the room that there is.
    presets = [place for place, run in enumerate(runs) if run["cache_backend"] == "auto"]
    order = presets + [place for place in range(len(runs)) if place not in presets]
    names = [reference["name"] + (" = auto, exact" if presets else ""), *(runs[place]["name"] for place in order)]
    foot = place_x(_middle(reference, measure)), HEIGHT - BOTTOM - 10.0
    favoured = 1 + len(presets)
    found = labels.place(names, [foot, *(places[place] for place in order)], frame, [own], 0, favoured)
    named = sorted(
        (dataclasses.replace(one, point=order[one.point - 1]) for one in found if one.point), key=lambda one: one.point
    )
    return {
        "measure": measure,
        "label": AXES[measure],
        "better": "left" if measure == "nfe" else "right",
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "floor": HEIGHT - BOTTOM,
        "ticks_x": [(place_x(tick), f"{tick:g}") for tick in ticks_x],
        "ticks_y": [(place_y(tick), f"{tick:g}") for tick in ticks_y],
        "reference": place_x(_middle(reference, measure)),
        "reference_name": names[0],
        "reference_label": next((one for one in found if one.point == 0 and not one.numbered), None),
        "lines": lines,
        "points": [
            (methods[run["method"]], *place, f"{run['name']}: {x:.2f}, {y:.1f} ± {std:.1f} dB")
            for run, place, (x, y, std) in zip(runs, places, points, strict=True)
        ],
        "names": named,
        "numbered": [
            (label.text, runs[label.point]["name"], methods[runs[label.point]["method"]])
            for label in named
            if label.numbered
        ],
    }


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


# Which steps were computed

STRIP_WIDTH, STRIP, CURVES, NAMES = 540, 14, 84, 52


def _timeline(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """A row of boxes per branch, and curves below; every coordinate in px. None where the steps are not known."""
    cells = run["cells"]
    names = list(dict.fromkeys(name for cell in cells for name in cell["branches"]))
    steps = max((len(b["computed"]) for cell in cells for b in cell["branches"].values()), default=0)
    if not steps:
        return None
    box = (STRIP_WIDTH - NAMES) / steps
    branches, y = [], 2.0
    for name in names:
        masks = [cell["branches"][name]["computed"] for cell in cells if name in cell["branches"]]
        shares = [sum(mask[step : step + 1] == "1" for mask in masks) / len(masks) for step in range(steps)]
        boxes = [(NAMES + step * box, share) for step, share in enumerate(shares)]
        branches.append({"name": name, "y": y, "boxes": boxes})
        y += STRIP + 3
    curves = _curves(run, names, steps, box, y + 4)
    return {
        "width": STRIP_WIDTH,
        "height": y + (CURVES + 8 if curves else 0) + 14,
        "left": NAMES,
        "end": NAMES + steps * box,
        "strip": STRIP,
        "box": box,
        "branches": branches,
        "curves": curves,
        "ticks": [(NAMES + (step + 0.43) * box, step) for step in range(0, steps, max(1, round(steps / 10)))],
    }


def _curves(run: Mapping[str, Any], names: Sequence[str], steps: int, box: float, top: float) -> dict[str, Any] | None:
    """What was measured at each step, a curve per branch; None where nothing was."""
    series = []
    for name in names:
        rows = [cell["branches"][name]["measured"] for cell in run["cells"] if name in cell["branches"]]
        at = [[row[step] for row in rows if step < len(row) and row[step] is not None] for step in range(steps)]
        if any(at):
            series.append((name, at))
    if not series:
        return None
    threshold = run["threshold"]
    means = [sum(values) / len(values) for _, at in series for values in at if values]
    highest = max([1.15 * value for value in means] + ([1.6 * threshold] if threshold else [])) or 1.0
    crossed = threshold if threshold and threshold <= highest else None

    def height(value: float) -> float:
        return top + CURVES * (1 - min(value / highest, 1))

    def path(places: Sequence[tuple[int, float]]) -> str:
        return " ".join(f"{NAMES + (step + 0.43) * box:.1f},{height(value):.1f}" for step, value in places)

    drawn = []
    for name, at in series:
        known = [(step, values) for step, values in enumerate(at) if values]
        line = [(step, sum(values) / len(values)) for step, values in known]
        edge = [(step, max(values)) for step, values in known] + [(step, min(values)) for step, values in known[::-1]]
        drawn.append((name, path(line), path(edge)))
    return {
        "series": drawn,
        "floor": top + CURVES,
        "ticks": [(height(value), f"{value:.2g}") for value in (0.0, crossed or highest / 1.15)],
        "threshold": None if crossed is None else height(crossed),
    }


# Pictures


def _gallery(
    runs: Sequence[Mapping[str, Any]],
    rows: Sequence[Sequence[Mapping[str, Any]]],
    worst: Sequence[int | None],
    picture: Picture,
) -> list[list[dict[str, Any]]]:
    """For each prompt and seed that is shown, every run's picture and its difference from the first run's."""
    most = max(min(ROWS, max(2, PICTURES // len(runs))), len({row for row in worst if row is not None}))
    gallery = []
    for number in _worst_first(len(rows), worst)[:most]:
        images = [[frame.convert("RGB") for frame in frames_of(picture(cell))] for cell in rows[number]]
        differences = [None, *(_image(_difference(images[0], image)) for image in images[1:])]
        shown = zip(runs, rows[number], worst, images, differences, strict=True)
        gallery.append(
            [
                {"run": run, "cell": cell, "worst": row == number, "image": _image(image), "difference": difference}
                for run, cell, row, image, difference in shown
            ]
        )
    return gallery


def _columns(pictures: int) -> int:
    """How many pictures a line has on paper: 6 at most, and so that none is alone on the last line."""
    return next((columns for columns in range(min(6, pictures), 1, -1) if pictures % columns != 1), 1)


def _worst(rows: Sequence[Sequence[Mapping[str, Any]]]) -> list[int | None]:
    """For each run, the row of its worst picture, by PSNR: None where all are identical, as the reference's are."""

    def row_of(run: int) -> int | None:
        measured = [(row[run]["psnr"], number) for number, row in enumerate(rows) if row[run]["psnr"] is not None]
        return min(measured)[1] if measured else None

    return [None, *(row_of(run) for run in range(1, len(rows[0])))]


def _worst_first(count: int, worst: Sequence[int | None]) -> list[int]:
    """The order of `count` rows: first those with the worst picture of a run, in the order of the runs."""
    return list(dict.fromkeys([*(row for row in worst if row is not None), *range(count)]))


def _best(document: Document) -> dict[str, list[str]]:
    """Measure → the runs with the best value; the reference is not among them."""
    best = {}
    for name in document["measures"]:
        middles = {run["name"]: _middle(run, name) for run in document["runs"][1:]}
        values = {run: math.inf if value is None else value for run, value in middles.items()}
        wanted = (min if name in LESS else max)(values.values(), default=None)
        best[name] = [run for run, value in values.items() if value == wanted]
    return best


def _verdict(document: Document) -> str:
    """The fastest run at `GOOD` dB or more, or else the one nearest to the reference. The page states this rule."""
    runs = document["runs"][1:]
    if not runs:
        return ""

    def psnr(run: Mapping[str, Any]) -> float:
        return math.inf if run["psnr"]["mean"] is None else run["psnr"]["mean"]

    good = [run for run in runs if psnr(run) >= GOOD]
    run = max(good, key=lambda run: typical(run["speedup"])) if good else max(runs, key=psnr)
    near = "and its pictures are identical" if math.isinf(psnr(run)) else f"at {psnr(run):.1f} dB"
    missed = "" if good else f" No run has {GOOD} dB; this one is the nearest."
    return f"{run['name']} is {typical(run['speedup']):.2f}× as fast as {document['runs'][0]['name']}, {near}.{missed}"


def _difference(reference: Sequence[Any], images: Sequence[Any]) -> list[Any]:
    from PIL import Image

    a, b = (np.stack([np.asarray(one) for one in frames]).astype(np.int16) for frames in (reference, images))
    return [Image.fromarray(frame) for frame in (np.abs(a - b) * GAIN).clip(0, 255).astype(np.uint8)]


def _image(frames: Sequence[Any]) -> dict[str, Any]:
    """A picture or video as data URI: small ones as they are, enlarged pixel by pixel; large ones reduced."""
    from PIL import Image

    width, height = frames[0].size
    large = max(width, height) > LONGEST
    if large:
        frames = [frame.copy() for frame in frames]
        for frame in frames:
            frame.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
        width, height = frames[0].size
    if len(frames) > 1:
        kind, data = "webp", video.webp(frames, video.FPS, exact=not large)
    else:
        kind = "jpeg" if large else "png"
        buffer = io.BytesIO()
        frames[0].save(buffer, format=kind, **({"quality": 90} if large else {"optimize": True}))
        data = buffer.getvalue()
    factor = max(1, 128 // max(width, height))
    return {
        "uri": f"data:image/{kind};base64,{base64.b64encode(data).decode()}",
        "width": width * factor,
        "height": height * factor,
    }


# How it was made


def _facts(document: Document) -> list[tuple[str, Any]]:
    facts = {
        "pipeline": document.get("pipeline"),
        "settings": ", ".join(f"{key} {value!r}" for key, value in (document.get("settings") or {}).items()),
        "precision": document.get("dtype"),
        "device": document.get("device"),
    }
    listed = [(name, fact) for name, fact in facts.items() if fact]
    sittings = document["sittings"]
    for number, sitting in enumerate(sittings, 1):
        listed.append((f"sitting {number}" if len(sittings) > 1 else "made", _sitting(sitting)))
    return listed


def _sitting(sitting: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (sitting.get("versions") or {}).items())
    when = str(sitting.get("started", "")).replace("T", " ").replace("+00:00", " UTC")
    threads = f"{_counted(sitting['threads'], 'thread')} on {_counted(sitting['cpus'], 'CPU')}"
    return f"{when}, {sitting['device']}, {threads}; Python {sitting.get('python')}, {versions}"
