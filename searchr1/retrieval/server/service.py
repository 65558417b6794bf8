"""What is between the requests and a searcher: one search per query, a cache of answers, a bounded queue, deadlines."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from searchr1.retrieval.documents import QUERIES_PER_TIMEOUT, encode_json, scaled_timeout
from searchr1.retrieval.searcher import Document, Reranks, Searcher, SearchFailed
from searchr1.retrieval.server.metrics import Metrics

RETRY_AFTER_S = 1.0
ENTRY_BYTES = 200
"""About what an entry of the cache takes beside its text."""


@dataclass(frozen=True, slots=True)
class Depth:
    """How many passages to look for."""

    topk: int
    candidates: int | None = None
    """With a reranker: passages that it looks at (`topk_retrieval`); None leaves that to the server's setting."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a service."""

    max_pending: int = 4096
    """Queries that wait or are being searched; more are rejected with 503."""
    timeout_s: float = 30.0
    """A request of `QUERIES_PER_TIMEOUT` queries that takes longer is rejected with 503; a larger one has more time."""
    cache_bytes: int = 256 << 20


Key = tuple[str, Depth, bool]


class RetrievalService:
    """Answers queries with encoded JSON. Queries that are being searched already are not searched twice."""

    def __init__(self, searcher: Searcher, limits: Limits, metrics: Metrics) -> None:
        self._searcher = searcher
        self._second_stage = searcher if isinstance(searcher, Reranks) else None
        self._limits = limits
        self._metrics = metrics
        self._cache = AnswerCache(limits.cache_bytes)
        self._running: dict[Key, asyncio.Future[bytes]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pending = 0

    @property
    def reranks(self) -> bool:
        """Whether `Depth.candidates` has an effect."""
        return self._second_stage is not None

    async def retrieve(self, queries: Sequence[str], depth: Depth, return_scores: bool) -> bytes:
        """Return `{"result": [...]}`, encoded.

        Raises:
            SearchFailed: too much is waiting, the deadline passed, or the searcher failed.
        """
        answers: dict[str, bytes] = {}
        futures: dict[str, asyncio.Future[bytes]] = {}
        new: dict[Key, asyncio.Future[bytes]] = {}
        loop = asyncio.get_running_loop()
        for query in dict.fromkeys(queries):
            key = (query, depth, return_scores)
            if (cached := self._cache.get(key)) is not None:
                answers[query] = cached
            elif running := self._running.get(key):
                futures[query] = running
            else:
                futures[query] = new[key] = loop.create_future()
        self._metrics.queries.labels("cache").inc(len(answers))
        self._metrics.queries.labels("joined").inc(len(futures) - len(new))
        if new:
            self._start(new, depth, return_scores)
        if futures:
            # `wait` leaves the futures alone when the deadline passes or the client goes: others may wait for them.
            timeout_s = scaled_timeout(self._limits.timeout_s, len(futures), QUERIES_PER_TIMEOUT)
            _, late = await asyncio.wait(futures.values(), timeout=timeout_s)
            if late:
                raise SearchFailed(f"no answer within {timeout_s:g} s", RETRY_AFTER_S)
            answers |= {query: future.result() for query, future in futures.items()}
        return b'{"result":[' + b",".join(answers[query] for query in queries) + b"]}"

    async def aclose(self) -> None:
        """Stop what runs and close the searcher."""
        for task in self._tasks:
            task.cancel()
        for future in self._running.values():
            _fail(future, SearchFailed("the server is stopping"))
        await self._searcher.aclose()

    def _start(self, new: dict[Key, asyncio.Future[bytes]], depth: Depth, return_scores: bool) -> None:
        if self._pending and self._pending + len(new) > self._limits.max_pending:
            raise SearchFailed(f"{self._pending} queries are waiting", RETRY_AFTER_S)
        self._metrics.queries.labels("searched").inc(len(new))
        self._pending += len(new)
        self._metrics.pending.set(self._pending)
        self._running |= new
        task = asyncio.create_task(self._search(new, depth, return_scores))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _search(self, new: dict[Key, asyncio.Future[bytes]], depth: Depth, return_scores: bool) -> None:
        queries = [key[0] for key in new]
        try:
            if depth.candidates is not None and self._second_stage is not None:
                results = await self._second_stage.search_reranked(queries, depth.candidates, depth.topk)
            else:
                results = await self._searcher.search(queries, depth.topk)
            for (key, future), hits in zip(new.items(), results, strict=True):
                answer = encode(hits, return_scores)
                self._cache.put(key, answer)
                future.set_result(answer)
        except Exception as error:
            for future in new.values():
                _fail(future, error)
        finally:
            for key in new:
                self._running.pop(key, None)
            self._pending -= len(new)
            self._metrics.pending.set(self._pending)


def _fail(future: asyncio.Future[bytes], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # all who waited may have gone: then nobody else reads it


class AnswerCache:
    """Encoded answers, the least recently used ones dropped first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._answers: OrderedDict[Key, bytes] = OrderedDict()

    def get(self, key: Key) -> bytes | None:
        """Return the answer, if it is still there."""
        answer = self._answers.get(key)
        if answer is not None:
            self._answers.move_to_end(key)
        return answer

    def put(self, key: Key, answer: bytes) -> None:
        """Remember an answer."""
        if key in self._answers or _size(key, answer) > self._max_bytes:
            return
        self._answers[key] = answer
        self._bytes += _size(key, answer)
        while self._bytes > self._max_bytes:
            self._bytes -= _size(*self._answers.popitem(last=False))


def _size(key: Key, answer: bytes) -> int:
    return len(answer) + 4 * len(key[0]) + ENTRY_BYTES


def encode(hits: Sequence[tuple[Document, float]], return_scores: bool) -> bytes:
    """Encode the passages of one query as JSON."""
    items = [{"document": d, "score": score} for d, score in hits] if return_scores else [d for d, _ in hits]
    return encode_json(items)
