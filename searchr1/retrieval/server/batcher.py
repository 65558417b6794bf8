"""A local index as a searcher: requests of many clients, searched together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from searchr1.retrieval.index.corpus import Corpus
from searchr1.retrieval.searcher import BatchObserver, Index, SearchResults

MAX_BATCH = 512
"""Queries searched at once; more wait for the next turn."""

MAX_EMPTY = 64
"""At most so many passages are asked for beyond `topk`, since empty ones are left out."""


@dataclass(slots=True)
class _Waiting:
    """A request, or a part of a large one."""

    queries: Sequence[str]
    topk: int
    answer: asyncio.Future[SearchResults] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """Searches what has come in while the last search ran, all at once: one matrix product instead of many.

    The search runs in one thread of its own, so the event loop stays free to take requests. A request that was
    cancelled before its turn is not searched.
    """

    def __init__(self, index: Index, corpus: Corpus, observe: BatchObserver | None = None, empty: int = 0) -> None:
        """Start a thread for searches; `empty`: passages of the corpus without text, which are left out of answers."""
        self._index = index
        self._corpus = corpus
        self._observe = observe
        self._empty = min(empty, MAX_EMPTY)
        self._waiting: list[_Waiting] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")
        self._running: asyncio.Task[None] | None = None

    async def search(self, queries: Sequence[str], topk: int) -> SearchResults:
        """Return at most `topk` passages for each query."""
        parts = [_Waiting(queries[start : start + MAX_BATCH], topk) for start in range(0, len(queries), MAX_BATCH)]
        self._waiting += parts
        if parts and (self._running is None or self._running.done()):
            self._running = asyncio.create_task(self._run())
        answers = asyncio.gather(*(part.answer for part in parts))
        try:
            return [hits for results in await answers for hits in results]
        finally:  # when the request is cancelled, or a part fails, the other parts are given up too
            for part in parts:
                part.answer.cancel()

    async def aclose(self) -> None:
        """Wait for the search that runs, drop what waits."""
        for request in self._waiting:
            request.answer.cancel()
        self._waiting = []
        await asyncio.to_thread(self._thread.shutdown)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._take():
            texts = list(dict.fromkeys(query for request in batch for query in request.queries))
            started = time.perf_counter()
            try:
                answers = await loop.run_in_executor(self._thread, self._search, texts, batch[0].topk)
            except Exception as error:
                for request in batch:
                    if not request.answer.done():
                        request.answer.set_exception(error)
                continue
            if self._observe:
                self._observe(len(texts), time.perf_counter() - started)
            hits_of = dict(zip(texts, answers, strict=True))
            for request in batch:
                if not request.answer.done():
                    request.answer.set_result([hits_of[query] for query in request.queries])

    def _take(self) -> list[_Waiting]:
        """Take the oldest request and those that can be searched with it: of the same `topk`, up to `MAX_BATCH` queries."""
        self._waiting = [request for request in self._waiting if not request.answer.done()]
        queries = 0
        batch: list[_Waiting] = []
        rest: list[_Waiting] = []
        for request in self._waiting:
            fits = not batch or (request.topk == batch[0].topk and queries + len(request.queries) <= MAX_BATCH)
            (batch if fits else rest).append(request)
            queries += len(request.queries) if fits else 0
        self._waiting = rest
        return batch

    def _search(self, texts: list[str], topk: int) -> SearchResults:
        results = [
            [(self._corpus[row], score) for row, score in hits] for hits in self._index.search(texts, topk + self._empty)
        ]
        if self._empty:
            results = [[hit for hit in hits if hit[0]["contents"].strip()][:topk] for hits in results]
        return results
