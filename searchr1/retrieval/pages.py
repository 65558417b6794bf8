"""Pages by address."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from urllib.parse import unquote, urldefrag

from searchr1.errors import UserError
from searchr1.retrieval.documents import Page


def canonical_url(url: str) -> str:
    """One form for addresses that mean the same page.

    `index.php/Title` is read as `index.php?title=Title`; scheme, fragment, percent-encoding, blanks for underscores and a
    slash at the end make no difference.
    """
    text = unquote(urldefrag(url.strip())[0]).replace(" ", "_")
    text = text.removeprefix("https://").removeprefix("http://")
    host, slash, path = text.partition("/")
    path = path.replace("index.php/", "index.php?title=", 1).rstrip("/")
    return host.lower() + (slash + path if path else "")


class Pages:
    """A jsonl file of `{"url", "contents"}` rows; memory holds addresses and offsets."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"--pages_path {path}: no such file")
        self._file = path.open("rb")
        self._data = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._offsets: dict[str, int] = {}
        position = 0
        for number, line in enumerate(iter(self._data.readline, b""), start=1):
            try:
                self._offsets[canonical_url(json.loads(line)["url"])] = position
            except (ValueError, KeyError, TypeError) as error:
                if line.strip():
                    raise UserError(f"{path}:{number}: no page ({error}); expected url and contents") from error
            position += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def get(self, url: str) -> Page | None:
        """The page, or None."""
        offset = self._offsets.get(canonical_url(url))
        if offset is None:
            return None
        end = self._data.find(b"\n", offset)
        row = json.loads(self._data[offset : end if end >= 0 else len(self._data)])
        return Page(row["url"], str(row.get("contents", "")))
