"""Verdicts on disk, so that no judge is asked the same thing twice, in this run or the next."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

from searchr1.errors import UserError
from searchr1.unicode_text import whole_text

WAIT_S = 10.0
"""For another reward process that is writing."""


class VerdictCache:
    """A SQLite file that several processes of one machine may share. Holds hashes and scores, no texts and no keys."""

    def __init__(self, path: str) -> None:
        """Open or create.

        Raises:
            UserError: the file cannot be written or is something else.
        """
        self._path = path
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            # A verdict lost with the machine's power is asked for again; waiting for the disk each time costs more.
            self._database.execute("PRAGMA synchronous=OFF")
            self._database.execute("CREATE TABLE IF NOT EXISTS verdicts (hash TEXT PRIMARY KEY, score REAL NOT NULL)")
        except (OSError, sqlite3.Error) as error:
            raise self._failed(error) from error

    def get(self, key: str) -> float | None:
        """The score under a key of `verdict_key`, or None.

        Raises:
            UserError: the file is damaged or gone.
        """
        try:
            row = self._database.execute("SELECT score FROM verdicts WHERE hash = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise self._failed(error) from error
        return None if row is None else float(row[0])

    def put(self, key: str, score: float) -> None:
        """Remember a score.

        Raises:
            UserError: the disk is full, the file damaged.
        """
        try:
            self._database.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", (key, score))
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> UserError:
        return UserError(
            f"reward.judge.cache_path: {self._path}: {error}; give the path of a new file, or of one written by this key"
        )


def verdict_key(url: str, body: dict[str, Any]) -> str:
    """What a verdict depends on: the address, the model and the whole prompt."""
    text = json.dumps([url, body], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(whole_text(text).encode()).hexdigest()
