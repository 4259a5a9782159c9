"""The table of models in docs/models.md: a sample of it is made again, and the page is what the results say."""

import json

import pytest

from benchmarks.models import table, tiny

#: One model of each kind: streams that are joined, two transformers, keys that are kept, a ControlNet, long skips, the
#: text before the noise, several outputs, lists in a dict, blocks in turns.
SAMPLE = [
    "Flux2Pipeline",
    "WanPipeline (2.2, two transformers)",
    "QwenImage21Pipeline",
    "StableDiffusion3ControlNetPipeline",
    "HunyuanDiTControlNetPipeline",
    "Cosmos3OmniPipeline",
    "LTX2Pipeline",
    "Ideogram4Pipeline",
    "ModularPipeline (FLUX.3)",
    "LattePipeline",
]
#: Compiling and starting ranks take the longest, and have tests of their own.
METHODS = [method for method in table.METHODS if method not in ("compile", "parallel")]


@pytest.fixture(scope="module")
def results():
    return json.loads(table.FILE.read_text(encoding="utf-8"))


def told(cell):
    return {key: cell[key] for key in ("state", "words", "done", "of")}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_row_can_be_made_again(name, results):
    (expected,) = [row for row in results["rows"] if row["name"] == name]
    made = table.row(name, METHODS)
    assert "failed" not in made
    assert {m: told(made["cells"][m]) for m in METHODS} == {m: told(expected["cells"][m]) for m in METHODS}


def test_every_tiny_pipeline_is_in_the_table_and_none_is_wrong(results):
    assert [row["name"] for row in results["rows"]] == tiny.names()
    assert not [row["name"] for row in results["rows"] if "failed" in row]
    states = {(row["name"], m): cell["state"] for row in results["rows"] for m, cell in row["cells"].items()}
    assert [cell for cell, state in states.items() if state == "wrong"] == []
    assert results["works"] == table.summary(results["rows"])
    assert results["lacking"] == table.lacking(results["rows"], results["classes"])


def test_every_pipeline_of_diffusers_is_tried_or_it_is_said_why_not(results):
    every = set(table.classes())
    assert every == set(results["classes"])
    assert every - {row["pipeline"] for row in results["rows"]} == set(table.UNTRIED)


def test_the_page_shows_the_results(results):
    page = (table.RESULTS.parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    assert page.split(table.BEGIN)[1].split(table.END)[0].strip() == table.shown(results)


def test_a_class_counts_only_if_all_its_rows_work():
    works, refused = {"easy_cache": {"state": "works"}}, {"easy_cache": {"state": "refused"}}
    rows = [{"pipeline": name, "cells": cells} for name, cells in (("A", works), ("B", works), ("B", refused))]
    assert table.lacking(rows, ["A", "B", "C"]) == {"easy_cache": ["B", "C"]}


def test_a_reason_is_told_once():
    refused = {"state": "refused", "words": "the cache cannot follow it", "done": 0, "of": 0}
    works = {"state": "works", "words": "", "done": 5, "of": 8}
    cells = {"velocity_cache": works, "easy_cache": refused, "fuse": works | {"done": 3, "of": 3}}
    shown = table.markdown([{"name": name, "cells": cells} for name in ("A", "B")])
    assert "| A | ✓ 5/8 | ✗ 1 | ✓ |" in shown
    assert shown.count("the cache cannot follow it") == 1
    assert "| **works in, of 2** | **2** | **0** | **2** |" in shown


def test_cells_that_are_not_tried_are_kept(results):
    (first, *_), names = results["rows"], [row["name"] for row in results["rows"]]
    tried = {"state": "refused", "words": "why", "done": 0, "of": 0, "seconds": 1.0}
    merged = table.with_others([{"name": first["name"], "cells": {"easy_cache": tried}}], names)
    assert merged[0] == first | {"cells": first["cells"] | {"easy_cache": tried}}
    assert merged[1:] == results["rows"][1:]
