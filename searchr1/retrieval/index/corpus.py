"""Passages and pages on disk with random access."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from searchr1.retrieval.documents import Page
from searchr1.retrieval.index.rows import Rows
from searchr1.retrieval.searcher import Document

ID_FIELDS = ("id", "_id", "docid", "doc_id")
EXPECTED = 'expected {"id", "contents": "\\"Title\\"\\ntext"}, or {"id", "title", "text"}'
EMPTY = "empty passages, which are never found"
NO_URL = "passages whose url is null, which have an empty one"
NUMBERED = "passages without an id, which have their number, counted from 0"


class Corpus:
    """Rows of `{"id", "contents", "url"?}`, or of a title and a text, in a file that `as_jsonl` reads."""

    def __init__(self, path: Path) -> None:
        """Open a corpus. Packed formats are unpacked beside the file, and every row is checked, at the first use.

        Raises:
            UserError: missing, empty, or a row is not a passage; names its line.
        """
        self.path = path
        self._rows = Rows(path, "--corpus_path", "passages", _check)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Document:
        """Return one passage. A row without an id gets its number, counted from 0; one without a url gets an empty one."""
        fields: Document = self._rows[row]
        name = next((fields[field] for field in ID_FIELDS if fields.get(field) is not None), str(row))
        url = fields.get("url")  # RLinf's client fails without it, and Search-R1's corpus has none
        return fields | {"id": name, "contents": contents_of(fields), "url": "" if url is None else url}

    def contents(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """Yield the text of the passages from `start` up to `stop`, in order."""
        for row in range(start, len(self) if stop is None else min(stop, len(self))):
            yield contents_of(self._rows[row])

    def fingerprint(self) -> str:
        """Return the SHA-256 of the file (unpacked, if it was packed)."""
        return self._rows.summary.file.sha256

    @property
    def empty(self) -> int:
        """Passages without text."""
        return self._rows.summary.counts.get(EMPTY, 0)

    def peculiarities(self) -> str:
        """Return notes on the rows for the user; empty if there are none."""
        return "; ".join(f"{count} {what}" for what, count in self._rows.summary.counts.items())


def contents_of(row: Any) -> str:
    """Return the text of a passage, with its title in the first line where there is one.

    Raises:
        ValueError: it has none.
    """
    text, title = row.get("contents"), row.get("title")
    if isinstance(text, str):
        if not isinstance(title, str) or not title.strip() or is_titled(text, title.strip()):
            return text
    else:
        text = row.get("text")
        if not isinstance(text, str):
            raise ValueError(f"not a passage; {EXPECTED}")
        if not isinstance(title, str) or not title.strip():
            return text
    return f'"{title.strip()}"\n{text}'


def is_titled(contents: str, title: str) -> bool:
    """Return whether the first line of `contents` is a title: this one, or any in quotes."""
    first, separator, _ = contents.partition("\n")
    first = first.strip()
    quoted = bool(separator) and len(first) > 1 and first[0] == first[-1] == '"'
    return quoted or first in (title, f'"{title}"')


def _check(row: Any) -> Sequence[str]:
    if not isinstance(row, dict):
        raise ValueError(f"not a passage; {EXPECTED}")
    text = contents_of(row)
    peculiarities = []
    if not text or text.isspace():
        peculiarities.append(EMPTY)
    if row.get("id") is None and all(row.get(field) is None for field in ID_FIELDS):
        peculiarities.append(NUMBERED)
    if "url" in row and row["url"] is None:
        peculiarities.append(NO_URL)
    return peculiarities


def canonical_url(url: str) -> str:
    """Return one form for addresses that mean the same page.

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
            UserError: missing, empty, or a row is not a page; names its line.
        """
        self._rows = Rows(path, "--pages_path", "pages", _row_key)

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, url: str) -> Page | None:
        """Return the page, or None. Where several rows mean the same address, the one written exactly so goes first."""
        pages = [self._rows[row] for row in self._rows.with_key(_key(url))]
        wanted = canonical_url(url)
        for page in sorted(pages, key=lambda page: page["url"] != url):
            if canonical_url(page["url"]) == wanted:
                return Page(page["url"], str(page.get("contents") or ""))
        return None

    async def access(self, urls: Sequence[str]) -> list[Page | None]:
        """Return the page behind each address; pages are read in a thread, since they are large and on disk."""
        return await asyncio.to_thread(lambda: [self.get(url) for url in urls])


def _row_key(row: Any) -> int:
    if not isinstance(row, dict) or not isinstance(row.get("url"), str):
        raise ValueError('not a page; expected {"url": ..., "contents": ...}')
    return _key(row["url"])


def _key(url: str) -> int:
    """Return eight bytes of a hash of the canonical address."""
    text = canonical_url(url).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
