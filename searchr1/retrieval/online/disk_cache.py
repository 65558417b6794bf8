"""Answers and pages of online engines on disk, for several processes."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from searchr1.errors import UserError

FILE = "online.sqlite3"
LOCK_TIMEOUT_S = 10.0
TRIM_EVERY = 500
"""Writes between two looks at the size."""


class DiskCache:
    """JSON values by text keys. All work is done in one thread, so the event loop never waits for the disk."""

    def __init__(self, folder: Path, *, max_bytes: int = 4 << 30, ttl_s: float = 7 * 86400) -> None:
        """Open or make the cache; a damaged file is moved aside.

        Raises:
            UserError: the folder cannot be written.
        """
        self._max_bytes, self._ttl_s = max_bytes, ttl_s
        self._writes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._database = self._thread.submit(self._open, folder / FILE).result()
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"--cache_dir {folder}: cannot be used ({error})") from error

    def _open(self, file: Path) -> sqlite3.Connection:
        try:
            return self._connect(file)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            aside = file.with_suffix(f".damaged-{int(time.time())}")
            print(f"{file}: damaged ({error}); moved to {aside.name}, a new one is begun", flush=True)
            file.rename(aside)
            for rest in (f"{file}-wal", f"{file}-shm"):
                Path(rest).unlink(missing_ok=True)
            return self._connect(file)

    def _connect(self, file: Path) -> sqlite3.Connection:
        database = sqlite3.connect(file, timeout=LOCK_TIMEOUT_S, isolation_level=None)
        self._begin_log(database)
        database.execute("PRAGMA synchronous=NORMAL")
        database.execute("PRAGMA auto_vacuum=INCREMENTAL")
        database.execute("CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value TEXT, size INTEGER, at REAL)")
        database.execute("CREATE INDEX IF NOT EXISTS entries_at ON entries (at)")
        return database

    @staticmethod
    def _begin_log(database: sqlite3.Connection) -> None:
        """Switch to a write-ahead log; SQLite's own timeout does not cover another process that does so at this moment."""
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                database.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    async def get(self, key: str) -> Any | None:
        """The value, or None if there is none or it is too old."""
        return await self._do(self._get, key)

    async def put(self, key: str, value: Any) -> None:
        """Remember a value. A full or locked disk is told and costs only the entry."""
        await self._do(self._put, key, json.dumps(value))

    async def aclose(self) -> None:
        """Close the file."""
        await self._do(self._database.close)
        self._thread.shutdown()

    async def _do(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _get(self, key: str) -> Any | None:
        try:
            row = self._database.execute("SELECT value, at FROM entries WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            print(f"cache of the online engine: {error}", flush=True)
            return None
        return json.loads(row[0]) if row and time.time() - row[1] < self._ttl_s else None

    def _put(self, key: str, value: str) -> None:
        size = len(value) + len(key)
        try:
            self._database.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", (key, value, size, time.time()))
            self._writes += 1
            if self._writes % TRIM_EVERY == 1:
                self._trim()
        except sqlite3.Error as error:
            print(f"cache of the online engine: {error}", flush=True)

    def _trim(self) -> None:
        """Remove what is too old, then the oldest until the size is right."""
        self._database.execute("DELETE FROM entries WHERE at < ?", (time.time() - self._ttl_s,))
        (size,) = self._database.execute("SELECT COALESCE(SUM(size), 0) FROM entries").fetchone()
        while size > self._max_bytes:
            oldest = self._database.execute("SELECT key, size FROM entries ORDER BY at LIMIT 100").fetchall()
            self._database.executemany("DELETE FROM entries WHERE key = ?", [(key,) for key, _ in oldest])
            size -= sum(entry for _, entry in oldest)
        self._database.execute("PRAGMA incremental_vacuum")
