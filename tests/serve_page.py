"""Makes the screenshot of the guide: `python tests/serve_page.py` writes docs/images/serve.png. Needs Chromium."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import browser
import torch
from http_server import on_a_port
from PIL import Image

from omni_runtime import Omni

OUT = Path(__file__).parents[1] / "docs" / "images" / "serve.png"
ASK = """(() => {
  const form = document.getElementById("ask");
  form.elements.prompt.value = "red apple on blue";
  form.elements.seed.value = 1;
  form.elements.compare.checked = true;
  form.requestSubmit();
})()"""


def until(page: browser.Page, true: str) -> None:
    """Wait until an expression is true in the page."""
    while not page.evaluate(true):
        time.sleep(0.1)


def main() -> int:
    """The command; returns its exit code."""
    torch.set_num_threads(1)
    omni = Omni("emoji-qwen-image", cache_backend="velocity_cache")
    with on_a_port(omni) as (address, _), browser.opened(f"{address}/", 1120, 680) as page:
        until(page, "document.getElementById('about').textContent.startsWith('Makes')")
        for _ in range(2):  # the second time, everything is warm
            page.evaluate("document.getElementById('verdict').textContent = ''")
            page.evaluate(ASK)
            until(page, "document.getElementById('verdict').textContent")
        page.evaluate("document.activeElement.blur()")
        page.screenshot(OUT, whole=False)
    shown = Image.open(io.BytesIO(OUT.read_bytes())).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    shown.save(OUT, optimize=True)
    print(f"{OUT.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
