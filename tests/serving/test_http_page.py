"""The page, in headless Chromium."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
import tiny
from http_server import Held, on_a_port, small, wait_until

from omni_runtime.serving.http import page as pages
from omni_runtime.serving.http.server import Server


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Server]]:
    with on_a_port(small(tiny.qwen_image(layers=2), num_inference_steps=8)) as found:
        yield found


@pytest.fixture(scope="module")
def shown(served: Any) -> Iterator[browser.Page]:
    """The page on a phone, in the dark: what is shown there has room anywhere."""
    if browser.find() is None:
        needed = "the page needs a browser: install chromium or chromium-headless-shell"
        pytest.fail(needed) if os.environ.get("CI") else pytest.skip(needed)
    with browser.opened(f"{served[0]}/", 360, 740, dark=True) as page:
        until(page, "document.getElementById('about').textContent.startsWith('Makes pictures')")
        yield page


def until(page: browser.Page, true: str) -> None:
    end = time.monotonic() + 60
    while not page.evaluate(true):
        assert time.monotonic() < end, page.evaluate("document.body.innerText")
        time.sleep(0.05)


def ask(page: browser.Page, **fields: Any) -> None:
    """Fill the form, and press its button."""
    for name, value in fields.items():
        kind = "checked" if isinstance(value, bool) else "value"
        page.evaluate(f"document.getElementById('ask').elements['{name}'].{kind} = {json.dumps(value)}")
    page.evaluate("document.getElementById('ask').elements.method.dispatchEvent(new Event('change'))")
    page.evaluate("document.getElementById('go').click()")


def text(page: browser.Page, of: str) -> str:
    return str(page.evaluate(f"document.querySelector({of!r}).textContent"))


def test_it_knows_the_model(shown: browser.Page, served: Any) -> None:
    assert text(shown, "h1") == served[1].service.name
    methods = shown.evaluate("[...document.querySelectorAll('select option')].map(one => one.value)")
    assert methods == ["none", *served[1].service.methods]
    assert shown.evaluate("document.querySelector('[name=steps]').placeholder") == "8"
    assert shown.evaluate("document.getElementById('references').hidden")


def test_the_picture_is_made_and_compared(shown: browser.Page) -> None:
    shown.evaluate(
        "(() => { window.seen = []; new MutationObserver(() => { const image = document.querySelector('#made img');"
        " if (image && seen.at(-1) !== image.src) seen.push(image.src) }).observe(document.getElementById('made'),"
        " {subtree: true, childList: true, attributes: true}) })()"
    )
    ask(shown, prompt="a <b>cat</b>", seed="3", method="velocity_cache", compare=True)
    until(shown, "document.getElementById('verdict').textContent")
    assert shown.evaluate("seen.length") >= 3, "it has grown"
    facts = text(shown, "#made figcaption")
    assert facts.startswith("velocity_cache")
    assert "4 of 8 steps computed, seed 3" in facts
    assert "8 of 8 steps computed, seed 3" in text(shown, "#reference figcaption")
    assert "PSNR" in text(shown, "#verdict")
    kinds = shown.evaluate("[...document.querySelectorAll('#made .bar i')].map(one => one.className).join(' ')")
    assert (kinds.count("computed"), kinds.count("skipped")) == (4, 4)
    label = shown.evaluate("document.querySelector('#made .bar').getAttribute('aria-label')")
    assert label == "of 8 steps, 4 computed, 4 skipped"
    pictures = shown.evaluate("[...document.images].map(one => [one.alt, one.naturalWidth, one.width > 64])")
    assert pictures == [["a <b>cat</b>", 64, True], ["a <b>cat</b>, without a cache", 64, True]]
    assert shown.evaluate("[...document.querySelectorAll('a[download]')].map(one => one.download)") == [
        "picture-3.png",
        "picture-3-no-cache.png",
    ]


def test_it_fits_a_phone_and_can_be_read(shown: browser.Page) -> None:
    assert shown.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    unnamed = shown.evaluate(
        "[...document.querySelectorAll('input, textarea, select')].filter(one => !one.labels.length)"
        ".map(one => one.name)"
    )
    assert unnamed == []
    small_ones = shown.evaluate(
        "[...document.querySelectorAll('button')].filter(one => one.getBoundingClientRect().height < 44).length"
    )
    assert small_ones == 0, "a finger can press them"


def test_an_error_is_shown(shown: browser.Page) -> None:
    ask(shown, prompt="a cat", size="65x64", compare=False)
    until(shown, "document.getElementById('error').textContent")
    assert "size" in text(shown, "#error")
    shown.evaluate("document.getElementById('ask').elements.size.value = ''")


def test_a_picture_can_be_stopped(shown: browser.Page, served: Any) -> None:
    engine = served[1].service.engine
    with Held(served[1].service) as held:
        ask(shown, prompt="a cat", method="none")
        assert held.reached.wait(60)
        assert shown.evaluate("document.getElementById('go').disabled")
        shown.evaluate("document.getElementById('stop').click()")
        until(shown, "document.getElementById('error').textContent === 'Stopped.'")
    wait_until(lambda: engine.queued + engine.running == 0)
    assert not shown.evaluate("document.getElementById('go').disabled")


def test_the_keyboard_asks_for_a_picture(shown: browser.Page) -> None:
    shown.evaluate("document.querySelector('[name=prompt]').focus()")
    for kind in ("keyDown", "keyUp"):
        enter = {"type": kind, "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        shown.call("Input.dispatchKeyEvent", modifiers=2, **enter)
    until(shown, "document.getElementById('status').textContent === 'The picture is made.'")


def test_a_browser_asks_nothing_of_others(shown: browser.Page) -> None:
    assert shown.requests == []
    failed = [error for error in shown.errors if "400" not in error]  # the error that a test asked for
    assert failed == []


def test_the_page_allows_only_its_own_script_and_style() -> None:
    text, policy = pages.rendered("<script>alert(1)</script>")
    assert "<script>alert" not in text
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'")
    assert "http" not in text.replace("http-equiv", ""), "it names no other server"


def test_the_files_of_the_page_are_packaged() -> None:
    folder = Path(pages.__file__).parent
    project = (folder.parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"serving/http/page/*"' in project
    assert {"page.html.j2", "page.css", "page.js"} <= {file.name for file in folder.iterdir()}
