"""Ask a chat model for verdicts over OpenAI's HTTP API; verdicts are kept on disk."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from searchr1.errors import UserError
from searchr1.files.text_rows import whole_text
from searchr1.retry import Backoff, Retries, parse_retry_after

T = TypeVar("T")

BACKOFF = Backoff(0.25, 10.0, (0.5, 1.0))
ANSWER_BYTES = 1 << 20
"""Of one HTTP answer."""
TOLD_CHARACTERS = 200
"""Of what a server said, in an error."""
REFUSED = frozenset({400, 401, 403, 404, 405, 413, 422, *range(300, 400)})
"""Statuses that trying again does not change. Redirections are not followed: the key would go with them."""


class _Retry(Exception):
    """This attempt failed; the next may not. `after_s` is what the server asked for."""

    def __init__(self, message: str, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.after_s = after_s


class ChatClient:
    """One model at one address; at most `concurrency` requests at once."""

    def __init__(self, base_url: str, api_key: str | None, timeout_s: float, concurrency: int) -> None:
        """`timeout_s` is the deadline of one answer with all its attempts; see `ask`."""
        self.url = completions_url(base_url)
        self._key = api_key
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(concurrency)
        self._rng = random.Random()
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, body: dict[str, Any], read: Callable[[str], T]) -> T:
        """Return what `read` makes of the model's reply to `body`, the JSON of the request.

        Failed attempts (no connection, 408, 409, 425, 429, 5xx, no JSON, `read` raising `ValueError`) are repeated with
        growing pauses, or after what `Retry-After` says, up to the deadline. Waiting for a turn does not count.

        Raises:
            UserError: no useful reply in time, or one that will not change; names the address.
        """
        async with self._slots:
            retries = Retries(BACKOFF, self._rng, timeout_s=self._timeout_s)
            while True:
                try:
                    return read(await self._attempt(body, retries.remaining_s()))
                except (_Retry, ValueError, aiohttp.ClientError, TimeoutError, OSError) as error:
                    wait_s = retries.next_wait_s(getattr(error, "after_s", 0.0))
                    if wait_s is None:
                        raise UserError(
                            "reward.judge.base_url",
                            f"{self.url} gave no verdict within {self._timeout_s:g} s "
                            f"(reward.judge.timeout_s); the last attempt: {self._told(error)}",
                        ) from None
                await asyncio.sleep(wait_s)

    async def aclose(self) -> None:
        """Close the connections; the next request opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _attempt(self, body: dict[str, Any], remaining_s: float) -> str:
        """Return the text of the model's reply."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # A third of the time: a connection that hangs leaves room for two more.
        timeout = aiohttp.ClientTimeout(total=min(self._timeout_s / 3, max(remaining_s, 0.001)))
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        async with self._session.post(
            self.url, json=body, headers=headers, timeout=timeout, allow_redirects=False
        ) as answer:
            text = await _read(answer)
            if answer.status in REFUSED:
                raise UserError(
                    "reward.judge",
                    f"{self.url} refused with status {answer.status}: {self._told(text)}; "
                    "check base_url, model, api_key_env and request",
                )
            if answer.status != 200:
                raise _Retry(f"status {answer.status}: {text}", parse_retry_after(answer.headers.get("Retry-After")) or 0.0)
        try:
            content = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise _Retry(f"no chat completion: {text}") from None
        if not isinstance(content, str):
            raise _Retry(f"no text in the reply: {text}")
        return content

    def _told(self, what: object) -> str:
        """Of an error or a server's words, what may be shown: the beginning, without the key."""
        text = str(what) or type(what).__name__
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text[:TOLD_CHARACTERS].split())


def completions_url(base_url: str) -> str:
    """Return the address of chat completions below `base_url`, `/v1` added where there is no path.

    Raises:
        UserError: no http address.
    """
    base = base_url.strip().rstrip("/").removesuffix("/chat/completions")
    scheme, mark, rest = base.partition("://")
    if scheme not in ("http", "https") or not mark or not rest.partition("/")[0] or "@" in rest:
        raise UserError("reward.judge.base_url", "give http://host:port/v1 or an https address, without a key in it")
    return f"{base}/chat/completions" if "/" in rest else f"{base}/v1/chat/completions"


async def _read(answer: aiohttp.ClientResponse) -> str:
    data = bytearray()
    async for part in answer.content.iter_chunked(1 << 16):
        data += part
        if len(data) > ANSWER_BYTES:
            raise _Retry(f"more than {ANSWER_BYTES} bytes")
    return data.decode(errors="replace")


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
        """Return the score under a key of `verdict_key`, or None.

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
            "reward.judge.cache_path", f"{self._path}: {error}; give the path of a new file, or of one written by this key"
        )


def verdict_key(url: str, body: dict[str, Any]) -> str:
    """Return what a verdict depends on: the address, the model and the whole prompt."""
    text = json.dumps([url, body], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(whole_text(text).encode()).hexdigest()
