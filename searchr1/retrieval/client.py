"""The agent's side of the retrieval server: kept connections, a deadline per call, retries over several servers."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from searchr1.errors import UserError
from searchr1.retrieval.documents import Page, RetrievedDocument, split_contents

FIRST_PAUSE_S = 0.1
RETRY_STATUS = {429, 500, 502, 503, 504}

T = TypeVar("T")


class SearchUnavailable(Exception):
    """No server answered within the deadline; the message says what the last one did."""


@dataclass(slots=True)
class ClientStats:
    """Counts since the start."""

    calls: int = 0
    retries: int = 0
    failures: int = 0


def base_url(address: str) -> str:
    """`host:port` or a URL -> a URL without a trailing slash; 0.0.0.0 is read as this machine.

    Raises:
        UserError: empty, or no address.
    """
    text = address.strip()
    text = text if "://" in text else f"http://{text}"
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise UserError(f"tools.search.server_addr: {address!r} is no address ({error}); give host:port") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise UserError(f"tools.search.server_addr: {address!r} is no address; give host:port of the retrieval server")
    return text.rstrip("/").removesuffix("/retrieve").replace("://0.0.0.0", "://127.0.0.1")


class SearchClient:
    """`await search(queries)`; safe to use from many coroutines of one event loop.

    A call tries each address in turn, starting with another one each time. Its deadline covers everything: waiting for a
    connection, all attempts and the pauses between them.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        topk: int = 3,
        timeout_s: float = 30.0,
        retries: int = 2,
        max_connections: int = 256,
        token: str | None = None,
    ) -> None:
        if not addresses:
            raise UserError("tools.search.server_addr: names no server")
        self._urls = [base_url(address) for address in addresses]
        self._topk = topk
        self._timeout_s = timeout_s
        self._retries = retries
        self._next = random.randrange(len(self._urls))
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._tls = ssl.create_default_context()
        # One httpx client per connection: httpx's own pool walks over all of its connections at every request, which
        # at 64 concurrent searches took five times the processor time of everything else.
        self._free = asyncio.Semaphore(max_connections)
        self._idle: list[list[httpx.AsyncClient]] = [[] for _ in self._urls]
        self.stats = ClientStats()

    async def search(self, queries: Sequence[str]) -> list[list[RetrievedDocument]]:
        """Passages for each query, best first.

        Raises:
            SearchUnavailable: no usable answer within the deadline.
        """
        if not queries:
            return []
        body = {"queries": list(queries), "topk": self._topk, "return_scores": True}
        return await self._call("/retrieve", body, lambda found: [_document(item) for item in found], len(queries))

    async def access(self, urls: Sequence[str]) -> list[Page | None]:
        """The page behind each address, or None.

        Raises:
            SearchUnavailable: no usable answer within the deadline.
        """
        if not urls:
            return []
        return await self._call("/access", {"urls": list(urls)}, _page, len(urls))

    async def aclose(self) -> None:
        """Close the connections."""
        for idle in self._idle:
            while idle:
                await idle.pop().aclose()

    async def _call(self, path: str, body: dict[str, Any], read: Callable[[Any], T], expected: int) -> list[T]:
        """Post to one server after the other until one gives `expected` results that `read` understands."""
        self.stats.calls += 1
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        self._next = first = (self._next + 1) % len(self._urls)
        pause = FIRST_PAUSE_S
        problem = "no attempt was made"
        for attempt in range(self._retries + 1):
            server = (first + attempt) % len(self._urls)
            # A server that hangs must leave time for the others, if there are others.
            others = min(self._retries - attempt, len(self._urls) - 1)
            seconds = max(deadline - loop.time(), 0) / (others + 1)
            worth_retrying = True
            try:
                async with asyncio.timeout(seconds):
                    result = await self._post(server, path, body)
                if len(result) == expected:
                    return [read(item) for item in result]
                reason = f"answered {len(result)} results for {expected}"
            except _Refused as error:
                reason, worth_retrying = str(error), error.worth_retrying
            except TimeoutError:
                reason = f"no answer within {seconds:.1f} s"
            except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
                reason = f"{type(error).__name__} {error}".strip()
            problem = f"{self._urls[server]}{path}: {reason}"
            if not worth_retrying or attempt == self._retries or loop.time() >= deadline:
                break
            self.stats.retries += 1
            if attempt + 1 >= len(self._urls):  # every server has had its turn: give them time
                await asyncio.sleep(min(pause * random.uniform(0.5, 1.5), max(deadline - loop.time(), 0)))
                pause *= 2
        self.stats.failures += 1
        raise SearchUnavailable(problem)

    async def _post(self, server: int, path: str, body: dict[str, Any]) -> list[Any]:
        """One attempt on one connection. A connection on which anything went wrong is not used again."""
        async with self._free:
            idle = self._idle[server]
            http = idle.pop() if idle else self._connect()
            try:
                response = await http.post(self._urls[server] + path, json=body)
            except BaseException:
                await http.aclose()
                raise
            idle.append(http)
        if response.status_code != 200:
            raise _Refused(response)
        result = response.json()["result"]
        if not isinstance(result, list):
            raise ValueError("result is no list")
        return result

    def _connect(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=1, max_keepalive_connections=1)
        # The deadline of the call is the only time limit.
        return httpx.AsyncClient(limits=limits, timeout=None, headers=self._headers, verify=self._tls, trust_env=False)


class _Refused(Exception):
    """A server answered with another status than 200."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(f"status {response.status_code}: {response.text[:200]}")
        self.worth_retrying = response.status_code in RETRY_STATUS


def _page(item: dict[str, Any] | None) -> Page | None:
    return Page(str(item.get("url", "")), str(item.get("contents", ""))) if item else None


def _document(item: dict[str, Any]) -> RetrievedDocument:
    """From `{"document": …, "score": …}` or a bare document, as different servers answer."""
    document = item.get("document", item)
    title, text = split_contents(str(document.get("contents", "")))
    return RetrievedDocument(
        id=str(document.get("id", "")),
        title=str(document.get("title") or title),
        text=text,
        url=document.get("url"),
        score=item.get("score"),
    )


def wait_until_healthy(address: str, timeout_s: float) -> None:
    """Wait for a server's /health.

    Raises:
        UserError: it did not answer in time.
    """
    url = f"{base_url(address)}/health"
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if httpx.get(url, timeout=2.0, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if time.monotonic() > deadline:
            raise UserError(f"the retrieval server at {address} did not answer {url} within {timeout_s:.0f} s")
        time.sleep(0.1)
