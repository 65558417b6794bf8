"""What stands between requests and a searcher: joining, caching, refusing, deadlines."""

from __future__ import annotations

import asyncio
import json

import pytest

from searchr1.retrieval.documents import encode_json
from searchr1.retrieval.searcher import SearchFailed
from searchr1.retrieval.server.batcher import Batcher
from searchr1.retrieval.server.metrics import Metrics
from searchr1.retrieval.server.service import AnswerCache, Depth, Limits, RetrievalService, encode


class SlowSearcher:
    """Answers when it is told to, and remembers what it was asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[list[str]] = []
        self.go = asyncio.Event()
        self.error = error
        self.closed = False

    async def search(self, queries, topk):
        self.asked.append(list(queries))
        await self.go.wait()
        if self.error:
            raise self.error
        return [
            [({"id": query, "contents": f"{query} {rank}"}, 1.0 / (rank + 1)) for rank in range(topk)] for query in queries
        ]

    async def aclose(self):
        self.closed = True


class Reranking(SlowSearcher):
    async def search_reranked(self, queries, topk_retrieval, topk_rerank):
        return [[({"id": f"{topk_retrieval}/{topk_rerank}", "contents": ""}, 0.0)] for _ in queries]


def make(searcher, **limits):
    return RetrievalService(searcher, Limits(**limits), Metrics())


def ids(body):
    return [[hit["id"] for hit in hits] for hits in json.loads(body)["result"]]


def test_identical_queries_in_flight_are_searched_once():
    async def run():
        searcher = SlowSearcher()
        service = make(searcher, cache_bytes=0)
        calls = [asyncio.create_task(service.retrieve(["a", "b", "a"], Depth(1), False)) for _ in range(5)]
        calls.append(asyncio.create_task(service.retrieve(["b", "c"], Depth(1), False)))
        await asyncio.sleep(0.01)
        searcher.go.set()
        return searcher.asked, [ids(body) for body in await asyncio.gather(*calls)]

    asked, found = asyncio.run(run())
    assert asked == [["a", "b"], ["c"]]
    assert found == [[["a"], ["b"], ["a"]]] * 5 + [[["b"], ["c"]]]


def test_a_large_request_has_more_time_than_a_small_one():
    async def run():
        searcher = SlowSearcher()
        service = make(searcher, timeout_s=0.1)
        large = asyncio.create_task(service.retrieve([str(number) for number in range(1025)], Depth(1), False))
        with pytest.raises(SearchFailed, match=r"no answer within 0\.1 s"):
            await service.retrieve(["a"], Depth(1), False)
        with pytest.raises(SearchFailed, match=r"no answer within 0\.3 s"):
            await large
        await service.aclose()

    asyncio.run(run())


def test_answers_are_cached_by_all_that_they_depend_on():
    async def run():
        searcher = SlowSearcher()
        searcher.go.set()
        service = make(searcher)
        for _ in range(3):
            await service.retrieve(["a"], Depth(1), False)
        await service.retrieve(["a"], Depth(2), False)
        scored = await service.retrieve(["a"], Depth(1), True)
        return searcher.asked, scored

    asked, scored = asyncio.run(run())
    assert asked == [["a"]] * 3
    assert json.loads(scored) == {"result": [[{"document": {"id": "a", "contents": "a 0"}, "score": 1.0}]]}


def test_a_full_queue_rejects_and_takes_again():
    async def run():
        searcher = SlowSearcher()
        service = make(searcher, max_pending=2, cache_bytes=0)
        first = asyncio.create_task(service.retrieve(["a", "b"], Depth(1), False))
        await asyncio.sleep(0)
        with pytest.raises(SearchFailed, match="2 queries are waiting") as refused:
            await service.retrieve(["c"], Depth(1), False)
        assert refused.value.retry_after_s == 1.0
        joined = asyncio.create_task(service.retrieve(["a"], Depth(1), False))  # costs nothing, so it is taken
        await asyncio.sleep(0)
        searcher.go.set()
        await asyncio.gather(first, joined)
        # A request larger than the queue is taken by an idle server: it could never be answered otherwise.
        assert len(ids(await service.retrieve(["d", "e", "f"], Depth(1), False))) == 3

    asyncio.run(run())


def test_a_deadline_ends_one_request_and_not_the_search():
    async def run():
        searcher = SlowSearcher()
        service = make(searcher, timeout_s=0.05)
        with pytest.raises(SearchFailed, match="no answer within"):
            await service.retrieve(["a"], Depth(1), False)
        searcher.go.set()
        await asyncio.sleep(0.01)
        assert ids(await service.retrieve(["a"], Depth(1), False)) == [["a"]]
        assert searcher.asked == [["a"]]

    asyncio.run(run())


def test_a_client_that_goes_away_takes_no_answer_from_others():
    async def run():
        searcher = SlowSearcher()
        service = make(searcher, cache_bytes=0)
        gone = asyncio.create_task(service.retrieve(["a"], Depth(1), False))
        await asyncio.sleep(0)
        stays = asyncio.create_task(service.retrieve(["a"], Depth(1), False))
        await asyncio.sleep(0)
        gone.cancel()
        searcher.go.set()
        assert ids(await stays) == [["a"]]

    asyncio.run(run())


def test_a_failed_search_fails_all_who_wait_and_the_next_one_is_tried_again():
    async def run():
        searcher = SlowSearcher(SearchFailed("the engine is down", 7.0))
        service = make(searcher)
        calls = [asyncio.create_task(service.retrieve(["a"], Depth(1), False)) for _ in range(2)]
        await asyncio.sleep(0)
        searcher.go.set()
        problems = await asyncio.gather(*calls, return_exceptions=True)
        assert [str(problem) for problem in problems] == ["the engine is down"] * 2
        searcher.error = None
        assert ids(await service.retrieve(["a"], Depth(1), False)) == [["a"]]

    asyncio.run(run())


def test_closing_fails_what_runs():
    async def run():
        searcher = SlowSearcher()
        service = make(searcher)
        call = asyncio.create_task(service.retrieve(["a"], Depth(1), False))
        await asyncio.sleep(0)
        await service.aclose()
        with pytest.raises(SearchFailed, match="stopping"):
            await call
        assert searcher.closed

    asyncio.run(run())


def test_the_depth_of_reranking_is_passed_on():
    async def run():
        searcher = Reranking()
        searcher.go.set()
        service = make(searcher)
        assert service.reranks
        assert not make(SlowSearcher()).reranks
        return [ids(await service.retrieve(["a"], depth, False)) for depth in (Depth(1, 7), Depth(1, 8), Depth(1))]

    assert asyncio.run(run()) == [[["7/1"]], [["8/1"]], [["a"]]]


def test_the_cache_keeps_to_its_size_and_drops_the_oldest():
    cache = AnswerCache(3 * (200 + 4 + 10))
    keys = [(name, Depth(1), False) for name in "abcd"]
    for key in keys[:3]:
        cache.put(key, b"x" * 10)
    cache.get(keys[0])
    cache.put(keys[3], b"x" * 10)
    assert [cache.get(key) is not None for key in keys] == [True, False, True, True]
    cache.put(keys[1], b"x" * 10_000)
    assert [cache.get(key) is not None for key in keys] == [True, False, True, True]


def test_half_surrogate_pairs_are_escaped():
    assert json.loads(encode_json({"a": "\ud83d"})) == {"a": "\ud83d"}
    assert encode([({"id": "1", "contents": "é"}, 0.5)], False) == '[{"id":"1","contents":"é"}]'.encode()


class CountingIndex:
    rows = 10

    def __init__(self) -> None:
        self.batches: list[tuple[list[str], int]] = []

    def search(self, queries, topk):
        self.batches.append((list(queries), topk))
        if "bad" in queries:
            raise RuntimeError("broken")
        return [[(int(query), 1.0)] for query in queries]


def test_the_batcher_joins_what_waits_by_topk():
    async def run():
        index = CountingIndex()
        seen = []
        batcher = Batcher(index, [{"id": str(row)} for row in range(10)], lambda queries, _: seen.append(queries))
        asks = [(["1"], 1), (["2"], 1), (["3", "4"], 2), (["2"], 1)]
        found = await asyncio.gather(*(batcher.search(queries, topk) for queries, topk in asks))
        with pytest.raises(RuntimeError):
            await batcher.search(["bad"], 1)
        again = await batcher.search(["5"], 1)
        await batcher.aclose()
        return index.batches, seen, [[hits[0][0]["id"] for hits in hits_of] for hits_of in (*found, again)]

    batches, seen, found = asyncio.run(run())
    assert batches == [(["1", "2"], 1), (["3", "4"], 2), (["bad"], 1), (["5"], 1)]
    assert seen == [2, 2, 1]
    assert found == [["1"], ["2"], ["3", "4"], ["2"], ["5"]]


def test_a_request_given_up_before_its_turn_is_not_searched():
    async def run():
        index = CountingIndex()
        batcher = Batcher(index, [{"id": str(row)} for row in range(10)])
        first = asyncio.create_task(batcher.search(["1"], 1))
        second = asyncio.create_task(batcher.search(["2"], 2))
        await asyncio.sleep(0)
        second.cancel()
        await first
        await asyncio.sleep(0.01)
        await batcher.aclose()
        return index.batches

    assert asyncio.run(run()) == [(["1"], 1)]
