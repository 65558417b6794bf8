"""Pages by address."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from searchr1.retrieval.documents import Page
from searchr1.retrieval.rows import Rows


def canonical_url(url: str) -> str:
    """One form for addresses that mean the same page.

    `index.php/Title` is read as `index.php?title=Title`; scheme, fragment, percent-encoding, blanks for underscores and a
    slash at the end make no difference.
    """
    text = unquote(url.strip().partition("#")[0]).strip().replace(" ", "_")
    scheme, separator, rest = text.partition("://")
    if separator and scheme.lower() in ("http", "https"):
        text = rest
    host, slash, path = text.partition("/")
    path = path.replace("index.php/", "index.php?title=", 1).rstrip("/")
    return host.lower() + (slash + path if path else "")


class Pages:
    """Rows of `{"url", "contents"}` by address; memory does not grow with them."""

    def __init__(self, path: Path) -> None:
        """Open the pages. Packed formats are unpacked beside the file, and every row is checked, at the first use.

        Raises:
            UserError: missing, empty, or a row is no page; names its line.
        """
        self._rows = Rows(path, "--pages_path", "pages", _row_key)

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, url: str) -> Page | None:
        """The page, or None. Where several rows mean the same address, the one written exactly so goes first."""
        found = [self._rows[row] for row in self._rows.with_key(_key(url))]
        wanted = canonical_url(url)
        for page in sorted(found, key=lambda page: page["url"] != url):
            if canonical_url(page["url"]) == wanted:
                return Page(page["url"], str(page.get("contents") or ""))
        return None

    async def access(self, urls: Sequence[str]) -> list[Page | None]:
        """The page behind each address; read in a thread, since pages are large and on disk."""
        return await asyncio.to_thread(lambda: [self.get(url) for url in urls])


def _row_key(row: Any) -> int:
    if not isinstance(row, dict) or not isinstance(row.get("url"), str):
        raise ValueError('not a page; expected {"url": ..., "contents": ...}')
    return _key(row["url"])


def _key(url: str) -> int:
    """Eight bytes of a hash of the canonical address."""
    text = canonical_url(url).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
