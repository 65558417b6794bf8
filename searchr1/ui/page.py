"""Pages that stand alone: a template, its style sheets and its scripts, in one file that loads nothing from outside.

Data reaches a page as escaped HTML, as JSON, or as base64 of compressed JSON; scripts put every string in as text. A page's
policy (Content-Security-Policy) names its style sheet and its script by their hashes and allows nothing else.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).with_name("assets")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_UNSAFE_IN_JSON = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})
_SLOT = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True, slots=True)
class Page:
    """One kind of page: the names of its files in `assets`."""

    template: str
    styles: tuple[str, ...]
    """Style sheets in their order; every page begins with `base.css`."""
    scripts: tuple[str, ...] = ()
    """Scripts in their order; `dom.js` comes first. Without scripts, the page's policy allows none."""

    @property
    def style(self) -> str:
        """The style sheets as one text."""
        return _joined(self.styles)

    @property
    def script(self) -> str:
        """The scripts as one text."""
        return _joined(self.scripts)

    def policy(self, *extra: str, connect: bool = False) -> str:
        """Return the Content-Security-Policy, which can stand in an attribute within double quotes.

        Args:
            extra: further directives.
            connect: whether the page may send requests to its own server.
        """
        parts = ["default-src 'none'"]
        if self.scripts:
            parts.append(f"script-src {_hash(self.script)}")
        parts.append(f"style-src {_hash(self.style)}")
        if connect:
            parts.append("connect-src 'self'")
        return "; ".join([*parts, *extra, "base-uri 'none'", "form-action 'none'"])

    def parts(self, slots: Mapping[str, str]) -> tuple[str, str]:
        """Return the page before and after the slot `packed` (the second part is empty for a template without it).

        Args:
            slots: HTML for each `{{slot}}` of the template; `style` and `script` are filled in here.
        """
        filled = {"style": self.style, "script": self.script, **slots}
        before, _, after = _asset(self.template).partition("{{packed}}")
        return _filled(before, filled), _filled(after, filled)

    def render(self, slots: Mapping[str, str]) -> str:
        """Return the page, with `slots` as in `parts`."""
        return "".join(self.parts(slots))


def escape(value: object) -> str:
    """Return any text as HTML that shows it and does nothing else.

    Control characters, halves of surrogate pairs and characters that turn the direction of text become U+FFFD.
    """
    return html.escape(_CONTROL.sub("\ufffd", str(value)), quote=True)


def embedded_json(value: Any) -> str:
    """Return JSON for a script element: no character in it can end or open an element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).translate(_UNSAFE_IN_JSON)


def packed_json(value: Any) -> str:
    """Return compressed JSON in base64, which a script unpacks when it is needed."""
    return base64.b64encode(gzip.compress(json.dumps(value).encode(), 6, mtime=0)).decode()


@functools.cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


@functools.cache
def _joined(names: tuple[str, ...]) -> str:
    return "".join(f"{_asset(name)}\n" for name in names)


def _filled(template: str, slots: Mapping[str, str]) -> str:
    # One pass, so that a slot's name within a value stays text.
    return _SLOT.sub(lambda slot: slots[slot[1]], template)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
