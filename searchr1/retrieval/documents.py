"""Passages and pages as they travel over HTTP, and how long a request may take."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RetrievedDocument:
    """A passage of a search result."""

    id: str
    title: str
    text: str
    url: str | None = None
    score: float | None = None
    contents: str = ""
    """Title and text as the server sent them."""


@dataclass(frozen=True, slots=True)
class Page:
    """A page behind an address."""

    url: str
    contents: str


def split_contents(contents: str) -> tuple[str, str]:
    """Split `"Title"\\ntext` into title and text; without a line break the title is empty. Quotes inside the title stay."""
    first, separator, rest = contents.partition("\n")
    if not separator:
        return "", contents.strip()
    title = first.strip()
    if len(title) > 1 and title[0] == title[-1] == '"':
        title = title[1:-1].strip()
    return title, rest.strip()


QUERIES_PER_TIMEOUT = 512
PAIRS_PER_TIMEOUT = 5120
"""Pairs of query and passage that a reranker has one timeout for."""


def scaled_timeout(timeout_s: float, count: int, per: int) -> float:
    """Return `timeout_s` for every `per` items of a request, and for what is left over."""
    return timeout_s * max(-(-count // per), 1)


def encode_json(content: Any) -> bytes:
    """Encode JSON; half a surrogate pair, which UTF-8 cannot hold, is escaped."""
    import orjson

    try:
        return orjson.dumps(content)
    except TypeError:
        return json.dumps(content).encode()
