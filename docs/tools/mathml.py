"""A hook of MkDocs: equations become MathML when the site is built, so that readers need no script for them."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """Replace what the extension ``pymdownx.arithmatex`` has marked."""
    html = _INLINE.sub(lambda match: convert(unescape(match[1])), html)
    return _BLOCK.sub(
        lambda match: f'<div class="equation">{convert(unescape(match[1]), display="block")}</div>', html
    )
