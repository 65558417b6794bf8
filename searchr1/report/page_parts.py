"""The page that `report` writes and `watch` serves: a template, a style sheet, a script, and data that cannot become markup.

Data reaches the page as JSON or as base64 of compressed JSON, and the script puts every string in as text. The page's policy
(Content-Security-Policy) names its one script and its one style sheet by their hashes and allows nothing else.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import html
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from searchr1.report.report_style import STYLE

FOLDER = Path(__file__).with_name("page")
SCRIPTS = ("dom", "source", "charts", "overview", "search", "list", "blocks", "detail", "main")
"""Concatenated in this order."""
_UNSAFE_IN_JSON = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})
_SLOT = re.compile(r"\{\{(\w+)\}\}")


@functools.cache
def style() -> str:
    """The style sheet."""
    return STYLE + (FOLDER / "viewer.css").read_text(encoding="utf-8")


@functools.cache
def script() -> str:
    """The script."""
    return "".join(f"{(FOLDER / name).with_suffix('.js').read_text(encoding='utf-8')}\n" for name in SCRIPTS)


def policy(connect: bool = False) -> str:
    """The page's Content-Security-Policy; with `connect` it may ask its own server."""
    allowed = f"script-src {_hash(script())}; style-src {_hash(style())}"
    asks = "; connect-src 'self'" if connect else ""
    return f"default-src 'none'; {allowed}{asks}; base-uri 'none'; form-action 'none'"


def embedded_json(value: Any) -> str:
    """JSON that can stand in a script element: no character in it can end or open anything."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).translate(_UNSAFE_IN_JSON)


def packed_json(value: Any) -> str:
    """Compressed JSON in base64: the script unpacks it when it is needed."""
    return base64.b64encode(gzip.compress(json.dumps(value).encode(), 6, mtime=0)).decode()


def page_parts(
    title: str, overview: dict[str, Any], index: str = "", packed: Iterable[tuple[str, str]] = ()
) -> Iterator[str]:
    """The page, piece by piece. The script comes before what is only needed when a trajectory is opened.

    Args:
        title: as HTML, escaped.
        overview: what the page shows at once, JSON without NaN.
        index: `packed_json` of what the list shows.
        packed: (id of a script element, its `packed_json`); ids are ours.
    """
    data = f'<script type="application/json" id="overview">{embedded_json(overview)}</script>\n'
    data += f'<script type="text/plain" id="index">{index}</script>\n'
    slots = {"title": title, "policy": html.escape(policy(connect=bool(overview.get("live")))), "data": data}
    slots |= {"style": style(), "script": script()}
    before, _, after = (FOLDER / "report.html").read_text(encoding="utf-8").partition("{{packed}}")
    yield _filled(before, slots)
    for name, text in packed:
        yield f'<script type="text/plain" id="{name}">{text}</script>\n'
    yield _filled(after, slots)


def _filled(template: str, slots: dict[str, str]) -> str:
    # One pass, so that a slot's name within a value stays text.
    return _SLOT.sub(lambda found: slots[found[1]], template)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
