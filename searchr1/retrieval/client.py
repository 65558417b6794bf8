"""The agent's side of the retrieval server: pooled connections, a deadline per call, retries over several servers."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from searchr1.errors import UserError
from searchr1.retrieval.documents import Page, RetrievedDocument, split_contents

FIRST_PAUSE_S = 0.1
RETRY_STATUS = {429, 500, 502, 503, 504}


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
        UserError: empty.
    """
    text = address.strip().rstrip("/").removesuffix("/retrieve")
    if not text:
        raise UserError("tools.search.server_addr: is empty; give host:port of the retrieval server")
    text = text if "://" in text else f"http://{text}"
    return text.replace("://0.0.0.0", "://127.0.0.1")


class SearchClient:
    """`await search(queries)`; safe to use from many coroutines of one event loop."""

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
        self._http = httpx.AsyncClient(
            limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
            headers={"Authorization": f"Bearer {token}"} if token else None,
            trust_env=False,
        )
        self.stats = ClientStats()

    async def search(self, queries: Sequence[str]) -> list[list[RetrievedDocument]]:
        """Passages for each query, best first.

        Raises:
            SearchUnavailable: no usable answer within the deadline.
        """
        body = {"queries": list(queries), "topk": self._topk, "return_scores": True}
        answer = await self._post("/retrieve", body, len(queries))
        try:
            return [[_document(item) for item in found] for found in answer]
        except (AttributeError, TypeError) as error:
            raise self._malformed("/retrieve", error) from error

    async def access(self, urls: Sequence[str]) -> list[Page | None]:
        """The page behind each address, or None.

        Raises:
            SearchUnavailable: no usable answer within the deadline.
        """
        answer = await self._post("/access", {"urls": list(urls)}, len(urls))
        try:
            return [Page(page.get("url", ""), page.get("contents", "")) if page else None for page in answer]
        except AttributeError as error:
            raise self._malformed("/access", error) from error

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def _malformed(self, path: str, error: Exception) -> SearchUnavailable:
        self.stats.failures += 1
        return SearchUnavailable(f"{path} answered in another shape than documented ({error})")

    async def _post(self, path: str, body: dict[str, Any], expected: int) -> list[Any]:
        self.stats.calls += 1
        deadline = time.monotonic() + self._timeout_s
        pause = FIRST_PAUSE_S
        problem = "no attempt was made"
        for attempt in range(self._retries + 1):
            self._next = (self._next + 1) % len(self._urls)
            url = self._urls[self._next] + path
            left = deadline - time.monotonic()
            if left <= 0:
                break
            try:
                # httpx's own timeout is per phase: a server that drips bytes would pass the deadline.
                async with asyncio.timeout(left):
                    response = await self._http.post(url, json=body, timeout=left)
                if response.status_code == 200:
                    result = response.json().get("result")
                    if isinstance(result, list) and len(result) == expected:
                        return result
                    problem = f"{url} answered {len(result) if isinstance(result, list) else 'no'} results for {expected}"
                else:
                    problem = f"{url} answered {response.status_code}: {response.text[:200]}"
                    if response.status_code not in RETRY_STATUS:
                        break
            except (httpx.HTTPError, TimeoutError, ValueError, AttributeError) as error:
                problem = f"{url}: {type(error).__name__} {error}".strip()
            if attempt < self._retries:
                self.stats.retries += 1
                await asyncio.sleep(min(pause * random.uniform(0.5, 1.5), max(deadline - time.monotonic(), 0)))
                pause *= 2
        self.stats.failures += 1
        raise SearchUnavailable(problem)


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
