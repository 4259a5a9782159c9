"""The page at `/`: make a picture, watch it grow, and see it beside the one without a cache.

One document with its style and its script inside. It fetches nothing but answers of the same server, and its content
security policy allows only that script and that style, by their hashes.
"""

from __future__ import annotations

import base64
import functools
import hashlib

import jinja2


@functools.cache
def rendered(model: str) -> tuple[str, str]:
    """The page for a model of this name, and its content security policy."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("omni_runtime.serving.http.page", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script, style = (templates.get_template(name).render() for name in ("page.js", "page.css"))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; connect-src 'self'; "
        "img-src 'self' data: blob:; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return templates.get_template("page.html.j2").render(model=model, script=script, style=style), policy


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
