"""Requests to the server, and answers of servers and engines, are bounded; a hostile one is one clear failure."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import sqlite3
from contextlib import asynccontextmanager

import httpx
import pytest
from aiohttp import web

from searchr1.retrieval.client import answers
from searchr1.retrieval.client.client import SearchClient, SearchUnavailable
from searchr1.retrieval.online import searcher
from searchr1.retrieval.online.disk_cache import FILE, DiskCache
from searchr1.retrieval.online.engines import ENGINES
from searchr1.retrieval.online.searcher import OnlineSearcher
from searchr1.retrieval.rerank.client import RemoteReranker
from searchr1.retrieval.searcher import SearchFailed
from searchr1.retrieval.server.app import Backend, ServerState, create_app
from searchr1.retrieval.server.metrics import Metrics
from searchr1.retrieval.server.service import Limits, RetrievalService


@asynccontextmanager
async def answering(body, status=200, headers=None):
    async def answer(request):
        return web.Response(body=body, status=status, headers={"content-type": "application/json", **(headers or {})})

    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


BOMB = gzip.compress(b'{"result": [' + b" " * (20 << 20) + b"]}")
PACKED = {"content-encoding": "gzip"}
HOSTILE = [
    (BOMB, PACKED, "larger than 1 MiB"),
    (b'{"result": [' + b" " * (3 << 20) + b"]}", None, "larger than 1 MiB"),
    (b"[" * 100_000, None, "nested"),
    (b'{"result": ' + b"[" * 500 + b"]" * 500 + b"}", None, "nested"),
    (b'{"result": ' + b"9" * 5000 + b"}", None, "4300 digits"),
    (b'{"result": "caf\xe9"}', None, "utf-8"),
    (b"\x1f\x8b not packed", PACKED, ""),
]


@pytest.mark.parametrize(("body", "headers", "problem"), HOSTILE)
def test_a_hostile_answer_is_a_failed_attempt(monkeypatch, body, headers, problem):
    monkeypatch.setattr(answers, "MAX_ANSWER_BYTES", 1 << 20)
    monkeypatch.setattr(answers, "BYTES_EACH", 1)
    monkeypatch.setattr(searcher, "ATTEMPTS", 1)
    monkeypatch.setenv("SERPER_API_KEY", "k")

    async def run():
        async with answering(body, headers=headers) as address:
            client = SearchClient([address], timeout_s=5, retries=1)
            with pytest.raises(SearchUnavailable, match=f"(?i)/retrieve: .*{problem}"):
                await client.search(["q"])
            assert (client.stats.retries, client.stats.failures) == (1, 1)
            await client.aclose()
            reranker = RemoteReranker(address, timeout_s=5)
            with pytest.raises(SearchFailed, match=f"(?i){problem}"):
                await reranker.rerank(["q"], [[{"contents": "x"}]], 1)
            await reranker.aclose()
            engine = OnlineSearcher(ENGINES["serper"], address=f"http://{address}", snippet_only=True, timeout_s=5)
            with pytest.raises(SearchFailed, match="serper: "):
                await engine.search(["q"], 1)
            await engine.aclose()

    asyncio.run(run())


def test_a_rejection_without_end_is_read_to_its_first_words():
    async def run():
        async with answering(b"too long " * (1 << 20), status=422, headers={"retry-after": "9" * 400}) as address:
            client = SearchClient([address], timeout_s=5, retries=0)
            with pytest.raises(SearchUnavailable, match="status 422: too long too long") as caught:
                await client.search(["q"])
            await client.aclose()
            assert len(str(caught.value)) < 400

    asyncio.run(run())


def test_larger_requests_may_have_larger_answers():
    async def run():
        page = {"url": "u", "contents": "x" * (1 << 20)}
        async with answering(json.dumps({"result": [page] * 70}).encode()) as address:
            client = SearchClient([address], timeout_s=30)
            found = await client.access(["u"] * 70)
            await client.aclose()
            return found

    assert len(asyncio.run(run())) == 70


class Searcher:
    async def search(self, queries, topk):
        return [[({"id": "1", "contents": "x"}, 1.0)] for _ in queries]

    async def aclose(self):
        pass


@pytest.mark.parametrize("path", ["/retrieve", "/access"])
@pytest.mark.parametrize(
    ("body", "statuses"),
    [
        (b"[" * 100_000, {400, 422}),
        (b'{"queries": ' + b"[" * 5000 + b"]" * 5000 + b"}", {400, 422}),
        (b'{"queries": ["q"], "topk": ' + b"9" * 5000 + b"}", {400, 422}),
        (b'{"queries": ["q"], "urls": 7, "topk": 1e400}', {422}),
        (b'{"queries": ["' + b"x" * (7 << 20) + b'"], "urls": ["' + b"x" * (7 << 20) + b'"]}', {422}),
        (b'{"queries": [' + b",".join([b'"q"'] * 70_000) + b'], "urls": [' + b",".join([b'"q"'] * 70_000) + b"]}", {422}),
        (b'{"queries": "q", "urls": "u"}', {422}),
        (b'{"queries": [1, null, {}], "urls": [1, null, {}]}', {422}),
        (b'{"queries": ["caf\xe9"], "urls": ["caf\xe9"]}', {400, 422}),
        (b'{"queries": ["\\ud800"], "urls": ["\\ud800"]}', {200, 400, 422}),
        (b"\xff\xfe", {400, 422}),
        (b"", {400, 422}),
        (b"\x81\xa7queries" + b"\x91" * 100_000, {400, 415, 422}),
        (b"x" * (100 << 20), {413}),
    ],
    ids=lambda value: "" if isinstance(value, set) else value[:24].decode("latin-1"),
)
def test_a_hostile_request_is_rejected_with_one_clear_answer(path, body, statuses):
    async def run():
        service = RetrievalService(Searcher(), Limits(), Metrics())
        app = create_app(ServerState(3, Backend(service, None, {})), Metrics())
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
            return await client.post(path, content=body, headers={"content-type": "application/json"})

    answer = asyncio.run(run())
    assert answer.status_code in statuses
    assert len(answer.content) < 5000, "what was sent is not sent back"
    if answer.status_code != 200:
        assert answer.json()["detail"]


def cached(folder, *work):
    async def run():
        cache = DiskCache(folder)
        found = [await step(cache) for step in work]
        await cache.aclose()
        return found

    return asyncio.run(run())


def put(key, value):
    return lambda cache: cache.put(key, value)


def get(key):
    return lambda cache: cache.get(key)


def test_a_flipped_bit_in_the_cache_of_an_engine_is_noticed_or_harmless(tmp_path):
    values = {f"search {n}": [{"title": f"t{n}", "url": f"u{n}", "snippet": "words " * n}] for n in range(60)}
    cached(tmp_path / "kept", *(put(key, value) for key, value in values.items()))
    original = (tmp_path / "kept" / FILE).read_bytes()
    assert cached(tmp_path / "kept", *map(get, values)) == list(values.values())
    rng, lost = random.Random(11), 0
    for number in range(80):
        folder = tmp_path / str(number)
        folder.mkdir()
        data = bytearray(original)
        place = rng.randrange(len(data) * 8)
        data[place // 8] ^= 1 << place % 8
        (folder / FILE).write_bytes(data)
        found = cached(folder, *map(get, values), put("new", 1))
        assert all(given in (None, value) for given, value in zip(found, values.values(), strict=False))
        lost += None in found[:-1]
    assert lost > 8


@pytest.mark.parametrize(
    "script",
    [
        "CREATE TABLE entries (key, value, size, at); "
        "CREATE TRIGGER t AFTER INSERT ON entries BEGIN DELETE FROM entries; END",
        "CREATE TABLE x (a); CREATE VIEW entries AS SELECT 1 AS key, '2' AS value, 3 AS size, 4.0 AS at",
        "CREATE TABLE entries (one)",
    ],
)
def test_a_cache_that_somebody_else_made_is_not_used(tmp_path, capsys, script):
    with sqlite3.connect(tmp_path / FILE) as database:
        database.executescript(script)
    assert cached(tmp_path, put("k", [1]), get("k"))[1] == [1]
    assert "a new one is begun" in capsys.readouterr().out


def test_a_cache_of_an_earlier_version_is_read_and_odd_values_are_not(tmp_path):
    with sqlite3.connect(tmp_path / FILE) as database:
        database.execute("CREATE TABLE entries (key TEXT PRIMARY KEY, value TEXT, size INTEGER, at REAL)")
        odd = {"old": "[1]", "deep": "[" * 100_000, "broken": "{", "blob": b"\xff", "text": "[2]"}
        for key, value in odd.items():
            at = "soon" if key == "text" else 9e9
            database.execute("INSERT INTO entries VALUES (?, ?, 1, ?)", (key, value, at))
    found = cached(tmp_path, *(get(key) for key in odd), put("new", [3]), get("new"))
    assert found == [[1], None, None, None, None, None, [3]]
