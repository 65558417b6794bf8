"""Where a chat searches: an online engine behind a fake, and servers of other systems."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from support.scripted_chat import ANSWER, SEARCH, make_chat

from searchr1.chat.events import Done, ToolFailed, ToolReturned
from searchr1.chat.search_backends import OnlineBackend, check_servers
from searchr1.config.schema import SearchToolConfig
from searchr1.retrieval.client.client import SearchUnavailable


@asynccontextmanager
async def serving(*routes):
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def test_an_online_engine_answers_a_question(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "secret")
    status = 200
    asked = []

    async def search(request):
        asked.append((request.headers["X-API-KEY"], await request.json()))
        rows = [{"title": "Ada", "link": "https://w.example/Ada", "snippet": "She wrote it."}]
        return web.json_response({"organic": rows}, status=status)

    async def scene():
        nonlocal status
        async with serving(web.post("/search", search)) as address:
            backend = OnlineBackend("serper", 3, 10.0, f"{address}/search", snippet_only=True)
            chat = make_chat({"q": [SEARCH, ANSWER]}, backend)
            events = [event async for event in chat.ask("q")]
            (found,) = [event for event in events if isinstance(event, ToolReturned)]
            passage = found.results[0][0]
            assert (passage.title, passage.text, passage.url) == ("Ada", "She wrote it.", "https://w.example/Ada")
            assert asked == [("secret", {"q": "first program", "num": 3})]
            status = 403
            events = [event async for event in chat.ask("q")]
            (failed,) = [event for event in events if isinstance(event, ToolFailed)]
            assert "SERPER_API_KEY" in failed.message
            assert "secret" not in json.dumps([event.as_json() for event in events])
            assert isinstance(events[-1], Done)
            with pytest.raises(SearchUnavailable):
                await backend.search(["q"])
            await chat.aclose()

    asyncio.run(scene())


def test_a_server_without_health_is_asked_a_question(monkeypatch):
    monkeypatch.setattr("searchr1.chat.search_backends.HEALTH_SECONDS", 0.2)
    good = True

    async def retrieve(request):
        if not good:
            return web.json_response({"detail": "no index"}, status=500)
        return web.json_response(
            {"result": [[{"id": "0", "contents": '"T"\nx'}] for _ in (await request.json())["queries"]]}
        )

    async def scene():
        nonlocal good
        async with serving(web.post("/retrieve", retrieve)) as address:
            search = SearchToolConfig(server_addr=[address])
            assert await check_servers(search) is None
            good = False
            assert "no index" in await check_servers(search)

    asyncio.run(scene())
