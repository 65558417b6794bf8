"""Pages by address."""

from __future__ import annotations

import hashlib
import json
import mmap
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from searchr1.errors import UserError
from searchr1.retrieval.corpus import line_at, line_offsets
from searchr1.retrieval.documents import Page
from searchr1.retrieval.unpack import as_jsonl


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
    """Rows of `{"url", "contents"}`; memory holds 16 bytes per page."""

    def __init__(self, path: Path) -> None:
        """Read all addresses.

        Raises:
            UserError: missing, empty, or a row is no page; names its line.
        """
        file = as_jsonl(path, "--pages_path")
        if file.stat().st_size == 0:
            raise UserError(f"--pages_path {path}: the file is empty")
        with file.open("rb") as opened:
            self._data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        offsets = line_offsets(self._data)
        keys = np.empty(len(offsets), dtype=np.uint64)
        for row, offset in enumerate(offsets):
            try:
                keys[row] = _key(json.loads(line_at(self._data, int(offset)))["url"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"--pages_path {path}: row {row + 1} is no page ({type(error).__name__}: {error}); expected "
                    '{"url": ..., "contents": ...}'
                ) from error
        order = np.argsort(keys, kind="stable")
        self._keys, self._offsets = keys[order], offsets[order]

    def __len__(self) -> int:
        return len(self._offsets)

    def get(self, url: str) -> Page | None:
        """The page, or None. Where several rows mean the same address, the one written exactly so goes first."""
        key = _key(url)
        rows = range(int(np.searchsorted(self._keys, key, "left")), int(np.searchsorted(self._keys, key, "right")))
        found = [json.loads(line_at(self._data, int(self._offsets[row]))) for row in rows]
        wanted = canonical_url(url)
        for page in sorted(found, key=lambda page: page["url"] != url):
            if canonical_url(page["url"]) == wanted:
                return Page(page["url"], str(page.get("contents") or ""))
        return None


def _key(url: str) -> np.uint64:
    """Eight bytes of a hash of the canonical address."""
    text = canonical_url(url).encode("utf-8", "surrogatepass")
    return np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
