"""Answers and pages of online engines on disk, for several processes."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from searchr1.errors import UserError
from searchr1.files.text_rows import parse_json

FILE = "online.sqlite3"
LOCK_TIMEOUT_S = 10.0
TRIM_EVERY = 500
"""Writes between two looks at the size."""
MAX_VALUE_BYTES = 64 << 20
OURS = {("table", "entries"), ("index", "entries_at"), ("index", "sqlite_autoindex_entries_1")}
"""All objects of a cache's database: other files may have triggers and views, which would run with every read."""


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
            self._file = folder / FILE
            self._thread.submit(self._open).result()
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"--cache_dir {folder}: cannot be used ({error})") from error

    def _open(self) -> None:
        try:
            self._database = self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            self._begin_again(error)

    def _begin_again(self, error: sqlite3.Error) -> None:
        """Move a damaged file aside, unless another process has done so."""
        try:
            if self._inode in (None, self._file.stat().st_ino):
                aside = self._file.with_suffix(f".damaged-{time.time_ns()}")
                print(f"{self._file}: damaged ({error}); moved to {aside.name}, a new one is begun", flush=True)
                self._file.rename(aside)
                for rest in (f"{self._file}-wal", f"{self._file}-shm"):
                    Path(rest).unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        self._database = self._connect()

    def _connect(self) -> sqlite3.Connection:
        self._inode: int | None = None
        database = sqlite3.connect(self._file, timeout=LOCK_TIMEOUT_S, isolation_level=None)
        try:
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
            database.execute("PRAGMA trusted_schema=OFF")
            database.execute("PRAGMA cell_size_check=ON")
            self._begin_log(database)
            self._check_schema(database)
            database.execute("PRAGMA synchronous=NORMAL")
            database.execute("PRAGMA auto_vacuum=INCREMENTAL")
            database.execute(
                "CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value TEXT, size INTEGER, at REAL, sum INTEGER)"
            )
            database.execute("CREATE INDEX IF NOT EXISTS entries_at ON entries (at)")
            self._inode = self._file.stat().st_ino
        except BaseException:
            database.close()
            raise
        return database

    @staticmethod
    def _check_schema(database: sqlite3.Connection) -> None:
        tables = database.execute("SELECT type, name FROM sqlite_master LIMIT 100").fetchall()
        if not tables:  # new
            return
        columns = [name for _, name, *_ in database.execute("PRAGMA table_info(entries)")]
        if set(tables) - OURS or columns[:4] != ["key", "value", "size", "at"]:
            raise sqlite3.DatabaseError("its tables are not those of this cache")
        if "sum" not in columns:  # of an earlier version
            try:
                database.execute("ALTER TABLE entries ADD COLUMN sum INTEGER")
            except sqlite3.OperationalError as error:
                if "duplicate column" not in str(error):  # another process was faster
                    raise

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
        """Return the value, or None if there is none or it is too old."""
        return await self._do(self._get, key)

    async def put(self, key: str, value: Any) -> None:
        """Remember a value. A full or locked disk is reported and costs only the entry."""
        await self._do(self._put, key, json.dumps(value))

    async def aclose(self) -> None:
        """Close the file."""
        await self._do(self._database.close)
        self._thread.shutdown()

    async def _do(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _get(self, key: str) -> Any | None:
        try:
            row = self._database.execute("SELECT value, at, sum FROM entries WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            self._report(error)
            return None
        if row is None:
            return None
        value, at, known = row
        if not isinstance(value, str) or not isinstance(at, float) or known not in (None, _sum(key, value)):
            print(f"cache of the online engine: the entry {key[:40]!r} is damaged; it is fetched again", flush=True)
            return None
        try:
            return parse_json(value) if time.time() - at < self._ttl_s else None
        except ValueError:
            return None  # an entry of an earlier version, without a sum

    def _put(self, key: str, value: str) -> None:
        size = len(value) + len(key)
        entry = (key, value, size, time.time(), _sum(key, value))
        try:
            self._database.execute(
                "INSERT OR REPLACE INTO entries (key, value, size, at, sum) VALUES (?, ?, ?, ?, ?)", entry
            )
            self._writes += 1
            if self._writes % TRIM_EVERY == 1:
                self._trim()
        except sqlite3.Error as error:
            self._report(error)

    def _report(self, error: sqlite3.Error) -> None:
        """Report what went wrong. A damaged file is replaced, anything else (a full disk, a lock) costs only the entry."""
        print(f"cache of the online engine: {error}", flush=True)
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            try:
                self._database.close()
                self._begin_again(error)
            except (OSError, sqlite3.Error) as again:
                print(f"cache of the online engine: cannot begin a new one ({again})", flush=True)

    def _trim(self) -> None:
        """Remove what is too old, then the oldest until the size is right."""
        self._database.execute("DELETE FROM entries WHERE at < ?", (time.time() - self._ttl_s,))
        (size,) = self._database.execute("SELECT COALESCE(SUM(size), 0) FROM entries").fetchone()
        while size > self._max_bytes:
            oldest = self._database.execute("SELECT key, size FROM entries ORDER BY at LIMIT 100").fetchall()
            self._database.executemany("DELETE FROM entries WHERE key = ?", [(key,) for key, _ in oldest])
            size -= sum(entry for _, entry in oldest)
        self._database.execute("PRAGMA incremental_vacuum")


def _sum(key: str, value: str) -> int:
    return zlib.crc32(value.encode("utf-8", "surrogatepass"), zlib.crc32(key.encode("utf-8", "surrogatepass")))
