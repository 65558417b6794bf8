"""The agent's side of the retrieval server: kept connections, a deadline per call, retries over several servers."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from searchr1.errors import UserError
from searchr1.retrieval.client.answers import read_error, read_json
from searchr1.retrieval.client.balancer import Balancer
from searchr1.retrieval.documents import QUERIES_PER_TIMEOUT, Page, RetrievedDocument, scaled_timeout, split_contents
from searchr1.retry import Backoff, Retries, parse_retry_after

TOKEN_VARIABLE = "SEARCHR1_RETRIEVAL_TOKEN"
BACKOFF = Backoff(0.2, 5.0, (0.0, 1.0))
"""Between the rounds in which every server had its turn."""
REPORT_EVERY_S = 10.0
RETRY_STATUS = {429, 500, 502, 503, 504}

if TYPE_CHECKING:  # the client works without the configuration's libraries
    from searchr1.config.schema import SearchToolConfig

T = TypeVar("T")


class SearchUnavailable(Exception):
    """No server answered within the deadline; the message describes what the last one did."""


@dataclass(slots=True)
class ClientStats:
    """Counts since the start."""

    calls: int = 0
    retries: int = 0
    failures: int = 0
    opens: int = 0
    """How often a circuit breaker was opened."""


def base_url(address: str) -> str:
    """Return the URL of `host:port` or of a URL, without a trailing slash; 0.0.0.0 becomes this machine.

    Raises:
        UserError: empty, or no address.
    """
    text = address.strip()
    text = text if "://" in text else f"http://{text}"
    try:
        url = urlsplit(text)
        valid = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError as error:
        raise UserError(f"tools.search.server_addr: {address!r} is not an address ({error}); give host:port") from error
    if not valid:
        raise UserError(f"tools.search.server_addr: {address!r} is not an address; give host:port of the retrieval server")
    return text.rstrip("/").removesuffix("/retrieve").replace("://0.0.0.0", "://127.0.0.1")


def server_addresses(search: SearchToolConfig) -> list[str]:
    """Return the addresses in `tools.search.server_addr`, which holds one or a list."""
    given = search.server_addr if isinstance(search.server_addr, list) else [search.server_addr]
    return [str(address) for address in given]


class SearchClient:
    """`await search(queries)`; safe to use from many coroutines of one event loop.

    A call asks the least busy of the servers that work, and another one if that fails (see `Balancer`). Its deadline
    (`timeout_s` for every 512 queries) covers everything: waiting for a connection, all attempts and the pauses between
    them.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        topk: int = 3,
        timeout_s: float = 30.0,
        retries: int = 8,
        max_connections: int = 256,
        token: str | None = None,
    ) -> None:
        if not addresses:
            raise UserError("tools.search.server_addr: names no server")
        self._urls = [base_url(address) for address in addresses]
        self._topk = topk
        self._timeout_s = timeout_s
        self._retries = retries
        self._max_connections = max_connections
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._rng = random.Random()
        self._balancer = Balancer(len(self._urls), time.monotonic, self._rng)
        self._session: aiohttp.ClientSession | None = None
        self._stats = ClientStats()

    @classmethod
    def from_config(cls, search: SearchToolConfig, max_connections: int = 256) -> SearchClient:
        """Make the client of `tools.search`; its bearer token comes from the environment.

        Raises:
            UserError: an address is missing or wrong.
        """
        return cls(
            server_addresses(search),
            topk=search.topk,
            timeout_s=search.timeout_s,
            retries=search.retries,
            max_connections=max_connections,
            token=os.environ.get(TOKEN_VARIABLE),
        )

    @property
    def stats(self) -> ClientStats:
        """Return the counts since the start."""
        return replace(self._stats, opens=self._balancer.opens)

    async def search(self, queries: Sequence[str]) -> list[list[RetrievedDocument]]:
        """Return the passages for each query, best first.

        Raises:
            SearchUnavailable: no usable answer within the deadline.
        """
        if not queries:
            return []
        body = {"queries": list(queries), "topk": self._topk, "return_scores": True}
        return await self._call("/retrieve", body, lambda passages: [_document(item) for item in passages], len(queries))

    async def access(self, urls: Sequence[str]) -> list[Page | None]:
        """Return the page behind each address, or None.

        Raises:
            SearchUnavailable: no usable answer within the deadline.
        """
        if not urls:
            return []
        return await self._call("/access", {"urls": list(urls)}, _page, len(urls))

    async def aclose(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _call(self, path: str, body: dict[str, Any], read: Callable[[Any], T], expected: int) -> list[T]:
        """Post to one server after the other until one gives `expected` results that `read` understands."""
        self._stats.calls += 1
        timeout_s = scaled_timeout(self._timeout_s, expected, QUERIES_PER_TIMEOUT)
        retries = Retries(BACKOFF, self._rng, attempts=self._retries + 1, timeout_s=timeout_s, last_attempt=True)
        tried: set[int] = set()
        while True:
            server = self._balancer.choose(tried)
            tried.add(server)
            # A server that hangs must leave time for the others, if there are others.
            others = min(self._retries - retries.failures, len(self._urls) - len(tried))
            seconds = retries.remaining_s() / (others + 1)
            try:
                async with asyncio.timeout(seconds):
                    result = await self._post(self._urls[server] + path, body, expected)
                if len(result) != expected:
                    raise ValueError(f"answered {len(result)} results for {expected}")
                results = [read(item) for item in result]
            except _ErrorStatus as error:
                self._record_status(server, error)
                problem = f"{self._urls[server]}{path}: {error}"
                if error.status not in RETRY_STATUS:
                    break
            except TimeoutError:
                self._balancer.done(server, worked=False)
                problem = f"{self._urls[server]}{path}: no answer within {seconds:.1f} s"
            except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                self._balancer.done(server, worked=False)
                problem = f"{self._urls[server]}{path}: {type(error).__name__} {error}".strip()
            except BaseException:
                self._balancer.cancelled(server)
                raise
            else:
                self._balancer.done(server, worked=True)
                return results
            if (wait_s := retries.next_wait_s()) is None:
                break
            self._stats.retries += 1
            if len(tried) == len(self._urls):  # every server has had its turn: give them time
                await asyncio.sleep(wait_s)
                tried.clear()
        self._stats.failures += 1
        raise SearchUnavailable(problem)

    def _record_status(self, server: int, answer: _ErrorStatus) -> None:
        """Record what a status means for its server: not the client's own mistakes, and "try later" is not a failure."""
        if answer.status in (429, 503) and answer.retry_after_s is not None:
            self._balancer.busy(server, answer.retry_after_s)
        else:
            self._balancer.done(server, worked=answer.status not in RETRY_STATUS)

    async def _post(self, url: str, body: dict[str, Any], asked: int) -> list[Any]:
        """Make one attempt; a connection on which anything went wrong is not used again."""
        if self._session is None:
            # The deadline of the call is the only time limit.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._max_connections),
                timeout=aiohttp.ClientTimeout(total=None),
                headers=self._headers,
            )
        async with self._session.post(url, json=body) as response:
            if response.status != 200:
                raise _ErrorStatus(response.status, await read_error(response), response.headers.get("retry-after"))
            result = (await read_json(response, asked))["result"]
        if not isinstance(result, list):
            raise ValueError("result is not a list")
        return result


class _ErrorStatus(Exception):
    """A server answered with another status than 200."""

    def __init__(self, status: int, text: str, header: str | None) -> None:
        super().__init__(f"status {status}: {text[:200]}")
        self.status = status
        self.retry_after_s = parse_retry_after(header)


def _page(item: dict[str, Any] | None) -> Page | None:
    return Page(str(item.get("url", "")), str(item.get("contents", ""))) if item else None


def _document(item: dict[str, Any]) -> RetrievedDocument:
    """Read `{"document": …, "score": …}` or a bare document: servers answer either."""
    document = item.get("document", item)
    contents = str(document.get("contents", ""))
    title, text = split_contents(contents)
    return RetrievedDocument(
        id=str(document.get("id", "")),
        title=str(document.get("title") or title),
        text=text,
        url=document.get("url"),
        score=item.get("score"),
        contents=contents,
    )


def wait_until_healthy(address: str, timeout_s: float) -> None:
    """Wait until a server can be searched: until its /ready, or its /health where there is no /ready, answers 200.

    Raises:
        UserError: it did not answer in time.
    """
    url = base_url(address)
    started = reported = time.monotonic()
    while True:
        status = _status(f"{url}/ready")
        if status == 404:  # of another system
            status = _status(f"{url}/health")
        if status == 200:
            return
        now = time.monotonic()
        if now - started > timeout_s:
            reason = "did not answer" if status is None else f"answered {status}"
            raise UserError(f"the retrieval server at {address} {reason} within {timeout_s:.0f} s ({url}/ready)")
        if now - reported > REPORT_EVERY_S:
            reported = now
            print(f"waiting for the retrieval server at {address} ({now - started:.0f} s)", file=sys.stderr, flush=True)
        time.sleep(0.1)


def _status(url: str) -> int | None:
    """Return the status of an address; None if nobody answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2.0) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return None
