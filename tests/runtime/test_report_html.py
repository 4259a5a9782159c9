"""The report: what is in it, and how a browser shows it."""

import base64
import hashlib
import math
import os
import random
from collections.abc import Iterator
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import pytest
from PIL import Image

from omni_runtime.compare import comparison as compare
from omni_runtime.compare import labels, report_html, showing

RUNS = (
    ("no cache", "fewer steps", None, 12),
    ("6 steps", "fewer steps", None, 6),
    ("4 steps", "fewer steps", None, 4),
    ("loose <b>", "tea_cache", "tea_cache", 12),
    ("tight", "tea_cache", "tea_cache", 12),
    ("DBCache, the one with a long name", "cache_dit", "cache_dit", 12),
    ("identical", "theirs", "the other library", 12),
)
MEASURED = ("nfe", "blocks", "seconds", "speedup", "psnr", "ssim", "ms_ssim", "latents_psnr")
PROMPTS = ("a cat & a dog", "a castle", "a very long prompt about a lighthouse that stands in a storm, oil on canvas")


def cell(run: int, prompt: str, seed: int, steps: int, directory: Path, size: int) -> dict[str, Any]:
    """One image's entry, with its picture on disk."""
    chance = random.Random(f"{run} {prompt} {seed}")
    path = directory / "cells" / f"{run}-{PROMPTS.index(prompt)}-{seed}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (60 + 20 * run, 90, 40 * seed)).save(path)
    mask = "1" + "".join(chance.choice("01") for _ in range(steps - 1)) if run > 2 else "1" * steps
    measured = (
        [None, *(round(chance.uniform(0, 0.2), 3) for _ in range(steps - 1))] if run in (3, 4, 5) else [None] * steps
    )
    psnr = None if run in (0, 6) else chance.uniform(18, 40) - run
    return {
        "prompt": prompt,
        "seed": seed,
        "image": f"cells/{path.name}",
        "nfe": 2 * mask.count("1"),
        "blocks": 100 * mask.count("1") / 12,
        "seconds": 0.5 + 0.1 * mask.count("1"),
        "speedup": 1.7 / (0.5 + 0.1 * mask.count("1")),
        "psnr": psnr,
        "ssim": 0.9,
        "ms_ssim": 0.95,
        "latents_psnr": psnr,
        "branches": {name: {"computed": mask, "measured": measured} for name in ("cond", "uncond")},
        "sitting": int(run == 5),
    }


def document_in(directory: Path, size: int = 64, seeds: int = 2) -> dict[str, Any]:
    """What `evaluate` returns, of invented numbers; results.json and the pictures are in `directory`."""
    runs = []
    for number, (name, method, backend, steps) in enumerate(RUNS):
        cells = [cell(number, p, seed, steps, directory, size) for p in PROMPTS for seed in range(seeds)]
        values = {
            measure: compare.statistics_of([math.inf if one[measure] is None else one[measure] for one in cells])
            for measure in MEASURED
        }
        config = {"rel_l1_thresh": 0.1 * number} if backend else None
        about = {"name": name, "method": method, "cache_backend": backend, "cache_config": config, "steps": steps}
        runs.append(about | {"threshold": 0.12 if number in (3, 4, 5) else None, **values, "cells": cells})
    sitting = {
        "started": "2026-01-02T03:04:05+00:00", "device": "a processor", "cpus": 2, "threads": 1, "python": "3.11",
        "versions": {"omni-kernels": "0.1.0"},
    }  # fmt: skip
    document = {
        "model": "a <model>",
        "pipeline": "QwenImagePipeline",
        "settings": {"height": size, "width": size},
        "measures": {name: asdict(compare.MEASURES[name]) for name in MEASURED},
        "ms_ssim_scales": 3,
        "lpips_missing": "LPIPS needs the package lpips",
        "sittings": [sitting, sitting | {"started": "2026-01-03T03:04:05+00:00"}],
        "runs": runs,
    }
    (directory / "results.json").write_text(showing.to_json(document))
    return document


class Elements(HTMLParser):
    """The elements of a page, each with its attributes and the texts directly in it, in the order of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.all.append((tag, {name: value or "" for name, value in attributes}, []))

    def handle_endtag(self, tag: str) -> None:
        self.all.append(("", {}, []))  # the text that follows belongs to none

    def handle_data(self, data: str) -> None:
        if self.all:
            self.all[-1][2].append(data)

    def named(self, tag: str) -> list[dict[str, str]]:
        """The attributes of the elements of this name."""
        return [attributes for name, attributes, _ in self.all if name == tag]


# What is in it


def test_the_page_is_made_of_results_and_pictures_alone(tmp_path: Path) -> None:
    document = document_in(tmp_path)
    path = report_html.write(tmp_path)
    text = path.read_text()
    assert text == report_html.render(document, report_html.pictures_in(tmp_path))
    assert "a &lt;model&gt;" in text
    assert "loose <b>" not in text, "names are escaped"
    assert "http" not in text.replace("http-equiv", "")
    assert f"{report_html.GAIN} times as large" in text


def test_a_picture_is_a_button_that_names_its_reference(tmp_path: Path) -> None:
    document = document_in(tmp_path)
    elements = Elements(report_html.render(document, report_html.pictures_in(tmp_path)))
    images = elements.named("img")
    references = {image["id"]: image for image in images if "id" in image}
    buttons = [button for button in elements.named("button") if "data-reference" in button]
    rows = len(document["runs"][0]["cells"])
    assert len(references) == rows
    assert len(buttons) == rows * (len(RUNS) - 1)
    assert all(button["type"] == "button" for button in buttons)
    for button in buttons:
        name, _, where = button["aria-label"].partition(" over no cache: ")
        assert name in [run[0] for run in RUNS[1:]]
        assert references[button["data-reference"]]["alt"] == f"no cache: {where}"
    assert all(image["alt"] for image in images)
    ids = [attributes["id"] for _, attributes, _ in elements.all if "id" in attributes]
    assert len(ids) == len(set(ids))
    (dialog,) = elements.named("dialog")
    assert set(dialog["aria-labelledby"].split()) <= set(ids)
    (slider,) = elements.named("input")
    assert slider["type"] == "range"
    assert slider["aria-label"]


def test_each_picture_is_in_the_page_once(tmp_path: Path) -> None:
    document = document_in(tmp_path)
    text = report_html.render(document, report_html.pictures_in(tmp_path))
    assert text.count("data:image/") == len(Elements(text).named("img")) == text.count('loading="lazy"')


def test_the_only_script_is_the_one_that_the_policy_allows(tmp_path: Path) -> None:
    document_in(tmp_path)
    elements = Elements(report_html.write(tmp_path).read_text())
    (script,) = ["".join(texts) for tag, _, texts in elements.all if tag == "script"]
    (policy,) = [meta["content"] for meta in elements.named("meta") if "http-equiv" in meta]
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy
    assert not [name for _, attributes, _ in elements.all for name in attributes if name.startswith("on")]


def test_the_verdict_is_of_the_fastest_good_run_or_else_the_nearest(tmp_path: Path) -> None:
    document = document_in(tmp_path)
    pictures = report_html.pictures_in(tmp_path)
    for run in document["runs"][1:]:
        run["psnr"] = run["psnr"] | {"mean": 39.0}
    document["runs"][2]["psnr"]["mean"] = 39.5
    assert "4 steps is " in report_html.render(document, pictures).partition('class="verdict">')[2][:12]
    assert "at 39.5 dB. No run has 40 dB; this one is the nearest.</p>" in report_html.render(document, pictures)
    for number, speedup in ((1, 1.5), (4, 1.75), (3, 3.0)):
        document["runs"][number]["psnr"]["mean"] = 39.9 if number == 3 else 41.0
        document["runs"][number]["speedup"]["median"] = speedup
    text = report_html.render(document, pictures)
    assert "tight is 1.75× as fast as no cache, at 41.0 dB.</p>" in text
    (rule,) = ["".join(texts) for _, about, texts in Elements(text).all if about.get("class") == "rule"]
    assert "the fastest of those with a mean PSNR of 40 dB or more" in rule
    assert "At 40 dB, the pixels are off by 1% of their range" in " ".join(rule.split())
    document["runs"][6]["psnr"]["mean"], document["runs"][6]["speedup"]["median"] = None, 9.0
    assert "identical is 9.00× as fast as no cache, and its pictures are identical.</p>" in report_html.render(
        document, pictures
    )


def test_the_worst_picture_of_each_run_is_marked_and_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = document_in(tmp_path)
    rows = list(zip(*(run["cells"] for run in document["runs"]), strict=True))
    for run in range(1, 6):
        rows[4 if run < 3 else 2][run]["psnr"] = 1.5
    assert report_html._worst(rows) == [None, 4, 4, 2, 2, 2, None], "of the reference and of what is identical, none is"
    assert report_html._worst_first(6, [None, 4, 4, 2]) == [4, 2, 0, 1, 3, 5]
    rows[1][5]["psnr"] = 0.5
    monkeypatch.setattr(report_html, "ROWS", 1)
    text = report_html.render(document, report_html.pictures_in(tmp_path))
    assert "Shown are 3 of 6 prompts × seeds" in text, "the worst of each run are always shown"
    shown = [part.partition("</figure>")[0] for part in text.split("<figure class=")[1:]]
    marked = [
        f"{number // 7}: {RUNS[number % 7][0]}" for number, part in enumerate(shown) if "worst of this run" in part
    ]
    names = ["0: 6 steps", "0: 4 steps", "1: loose <b>", "1: tight", "2: DBCache, the one with a long name"]
    assert marked == names
    links = {element["href"] for element in Elements(text).named("a") if element["href"].startswith("#worst-")}
    assert links == {f"#worst-{run}" for run in range(1, 6)}
    assert [figure["id"] for figure in Elements(text).named("figure") if "id" in figure] == [
        f"worst-{run}" for run in range(1, 6)
    ]


def test_the_best_of_each_column_is_marked(tmp_path: Path) -> None:
    document = document_in(tmp_path)
    document["runs"][0]["seconds"]["mean"] = 0.0  # the reference is never the best
    document["runs"][2]["seconds"]["mean"] = 0.1
    assert report_html._best(document)["seconds"] == ["4 steps"]
    assert report_html._best(document)["psnr"] == ["identical"]
    document["measures"]["lpips"] = document["measures"]["ssim"]
    for number, run in enumerate(document["runs"]):
        run["lpips"] = run["ssim"] | {"mean": 0.3 - 0.01 * number}
    assert report_html._best(document)["lpips"] == ["identical"], "of LPIPS, less is better"
    assert set(document["measures"]) == {*MEASURED, "lpips"}
    text = report_html.render(document, report_html.pictures_in(tmp_path))
    assert text.count('class="best"') == sum(map(len, report_html._best(document).values()))
    assert text.count("<img") == text.count('loading="lazy"') > 0
    anchors = [part.partition('"')[0] for part in text.split('href="#')[1:]]
    assert anchors
    assert all(f'id="{anchor}"' in text for anchor in anchors)


def test_times_of_several_sittings_are_said_to_be(tmp_path: Path) -> None:
    document = document_in(tmp_path)
    text = report_html.render(document, report_html.pictures_in(tmp_path))
    assert "6 of 36 images were made in another sitting than their reference" in text
    assert "2026-01-03 03:04:05 UTC, a processor, 1 thread on 2 CPUs" in text
    for run in document["runs"]:
        for one in run["cells"]:
            one["reference_seconds"] = 0.5 if one["sitting"] else None
    assert "another sitting" not in report_html.render(document, report_html.pictures_in(tmp_path))


def test_large_pictures_are_reduced_and_many_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = document_in(tmp_path, size=512)
    monkeypatch.setattr(report_html, "ROWS", 4)
    text = report_html.render(document, report_html.pictures_in(tmp_path))
    assert text.count("data:image/jpeg") == 4 * (7 + 6), "pictures and differences"
    assert "Shown are 4 of 6 prompts × seeds" in text
    assert "Reduced from 512×512" in text


def test_no_picture_is_alone_on_the_last_line_of_paper() -> None:
    assert [report_html._columns(pictures) for pictures in (1, 2, 6, 7, 8, 13, 31)] == [1, 2, 6, 5, 6, 5, 4]
    for pictures in range(2, 60):
        assert pictures % report_html._columns(pictures) != 1


def test_ticks_are_round_numbers_within_the_axis() -> None:
    for values in ([1.0, 2.77], [32, 100], [15.6, 47.3], [0.0, 1e-6], [5.0, 5.0]):
        low, high, ticks = report_html._axis(values)
        assert low < min(values) <= max(values) < high
        assert 2 <= len(ticks) <= 8
        assert all(low <= tick <= high for tick in ticks)
    assert report_html._axis([1.0, 2.77])[2] == [1.0, 1.5, 2.0, 2.5]


def test_a_plot_is_a_file_of_its_own(tmp_path: Path) -> None:
    text = report_html.plot_svg(document_in(tmp_path), "nfe")
    assert text.startswith("<svg xmlns=")
    assert text.count('class="point') == 5
    for method in ("fewer steps", "tea_cache", "cache_dit"):
        assert f">{method}</text>" in text


def crowded(directory: Path) -> dict[str, Any]:
    """A document of many runs at nearly the same place, with long names."""
    document = document_in(directory)
    chance = random.Random(0)
    runs = document["runs"]
    for number in range(16):
        run = dict(runs[5], name=f"DBCache {number}, with TaylorSeer of order {number % 4}", method=f"m{number % 5}")
        run["nfe"] = run["nfe"] | {"mean": 24.0 + number % 3}
        run["psnr"] = run["psnr"] | {"mean": chance.gauss(30, 1.5), "std": 1.0}
        runs.append(run)
    (directory / "results.json").write_text(showing.to_json(document))
    return document


def test_every_point_of_a_crowded_plot_has_a_name_or_a_number_that_is_told(tmp_path: Path) -> None:
    document = crowded(tmp_path)
    text = report_html.render(document, report_html.pictures_in(tmp_path))
    drawn = [run["name"] for run in document["runs"][1:] if run["psnr"]["mean"] is not None]
    for measure in report_html.AXES:
        plot = report_html._plot(document, measure)
        names = plot["names"]
        told = {number: name for number, name, _ in plot["numbered"]}
        assert [told.get(label.text, label.text) for label in names] == drawn
        assert told, "not all names have room"
        alone = report_html.plot_svg(document, measure)
        for number, name in told.items():
            assert f"<b>{number}</b> {name}</li>" in text
            assert f">{number}</text>" not in alone.partition('class="name"')[2]
            assert f">{name}</text>" not in alone
        assert not [(a, b) for a in names for b in names if a is not b and labels.meet(a.box, b.box)]
        marks = [(x - 5, y - 5, x + 5, y + 5) for _, x, y, _ in plot["points"]]
        assert not [(a, mark) for a in names for mark in marks if labels.meet(a.box, mark)]
        for label, mark in zip(names, marks, strict=True):
            assert label.line is None or label.line[0] == pytest.approx((mark[0] + 5, mark[1] + 5))


# How a browser shows it


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[browser.Page, dict[str, Any]]]:
    """The report in a browser, and the document it was made of."""
    if browser.find() is None:
        needed = "rendering needs a browser: install chromium or chromium-headless-shell"
        pytest.fail(needed) if os.environ.get("CI") else pytest.skip(needed)
    directory = tmp_path_factory.mktemp("report")
    document = document_in(directory)
    with browser.opened(report_html.write(directory)) as page:
        yield page, document


def test_a_browser_complains_of_nothing_and_asks_for_nothing(shown: Any) -> None:
    page, _ = shown
    assert page.errors == []
    assert page.requests == []


def test_every_picture_is_there_and_can_be_decoded(shown: Any) -> None:
    page, document = shown
    sizes = page.evaluate(
        "(async () => { const images = [...document.images]; images.forEach(image => { image.loading = 'eager' });"
        " await Promise.all(images.map(image => image.decode()));"
        " return images.map(image => [image.naturalWidth, image.width]) })()"
    )
    rows = len(document["runs"][0]["cells"])
    assert len(sizes) == rows * (2 * len(RUNS) - 1), "each run's picture, and its difference but for the reference"
    assert all(size == [64, 128] for size in sizes), "small pictures are enlarged"


def test_a_pressed_picture_opens_over_its_reference(shown: Any) -> None:
    page, document = shown
    assert (
        page.evaluate(
            "(() => { const button = document.querySelectorAll('button[data-reference]')[1]; button.focus();"
            " button.click(); return document.activeElement.type })()"
        )
        == "range"
    ), "the arrow keys move the slider at once"
    state = (
        "[document.querySelector('dialog').open, document.querySelector('.wipe .right').textContent,"
        " getComputedStyle(document.querySelectorAll('.stage img')[1]).clipPath,"
        " ...[...document.querySelectorAll('.stage img')].map(image => image.alt.split(':')[0])]"
    )
    names = ["no cache", RUNS[2][0]]
    assert page.evaluate(state) == [True, RUNS[2][0], "inset(0px 0px 0px 50%)", *names]
    press(page, "Home", 36)
    assert page.evaluate(state) == [True, RUNS[2][0], "inset(0px 0px 0px 0%)", *names]
    text = page.evaluate("document.querySelector('dialog').innerText")
    rows = list(zip(*(run["cells"] for run in document["runs"]), strict=True))
    first = rows[report_html._worst(rows)[1]]
    for said in (f"{first[2]['psnr']:.1f} dB", first[0]["prompt"], f"seed {first[0]['seed']}", "no cache reference"):
        assert said in text
    assert page.evaluate("document.querySelector('dialog').getBoundingClientRect().bottom <= innerHeight")
    press(page, "Escape", 27)
    assert page.evaluate("document.querySelector('dialog').open") is False
    assert page.evaluate("document.activeElement.matches('button[data-reference]')"), "where the reader was"


def test_the_pictures_of_a_row_are_on_one_line(shown: Any) -> None:
    page, _ = shown
    try:
        for width in (1100, 500, 360):
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
            page.call("Emulation.setDeviceMetricsOverride", **size)
            tops, sticks_out, scrolls, narrowest = page.evaluate(
                "[[...document.querySelectorAll('.row')].map(row => new Set([...row.children].map("
                "cell => cell.getBoundingClientRect().top)).size),"
                " document.documentElement.scrollWidth > innerWidth,"
                " [...document.querySelectorAll('.row')].every(row => row.scrollWidth > row.clientWidth),"
                " Math.min(...[...document.querySelectorAll('.row img')].map(image => image.width))]"
            )
            assert set(tops) == {1}
            assert not sticks_out
            assert scrolls == (width < 1100), "7 pictures of 128 px fit into 1100 px"
            assert narrowest == 128
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")


def press(page: browser.Page, key: str, code: int) -> None:
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)


def test_the_plots_have_a_mark_for_each_run_and_a_line_for_each_method(shown: Any) -> None:
    page, _ = shown
    counts = page.evaluate(
        "[...document.querySelectorAll('svg.plot')].map(plot => ['.point', '.spread', 'polyline.method', '.name']"
        ".map(kind => plot.querySelectorAll(kind).length))"
    )
    drawn = len(RUNS) - 2  # neither the reference nor what is identical to it
    for points, spreads, lines, names in counts:
        assert (points, spreads, lines) == (drawn, drawn, 4)
        assert names == drawn + 1, "every point has its name, or a number, and so has the line of the reference"
    assert len(counts) == 2
    inside = page.evaluate(
        "[...document.querySelectorAll('svg.plot .point')].every(point => { const a = point.getBoundingClientRect(),"
        " b = point.closest('svg').getBoundingClientRect(); return a.width > 4 && a.left > b.left && a.right < b.right"
        " && a.top > b.top && a.bottom < b.bottom })"
    )
    assert inside


def test_no_chart_of_steps_is_alone_in_its_row(shown: Any) -> None:
    """On a wide page; there are 7 charts, in two columns that are as long as each other but for one chart."""
    page, document = shown
    assert len(document["runs"]) % 2
    page.call("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
    left, right = page.evaluate(
        "Object.values(Object.groupBy([...document.querySelectorAll('.timelines figure')]"
        ".map(one => one.getBoundingClientRect()), place => place.left))"
        ".map(column => [column.length, column.at(-1).bottom, Math.max(...column.map(place => place.height))])"
    )
    assert left[0] + right[0] == len(document["runs"])
    assert abs(left[1] - right[1]) <= max(left[2], right[2])


def test_the_letters_of_the_charts_of_steps_can_be_read_on_a_phone(shown: Any) -> None:
    page, _ = shown
    try:
        for width in (600, 440, 360, 320):
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
            page.call("Emulation.setDeviceMetricsOverride", **size)
            letters = page.evaluate(
                "[...document.querySelectorAll('.timeline text')].map(text => {"
                " const box = text.getBoundingClientRect(), svg = text.closest('svg');"
                " const shrunk = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;"
                " const size = parseFloat(getComputedStyle(text).fontSize) * shrunk;"
                " return [size, box.left >= 0, box.right <= innerWidth] })"
            )
            assert {tuple(inside) for _, *inside in letters} == {(True, True)}
            assert min(size for size, *_ in letters) > 8.5
            assert max(size for size, *_ in letters) < 15
            assert page.evaluate(OVERLAPS) == []
            assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")


def test_each_run_has_its_steps_and_its_distances(shown: Any) -> None:
    page, document = shown
    counts = page.evaluate(
        "[...document.querySelectorAll('svg.timeline')].map(line => ['.step', '.distance', '.threshold']"
        ".map(kind => line.querySelectorAll(kind).length))"
    )
    assert counts == [
        [2 * run["steps"], 2 * (run["threshold"] is not None), int(run["threshold"] is not None)]
        for run in document["runs"]
    ]
    assert page.evaluate("document.querySelectorAll('svg.strip').length") == 6 * len(RUNS)


def test_the_table_has_the_numbers_of_the_results(shown: Any) -> None:
    page, document = shown
    rows = page.evaluate(
        "[...document.querySelector('table').tBodies[0].rows].map(row => [row.cells[0].innerText.trim(), "
        "Object.fromEntries([...row.cells].slice(1).map(cell => [cell.dataset.measure, cell.innerText]))])"
    )
    assert [name for name, _ in rows] == [run["name"] for run in document["runs"]]
    for (_, texts), run in zip(rows[1:], document["runs"][1:], strict=True):
        for name, measure in document["measures"].items():
            values, digits = run[name], measure["digits"]
            if values["mean"] is None:
                assert texts[name] == "identical"
                continue
            middle = values["median" if name in ("seconds", "speedup") else "mean"]
            assert texts[name].startswith(f"{middle:.{digits}f}")
            assert f"p5 {values['p5']:.{digits}f}" in texts[name]
            if values["std"] > 10**-digits:
                assert f"± {values['std']:.{digits}f}" in texts[name]
    assert rows[0][1]["psnr"] == "–"


TEXTS = """
[...document.querySelectorAll('h1,h2,h3,p,td,th,figcaption,dd,li,svg text')]
  .filter(one => one.textContent.trim() && !one.closest('dialog'))
  .map(one => { const box = one.getBoundingClientRect(), style = getComputedStyle(one);
    return [one.textContent.trim(), box.width > 2 && box.height > 5, style.visibility == 'visible',
      style.color != style.backgroundColor] })
"""
OVERLAPS = """
[...document.querySelectorAll('svg.plot, svg.timeline')].flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
  return texts.flatMap(([a, p], i) => texts.slice(i + 1)
    .filter(([b, q]) => p.left < q.right && q.left < p.right && p.top + 2 < q.bottom && q.top + 2 < p.bottom)
    .map(([b, q]) => [a, b])) })
"""


def test_all_text_can_be_read(shown: Any) -> None:
    page, _ = shown
    found = page.evaluate(TEXTS)
    assert len(found) > 100
    assert [text for text, *readable in found if readable != [True, True, True]] == []
    assert page.evaluate(OVERLAPS) == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing sticks out at the side"


def test_no_text_of_a_crowded_plot_meets_another(shown: Any, tmp_path: Path) -> None:
    crowded(tmp_path)
    with browser.opened(report_html.write(tmp_path)) as page:
        assert page.evaluate("document.querySelectorAll('svg.plot .name').length") == 2 * (21 + 1)
        assert page.evaluate("document.querySelectorAll('svg.plot .leader').length") > 10
        assert page.evaluate(OVERLAPS) == []


def test_it_follows_the_readers_light_or_dark_and_prints_light(shown: Any) -> None:
    page, _ = shown
    colour = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(colour) == "rgb(255, 255, 255)"
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.call("Emulation.setEmulatedMedia", media="", features=dark)
    assert page.evaluate(colour) == "rgb(21, 24, 28)"
    page.call("Emulation.setEmulatedMedia", media="print", features=dark)
    assert page.evaluate(colour) == "rgb(255, 255, 255)"
    size = {"width": 720, "height": 1000, "deviceScaleFactor": 1, "mobile": False}  # a sheet of A4 between its margins
    page.call("Emulation.setDeviceMetricsOverride", **size)
    assert page.evaluate("document.documentElement.scrollWidth <= 720"), "nothing is cut off on paper"
