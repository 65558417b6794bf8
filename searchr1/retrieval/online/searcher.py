"""An online engine as a searcher."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import aiohttp

from searchr1.files.text_rows import whole_text
from searchr1.retrieval.client.answers import read_json
from searchr1.retrieval.documents import Page
from searchr1.retrieval.index.tokens import split_passage, split_query
from searchr1.retrieval.online.disk_cache import DiskCache
from searchr1.retrieval.online.engines import Engine, Hit, Request
from searchr1.retrieval.online.fetch import PageFetcher, proxy_for
from searchr1.retrieval.searcher import Document, SearchFailed, SearchResults
from searchr1.retry import Backoff, Retries, parse_retry_after

PASSAGE_CHARACTERS = 1200
"""Most characters of a fetched page that are returned."""
ATTEMPTS = 4
BACKOFF = Backoff(0.5, 8.0, (0.5, 1.5))
LONGEST_WORD = 60
"""A stretch is cut at a space if there is one so near to its end."""


class OnlineSearcher:
    """Passages from an engine: its snippets, or the part of each page that has most of the query's words.

    A page that cannot be fetched is replaced by its snippet and counted in `fetcher.failures`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        address: str | None = None,
        snippet_only: bool = False,
        concurrency: int = 256,
        timeout_s: float = 30.0,
        cache: DiskCache | None = None,
        fetcher: PageFetcher | None = None,
    ) -> None:
        """Make a searcher. `address` replaces the engine's own; a proxy is taken from the environment, see `proxy_for`.

        Raises:
            UserError: a key is missing in the environment, or a variable names no proxy.
        """
        self._engine = engine
        self._address = address or engine.address
        self._keys = engine.keys()
        self._proxy = proxy_for(self._address)
        self._snippet_only = snippet_only
        self._timeout_s = timeout_s
        self._free = asyncio.Semaphore(concurrency)
        self._rng = random.Random()
        self._cache = cache
        self.fetcher = fetcher or PageFetcher()
        self._session: aiohttp.ClientSession | None = None

    async def search(self, queries: Sequence[str], topk: int) -> SearchResults:
        """Return the results of each query; scores are 1 / rank.

        Raises:
            SearchFailed: the engine refused, failed, or was too slow.
        """
        return list(await asyncio.gather(*(self._search(query, topk) for query in queries)))

    async def access(self, urls: Sequence[str]) -> list[Page | None]:
        """Return the text of the page behind each address."""
        return list(await asyncio.gather(*(self._page(url) for url in urls)))

    async def aclose(self) -> None:
        """Close connections and cache."""
        if self._session is not None:
            await self._session.close()
        await self.fetcher.aclose()
        if self._cache is not None:
            await self._cache.aclose()

    async def _search(self, query: str, topk: int) -> list[tuple[Document, float]]:
        query = whole_text(query)
        if not query.strip():
            return []
        hits = (await self._hits(query, topk))[:topk]
        texts = [hit.snippet for hit in hits]
        if not self._snippet_only:
            pages = await asyncio.gather(*(self._page(hit.url) for hit in hits))
            texts = [best_part(page.contents, query) if page else text for page, text in zip(pages, texts, strict=True)]
        return [
            ({"id": hit.url, "contents": f'"{hit.title}"\n{text}', "url": hit.url}, 1 / rank)
            for rank, (hit, text) in enumerate(zip(hits, texts, strict=True), start=1)
        ]

    async def _hits(self, query: str, topk: int) -> list[Hit]:
        key = f"search {self._engine.name} {topk} {hashlib.sha256(query.encode('utf-8', 'replace')).hexdigest()}"
        if self._cache is not None and (known := await self._cache.get(key)) is not None:
            with suppress(TypeError):  # an entry that this version did not write
                return [Hit(**hit) for hit in known]
        request = self._engine.ask(self._address, query, topk, self._keys)
        try:
            async with self._free, asyncio.timeout(self._timeout_s):  # a large request waits for its turn
                hits = self._read(await self._ask(request))
        except TimeoutError as error:
            raise SearchFailed(f"{self._engine.name}: no answer within {self._timeout_s:g} s", 1.0) from error
        if self._cache is not None:
            await self._cache.put(key, [asdict(hit) for hit in hits])
        return hits

    def _read(self, answer: Any) -> list[Hit]:
        try:
            hits = {hit.url: hit for hit in reversed(self._engine.read(answer))}  # the first of each address stays
            return [Hit(str(hit.title), str(hit.url), str(hit.snippet)) for hit in reversed(hits.values())]
        except (KeyError, TypeError, AttributeError) as error:
            raise SearchFailed(f"{self._engine.name}: an answer of another shape ({error!r})") from error

    async def _ask(self, request: Request) -> Any:
        """Send the request; try again after a pause where the engine is busy."""
        retries = Retries(BACKOFF, self._rng, attempts=ATTEMPTS)
        while True:
            try:
                async with self._client().request(
                    request.method,
                    request.url,
                    headers=request.headers,
                    params=request.params,
                    json=request.json,
                    proxy=self._proxy.url if self._proxy else None,
                ) as answer:
                    if answer.status == 200:
                        return await read_json(answer)
                    problem = self._error_of_status(answer.status, answer.headers.get("retry-after"))
            except ValueError as error:
                raise SearchFailed(f"{self._engine.name}: an answer that is no JSON, or too large") from error
            except aiohttp.ClientError as error:  # its text may hold the address, and that the key
                problem = SearchFailed(f"{self._engine.name}: {type(error).__name__}{self._through(error)}", 1.0)
            if problem.retry_after_s is None or (wait_s := retries.next_wait_s(problem.retry_after_s)) is None:
                raise problem
            await asyncio.sleep(wait_s)

    def _through(self, error: aiohttp.ClientError) -> str:
        """Return a note on the proxy for the message of a failure."""
        if self._proxy is None:
            return ""
        status = f", which answered {error.status}" if isinstance(error, aiohttp.ClientHttpProxyError) else ""
        return f" (through the proxy of {self._proxy.variable}{status})"

    def _error_of_status(self, status: int, header: str | None) -> SearchFailed:
        name = self._engine.name
        if status in (401, 403):
            return SearchFailed(
                f"{name}: refused the key in {self._engine.variables[0]}, or its quota is used up ({status})"
            )
        if status == 407 and self._proxy:
            return SearchFailed(f"{name}: the proxy of {self._proxy.variable} wants another user or password (407)")
        if status == 429 or status >= 500:
            return SearchFailed(f"{name}: busy ({status})", parse_retry_after(header) or 0.0)
        return SearchFailed(f"{name}: answered {status}")

    async def _page(self, url: str) -> Page | None:
        key = f"page {hashlib.sha256(url.encode('utf-8', 'replace')).hexdigest()}"
        if self._cache is not None and (known := await self._cache.get(key)) is not None:
            with suppress(TypeError):
                return Page(**known)
        page = await self.fetcher.fetch(url)
        if page is not None and self._cache is not None:
            await self._cache.put(key, asdict(page))
        return page

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self._timeout_s))
        return self._session


def best_part(text: str, query: str) -> str:
    """Return the stretch of at most `PASSAGE_CHARACTERS`, cut between words, that has most different words of the query.

    Stretches begin at half of that length from each other; the earliest of the best is taken.
    """
    if len(text) <= PASSAGE_CHARACTERS:
        return text
    wanted = set(split_query(query))
    starts = range(0, len(text), PASSAGE_CHARACTERS // 2)

    def words_at(start: int) -> int:
        return len(wanted.intersection(split_passage(text[start : start + PASSAGE_CHARACTERS])))

    start = max(starts, key=lambda place: (words_at(place), -place))
    part = text[start : start + PASSAGE_CHARACTERS]
    if start:
        head, _, rest = part.partition(" ")
        part = rest if rest and len(head) <= LONGEST_WORD else part
    if start + PASSAGE_CHARACTERS < len(text):
        rest, _, tail = part.rpartition(" ")
        part = rest if rest and len(tail) <= LONGEST_WORD else part
    return part.strip()
