"""The client against servers that die, hang, drip and talk nonsense."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager

import pytest

from searchr1.errors import UserError
from searchr1.retrieval.client.client import SearchClient, SearchUnavailable, base_url

GOOD = {"result": [[{"document": {"id": "7", "contents": '"T"\ntext', "url": "u"}, "score": 1.5}]]}


def answer(body, status="200 OK"):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n%s" % (status.encode(), len(content), content)


@asynccontextmanager
async def server(reply):
    """Answers each request with what `reply(n)` gives: bytes, or None to say nothing. Yields address and request count."""
    requests = []

    async def handle(reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                requests.append(json.loads(await reader.readexactly(length)))
                found = reply(len(requests))
                if found is None:
                    await asyncio.sleep(60)
                elif found == b"":
                    break
                elif isinstance(found, list):
                    for part in found:
                        writer.write(part)
                        await writer.drain()
                        await asyncio.sleep(0.2)
                else:
                    writer.write(found)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{listening.sockets[0].getsockname()[1]}", requests
    finally:
        listening.close()


def closed_address():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


async def search(client, queries=("q",)):
    try:
        return await client.search(list(queries))
    finally:
        await client.aclose()


def test_every_field_is_read_and_the_request_is_the_protocols():
    async def run():
        async with server(lambda n: answer(GOOD)) as (address, requests):
            return await search(SearchClient([f"http://{address}/retrieve"], topk=5)), requests

    [[document]], requests = asyncio.run(run())
    assert (document.id, document.title, document.text, document.url, document.score) == ("7", "T", "text", "u", 1.5)
    assert requests == [{"queries": ["q"], "topk": 5, "return_scores": True}]


def test_bare_documents_as_search_r1_gives_them():
    async def run():
        async with server(lambda n: answer({"result": [[{"id": 3, "contents": "no title"}]]})) as (address, _):
            return await search(SearchClient([address]))

    [[document]] = asyncio.run(run())
    assert (document.id, document.title, document.text, document.url, document.score) == ("3", "", "no title", None, None)


@pytest.mark.parametrize(
    "bad",
    [
        answer({}, "503 Service Unavailable"),
        answer(b"not json"),
        answer([]),
        answer({"other": 1}),
        answer({"result": []}),
        answer({"result": [None]}),
        answer({"result": [[3]]}),
        b"",
        b"nonsense\r\n\r\n",
    ],
)
def test_a_bad_answer_is_tried_again(bad):
    async def run():
        async with server(lambda n: bad if n == 1 else answer(GOOD)) as (address, _):
            client = SearchClient([address], timeout_s=10, retries=1)
            return await search(client), client.stats

    [[document]], stats = asyncio.run(run())
    assert document.id == "7"
    assert (stats.calls, stats.retries, stats.failures) == (1, 1, 0)


def test_a_rejection_is_not_tried_again_and_says_where_and_why():
    async def run():
        async with server(lambda n: answer(b"too long", "422 Unprocessable Entity")) as (address, requests):
            client = SearchClient([address], timeout_s=10, retries=5)
            with pytest.raises(SearchUnavailable, match=f"{address}/retrieve: status 422: too long"):
                await search(client)
            assert len(requests) == 1
            assert client.stats.failures == 1

    asyncio.run(run())


def test_the_other_server_answers_at_once_when_one_is_dead():
    async def run():
        async with server(lambda n: answer(GOOD)) as (address, requests):
            client = SearchClient([closed_address(), address], timeout_s=20, retries=1)
            started = time.monotonic()
            found = await asyncio.gather(*(client.search(["q"]) for _ in range(40)))
            assert time.monotonic() - started < 2
            again = [await client.search(["q"]) for _ in range(10)]
            await client.aclose()
            return found + again, len(requests), client.stats

    found, answered, stats = asyncio.run(run())
    assert answered == 50
    assert all(hits[0][0].id == "7" for hits in found)
    assert 1 <= stats.opens <= 3  # a slow machine tries the dead one once more
    assert stats.retries <= 20 + stats.opens - 1, "the dead one is left alone after a few failures"


def test_a_server_that_comes_back_is_waited_for():
    async def run():
        address = closed_address()
        client = SearchClient([address], timeout_s=20)
        calls = [asyncio.create_task(client.search(["q"])) for _ in range(20)]
        await asyncio.sleep(1)

        async def handle(reader, writer):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
            writer.write(answer(GOOD))
            await writer.drain()
            writer.close()

        listening = await asyncio.start_server(handle, "127.0.0.1", int(address.rpartition(":")[2]))
        found = await asyncio.gather(*calls)
        await client.aclose()
        listening.close()
        return found, client.stats

    found, stats = asyncio.run(run())
    assert len(found) == 20
    assert stats.failures == 0


def test_a_busy_server_is_left_alone_for_as_long_as_it_says():
    async def run():
        busy = b"HTTP/1.1 503 Busy\r\nretry-after: 5\r\ncontent-length: 0\r\n\r\n"
        async with server(lambda n: busy) as (one, first), server(lambda n: answer(GOOD)) as (two, second):
            client = SearchClient([one, two])
            for _ in range(10):
                await client.search(["q"])
            await client.aclose()
            return len(first), len(second), client.stats

    first, second, stats = asyncio.run(run())
    assert (first, second) == (1, 10)
    assert (stats.retries, stats.failures, stats.opens) == (1, 0, 1)


def test_a_token_goes_along_and_proxies_of_the_environment_are_not_asked(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    heads = []

    async def run():
        async def handle(reader, writer):
            heads.append(head := await reader.readuntil(b"\r\n\r\n"))
            await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
            writer.write(answer(GOOD))
            await writer.drain()
            writer.close()

        listening = await asyncio.start_server(handle, "127.0.0.1", 0)
        await search(SearchClient([f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"], token="abc"))
        listening.close()

    asyncio.run(run())
    assert b"authorization: bearer abc\r\n" in heads[0].lower()


def test_calls_are_spread_over_the_servers():
    async def run():
        async with server(lambda n: answer(GOOD)) as (one, first), server(lambda n: answer(GOOD)) as (two, second):
            client = SearchClient([one, two])
            for _ in range(10):
                await client.search(["q"])
            await client.aclose()
            return len(first), len(second)

    assert asyncio.run(run()) == (5, 5)


def test_a_server_that_hangs_leaves_time_for_the_other():
    async def run():
        async with server(lambda n: None) as (hanging, _), server(lambda n: answer(GOOD)) as (address, _):
            client = SearchClient([hanging, address], timeout_s=2, retries=2)
            found = await asyncio.gather(*(client.search(["q"]) for _ in range(4)))
            await client.aclose()
            return found

    assert len(asyncio.run(run())) == 4


@pytest.mark.parametrize("reply", [None, [answer(GOOD)[:30]] + [b"x"] * 50], ids=["silent", "dripping"])
def test_the_deadline_covers_everything(reply):
    async def run():
        async with server(lambda n: reply) as (address, _):
            client = SearchClient([address], timeout_s=0.5, retries=5)
            started = time.monotonic()
            with pytest.raises(SearchUnavailable, match="no answer within"):
                await search(client)
            assert time.monotonic() - started < 2
            assert client.stats.failures == 1

    asyncio.run(run())


def test_waiting_for_a_connection_counts_too_and_connections_are_limited_and_given_back():
    async def run():
        async with server(lambda n: None if n <= 2 else answer(GOOD)) as (address, requests):
            client = SearchClient([address], timeout_s=0.5, retries=0, max_connections=2)
            results = await asyncio.gather(*(client.search(["q"]) for _ in range(6)), return_exceptions=True)
            assert sum(isinstance(result, SearchUnavailable) for result in results) >= 2
            assert len(requests) <= 6
            assert len(await client.search(["q"])) == 1  # the two that hung hold no connection any more
            await client.aclose()

    asyncio.run(run())


def test_connections_are_kept():
    async def run():
        connections = 0

        async def handle(reader, writer):
            nonlocal connections
            connections += 1
            try:
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
                    writer.write(answer(GOOD))
            except asyncio.IncompleteReadError:
                writer.close()

        listening = await asyncio.start_server(handle, "127.0.0.1", 0)
        client = SearchClient([f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"])
        for _ in range(5):
            await asyncio.gather(*(client.search(["q"]) for _ in range(8)))
        await client.aclose()
        listening.close()
        return connections

    assert asyncio.run(run()) <= 8


def test_no_queries_ask_nobody():
    async def run():
        return await search(SearchClient([closed_address()]), queries=())

    assert asyncio.run(run()) == []


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("0.0.0.0:8000", "http://127.0.0.1:8000"),
        (" node3:80/ ", "http://node3:80"),
        ("http://node3:80/retrieve", "http://node3:80"),
        ("https://search.example", "https://search.example"),
        ("[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_addresses(address, url):
    assert base_url(address) == url


@pytest.mark.parametrize("address", ["", "  ", "http://", "ftp://x:1", "host:port", ":8000"])
def test_what_is_no_address_is_reported(address):
    with pytest.raises(UserError, match="server_addr"):
        base_url(address)


def test_the_client_is_cheap_to_import():
    code = (
        "import sys, searchr1.retrieval.client.client; print([m for m in ('torch', 'numpy', 'fastapi') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.strip() == "[]"
