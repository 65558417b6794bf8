"""Requests of many clients, searched together."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from searchr1.retrieval.corpus import Corpus, Document
from searchr1.retrieval.indexes import Index

MAX_BATCH = 512
"""Queries searched at once; what is more waits for the next turn."""

Found = list[list[tuple[Document, float]]]
"""For each query (passage, score), best first."""


@dataclass(slots=True)
class _Waiting:
    queries: list[str]
    topk: int
    answer: asyncio.Future[Found] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """Searches what has come in while the last search ran, all at once: one matrix product instead of many.

    The search runs in one thread of its own, so the event loop stays free to take requests.
    """

    def __init__(self, index: Index, corpus: Corpus) -> None:
        self._index = index
        self._corpus = corpus
        self._waiting: list[_Waiting] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")
        self._running: asyncio.Task[None] | None = None

    async def search(self, queries: list[str], topk: int) -> Found:
        """At most `topk` passages for each query."""
        request = _Waiting(queries, topk)
        self._waiting.append(request)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await request.answer

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = self._take()
            texts = list(dict.fromkeys(query for request in batch for query in request.queries))
            try:
                answers = await loop.run_in_executor(self._thread, self._search, texts, batch[0].topk)
            except Exception as error:
                for request in batch:
                    if not request.answer.done():
                        request.answer.set_exception(error)
                continue
            found = dict(zip(texts, answers, strict=True))
            for request in batch:
                if not request.answer.done():
                    request.answer.set_result([found[query] for query in request.queries])

    def _take(self) -> list[_Waiting]:
        """The oldest request and those that can be searched with it.

        Only requests of the same `topk`: among equal scores the choice may depend on it, and an answer must not depend
        on who else is asking.
        """
        topk, queries = self._waiting[0].topk, 0
        batch: list[_Waiting] = []
        rest: list[_Waiting] = []
        for request in self._waiting:
            if request.topk == topk and (not batch or queries + len(request.queries) <= MAX_BATCH):
                batch.append(request)
                queries += len(request.queries)
            else:
                rest.append(request)
        self._waiting = rest
        return batch

    def _search(self, texts: list[str], topk: int) -> Found:
        return [[(self._corpus[row], score) for row, score in hits] for hits in self._index.search(texts, topk)]
