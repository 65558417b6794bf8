"""Online engines against local servers that answer in their documented shapes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from contextlib import asynccontextmanager

import httpx
import pytest
from aiohttp import web

from searchr1.errors import UserError
from searchr1.retrieval.documents import Page
from searchr1.retrieval.online import searcher as searcher_module
from searchr1.retrieval.online.disk_cache import FILE, DiskCache
from searchr1.retrieval.online.engines import ENGINES
from searchr1.retrieval.online.searcher import PASSAGE_CHARACTERS, OnlineSearcher, best_part
from searchr1.retrieval.searcher import SearchFailed
from searchr1.retry import Backoff

SECRET = "k3y-that-must-not-leak"
KEYS = {name: SECRET for engine in ENGINES.values() for name in engine.variables}
URLS = ["https://a.example/1", "https://b.example/2"]

ANSWERS = {
    "serper": {
        "searchParameters": {"q": "x"},
        "answerBox": {"title": "Box", "link": URLS[0], "answer": "forty-two"},
        "organic": [
            {"title": "First", "link": URLS[0], "snippet": "one", "position": 1},
            {"title": "Second", "link": URLS[1], "snippet": "two", "position": 2},
        ],
    },
    "serpapi-google": {
        "search_metadata": {"status": "Success"},
        "answer_box": {"type": "organic_result", "title": "Box", "link": URLS[0], "answer": "forty-two"},
        "organic_results": [
            {"position": 1, "title": "First", "link": URLS[0], "snippet": "one"},
            {"position": 2, "title": "Second", "link": URLS[1], "snippet": "two"},
        ],
    },
    "google": {
        "kind": "customsearch#search",
        "items": [
            {"title": "First", "link": URLS[0], "snippet": "one"},
            {"title": "Second", "link": URLS[1], "snippet": "two"},
        ],
    },
    "brave": {
        "type": "search",
        "web": {
            "type": "search",
            "results": [
                {"title": "First", "url": URLS[0], "description": "one"},
                {"title": "Second", "url": URLS[1], "description": "two"},
            ],
        },
    },
}
ANSWERS["serpapi-bing"] = ANSWERS["serpapi-google"]
EMPTY = {
    "serper": {"organic": []},
    "serpapi-google": {"error": "Google hasn't returned any results for this query."},
    "serpapi-bing": {"error": "Bing hasn't returned any results for this query."},
    "google": {"kind": "customsearch#search"},
    "brave": {"type": "search"},
}


class Pages:
    """A fetcher that knows some pages."""

    def __init__(self, pages=None):
        self.pages = pages or {}
        self.failures = {}

    async def fetch(self, url):
        return Page(url, self.pages[url]) if url in self.pages else None

    async def aclose(self):
        pass


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(searcher_module, "BACKOFF", Backoff(0.01, 8.0, (0.5, 1.5)))


@asynccontextmanager
async def engine_server(reply):
    """An engine that answers `reply(request, number)`; gives its address and what it was asked."""
    asked = []

    async def handle(request):
        body = await request.json() if request.can_read_body else None
        asked.append((request.method, dict(request.query), body, dict(request.headers)))
        return await reply(len(asked))

    app = web.Application()
    app.router.add_route("*", "/search", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/search", asked
    finally:
        await runner.cleanup()


def always(content, status=200, **headers):
    async def reply(_):
        text = content if isinstance(content, str) else json.dumps(content)
        return web.Response(text=text, status=status, headers=headers)

    return reply


def ask(name, reply, *queries, topk=3, **settings):
    """Search once; gives (found or the failure, what the engine was asked)."""

    async def run():
        async with engine_server(reply) as (address, asked):
            settings.setdefault("fetcher", Pages())
            searcher = OnlineSearcher(ENGINES[name], address=address, **settings)
            try:
                return await searcher.search(queries or ("who?",), topk), asked
            except SearchFailed as failure:
                return failure, asked
            finally:
                await searcher.aclose()

    return asyncio.run(run())


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_every_engines_answer_becomes_passages(name):
    found, asked = ask(name, always(ANSWERS[name]), snippet_only=True)
    boxed = "answerBox" in ANSWERS[name] or "answer_box" in ANSWERS[name]
    first = '"Box"\nforty-two' if boxed else '"First"\none'
    assert found == [
        [
            ({"id": URLS[0], "contents": first, "url": URLS[0]}, 1.0),
            ({"id": URLS[1], "contents": '"Second"\ntwo', "url": URLS[1]}, 0.5),
        ]
    ]
    method, query, body, headers = asked[0]
    sent = query | (body or {}) | headers
    assert sent["q"] == "who?"
    assert SECRET in sent.values()
    assert method == ("POST" if name == "serper" else "GET")
    assert sent.get("engine") == {"serpapi-google": "google", "serpapi-bing": "bing"}.get(name)


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_no_results_are_no_failure(name):
    assert ask(name, always(EMPTY[name]))[0] == [[]]


@pytest.mark.parametrize("name", sorted(ENGINES))
@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (always("no", 401), "refused the key"),
        (always("no", 403), "refused the key"),
        (always("no", 400), "answered 400"),
        (always("<html>"), "no JSON"),
        (always([1, 2]), "another shape"),
        (
            always({"organic": [{"title": "x"}], "organic_results": [3], "items": [{}], "web": {"results": [{}]}}),
            "another shape",
        ),
        (always("slow down", 429), r"busy \(429\)"),
        (always("broken", 500), r"busy \(500\)"),
    ],
)
def test_failures_say_what_and_never_the_key(name, reply, message):
    failure, _ = ask(name, reply, timeout_s=5)
    assert isinstance(failure, SearchFailed)
    assert re.search(message, str(failure))
    assert name in str(failure)
    assert SECRET not in repr(failure) + str(failure.__cause__) + str(failure.__context__)


def test_a_busy_engine_is_asked_again_as_late_as_it_says():
    started = time.monotonic()

    async def reply(number):
        headers = {"retry-after": "1"} if number == 1 else {}
        return web.json_response(ANSWERS["google"], status=429 if number < 3 else 200, headers=headers)

    found, asked = ask("google", reply, snippet_only=True)
    assert len(found[0]) == 2
    assert len(asked) == 3
    assert time.monotonic() - started >= 1


def test_a_slow_or_absent_engine_is_a_failed_search():
    async def slow(_):
        await asyncio.sleep(1)

    failure, _ = ask("serper", slow, timeout_s=0.3)
    assert "no answer within 0.3 s" in str(failure)

    async def absent():
        searcher = OnlineSearcher(ENGINES["google"], address=f"http://127.0.0.1:9/{SECRET}", fetcher=Pages())
        with pytest.raises(SearchFailed, match="google: Client") as failed:
            await searcher.search(["q"], 1)
        await searcher.aclose()
        assert SECRET not in str(failed.value)

    asyncio.run(absent())


def test_a_missing_key_is_reported(monkeypatch):
    monkeypatch.delenv("GOOGLE_CSE_ID")
    with pytest.raises(UserError, match="GOOGLE_CSE_ID"):
        OnlineSearcher(ENGINES["google"])


def test_pages_replace_snippets_where_they_can_be_had():
    long = "nothing here. " * 200 + "Ada Lovelace wrote the first program. " + "more of it. " * 200
    found, _ = ask("brave", always(ANSWERS["brave"]), "Lovelace program", fetcher=Pages({URLS[0]: long}))
    first, second = (document["contents"] for document, _ in found[0])
    assert "Ada Lovelace wrote the first program." in first
    assert len(first) <= PASSAGE_CHARACTERS + 10
    assert second == '"Second"\ntwo'


def test_topk_empty_queries_and_concurrency():
    running = most = 0

    async def reply(_):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        return web.json_response(ANSWERS["google"])

    queries = ["", "  ", *(f"q{number}" for number in range(12))]
    found, asked = ask("google", reply, *queries, topk=1, snippet_only=True, concurrency=3)
    assert [len(hits) for hits in found] == [0, 0] + [1] * 12
    assert len(asked) == 12
    assert most <= 3


def test_answers_and_pages_are_cached_on_disk_without_keys(tmp_path):
    for _ in range(2):
        pages = Pages({URLS[0]: "the page"})
        found, asked = ask("google", always(ANSWERS["google"]), "q", cache=DiskCache(tmp_path), fetcher=pages)
        assert found[0][0][0]["contents"] == '"First"\nthe page'
    assert asked == []
    assert SECRET.encode() not in (tmp_path / FILE).read_bytes()


def cached(cache, work):
    async def run():
        try:
            return await work(cache)
        finally:
            await cache.aclose()

    return asyncio.run(run())


def test_entries_grow_old_and_the_oldest_make_room(tmp_path):
    async def fill(cache):
        for number in range(1200):
            await cache.put(f"key {number}", "x" * 1000)
        return [await cache.get(f"key {number}") is not None for number in (0, 1199)]

    assert cached(DiskCache(tmp_path, max_bytes=300_000), fill) == [False, True]

    async def first(cache):
        return await cache.get("key 1199")

    assert cached(DiskCache(tmp_path), first) == "x" * 1000
    assert cached(DiskCache(tmp_path, ttl_s=0), first) is None


def test_a_damaged_cache_is_moved_aside(tmp_path, capsys):
    (tmp_path / FILE).write_bytes(b"this is no database, but it is long enough" * 100)

    async def use(cache):
        await cache.put("a", {"b": [1, "\ud83d"]})
        return await cache.get("a")

    assert cached(DiskCache(tmp_path), use) == {"b": [1, "\ud83d"]}
    assert "damaged" in capsys.readouterr().out
    assert list(tmp_path.glob("*.damaged-*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache_dir"):
        DiskCache(tmp_path / "file")


def test_two_processes_share_a_cache_and_a_kill_loses_nothing(tmp_path):
    code = (
        "import asyncio, sys, pathlib\n"
        "from searchr1.retrieval.online.disk_cache import DiskCache\n"
        "async def run():\n"
        "    cache = DiskCache(pathlib.Path(sys.argv[1]))\n"
        "    for number in range(100000):\n"
        "        await cache.put(f'{sys.argv[2]} {number}', number)\n"
        "        print(number, flush=True)\n"
        "asyncio.run(run())\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], stdout=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    last = []
    for process in processes:
        for line in process.stdout:
            if int(line) == 50:
                break
        process.kill()
        last.append(50)
        process.wait()
    with sqlite3.connect(tmp_path / FILE) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)

    async def read(cache):
        return [await cache.get(f"{name} {number}") for name in "ab" for number in (0, 50)]

    assert cached(DiskCache(tmp_path), read) == [0, 50, 0, 50]


def test_a_cache_that_another_process_is_just_making_is_waited_for():
    class Busy:
        left = 3

        def execute(self, statement):
            assert statement == "PRAGMA journal_mode=WAL"
            self.left -= 1
            if self.left:
                raise sqlite3.OperationalError("database is locked")

    busy = Busy()
    DiskCache._begin_log(busy)
    assert busy.left == 0


def test_best_part_keeps_to_words_and_length():
    text = "alpha beta " * 300 + "the needle is here " + "gamma " * 300
    part = best_part(text, "where is the needle")
    assert "needle" in part
    assert len(part) <= PASSAGE_CHARACTERS
    assert part.split()[0] in {"alpha", "beta", "gamma", "the", "needle", "is", "here"}
    assert best_part("short", "q") == "short"
    assert best_part("x" * 5000, "q") == "x" * PASSAGE_CHARACTERS


def test_a_server_in_front_of_an_engine(tmp_path):
    async def run():
        async with engine_server(always(ANSWERS["serper"])) as (address, asked):
            words = [sys.executable, "-m", "searchr1.cli", "retrieval-server", "--engine", "serper", "--engine_url", address]
            words += [
                "--snippet_only",
                "--port",
                "0",
                "--save-address-to",
                str(tmp_path / "address"),
                "--cache_dir",
                str(tmp_path),
            ]
            process = await asyncio.create_subprocess_exec(*words, stdout=subprocess.PIPE, env=os.environ | KEYS)
            async with asyncio.timeout(60):
                while not (tmp_path / "address").exists():  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            async with httpx.AsyncClient(base_url=f"http://{(tmp_path / 'address').read_text()}", trust_env=False) as http:
                body = {"queries": ["q", "q", ""], "return_scores": True}
                answers = [(await http.post("/retrieve", json=body, timeout=20)).json() for _ in range(2)]
                page = (await http.post("/access", json={"urls": ["http://127.0.0.1:1/x"]}, timeout=20)).json()
                health = (await http.get("/health")).json()
            process.terminate()
            output, _ = await process.communicate()
            return answers, page, health, asked, output.decode()

    answers, page, health, asked, output = asyncio.run(run())
    assert answers[0] == answers[1]
    assert [len(hits) for hits in answers[0]["result"]] == [2, 2, 0]
    assert page == {"result": [None]}
    assert health == {"status": "ok", "engine": "serper"}
    assert len(asked) == 1
    assert SECRET not in output
