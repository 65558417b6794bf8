"""The chat page in a real browser, with a scripted engine beside the real loop and server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket

import pytest
import uvicorn
from support.chromium import chromium, find_chromium
from support.scripted_chat import ADA, ANSWER, SEARCH, ScriptedEngine, ScriptedSearch, make_chat

from searchr1.chat.server import Limits, create_app
from searchr1.retrieval.documents import RetrievedDocument
from searchr1.rollout.engine import EngineError

pytestmark = [pytest.mark.browser, pytest.mark.skipif(find_chromium() is None, reason="no Chromium")]

HOSTILE = '<img src=x onerror="window.hit=1"><script>window.hit=2</script></pre><b>bold</b>'
SCRIPT = {
    "Who wrote the first program?": [SEARCH, ANSWER],
    "slow": ["<think> " + "so much to think about " * 400],
    "hostile": [
        f"<think> {HOSTILE}</think>{HOSTILE}<information> {HOSTILE}</information><search> {HOSTILE} </search>",
        f"<answer> {HOSTILE} </answer>",
    ],
}
EVIL = RetrievedDocument("1", HOSTILE, HOSTILE, "javascript:window.hit=3", 1.0)
EVIL_PAGE = RetrievedDocument("2", HOSTILE, HOSTILE, f"https://w.example/{HOSTILE}", 1.0)


@contextlib.asynccontextmanager
async def serving(chat, token=None, port=0, **limits):
    """The real server with a real socket; gives its address and the server."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    config = uvicorn.Config(
        create_app(chat, Limits(**limits), token), log_level="warning", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        await task


async def ask(tab, question):
    await tab.run(f"document.getElementById('question').value = {json.dumps(question)}")
    await tab.run("document.getElementById('composer').requestSubmit()")


def text_of(tab, selector):
    return tab.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(node => node.innerText).join('|')")


def idle(tab):
    return tab.until("document.getElementById('send').textContent === 'Ask' && document.querySelector('article')")


def play(scene, chat, **serving_arguments):
    async def run():
        async with serving(chat, **serving_arguments) as address, chromium() as tab:
            await scene(tab, address)

    asyncio.run(run())


def test_an_answer_is_streamed_with_its_searches_and_passages():
    async def scene(tab, address):
        await tab.open(address)
        await tab.until("document.getElementById('about').textContent.includes('scripted')")
        await ask(tab, "Who wrote the first program?")
        # Thoughts grow before the answer is there.
        await tab.until("document.querySelector('.think .text') && !document.querySelector('.answer')")
        await idle(tab)
        assert await text_of(tab, "article h2") == "Who wrote the first program?"
        assert await text_of(tab, ".think .text") == "Who was it?|Found it."
        assert await text_of(tab, ".search .text") == "first program"
        assert await text_of(tab, ".answer .text") == "Ada Lovelace"
        assert (await text_of(tab, "article > details > summary")).startswith("1 passage in ")
        await tab.run("for (const box of document.querySelectorAll('details')) box.open = true")
        assert "Ada wrote the first program." in await text_of(tab, ".passage")
        assert 'Doc 1(Title: "Ada Lovelace")' in await text_of(tab, "pre.read")
        link = "document.querySelector('details a')"
        assert await tab.run(f"[{link}.href, {link}.target, {link}.rel].join(' ')") == (
            "https://w.example/Ada _blank noopener noreferrer"
        )
        assert "1 search · 2 turns" in await text_of(tab, ".stats")
        await tab.run("document.querySelector('details .link').click()")
        await tab.until("document.getElementById('page').open")
        assert await text_of(tab, "#page-text") == f"The page of Ada. {HOSTILE}"
        await tab.run("document.querySelector('#page button').click()")
        await tab.until("!document.getElementById('page').open")
        # Another one, in the same tab.
        await ask(tab, "Who wrote the first program?")
        await tab.until("document.querySelectorAll('.answer').length === 2")
        assert await tab.run("window.hit") is None
        assert tab.console == []

    backend = ScriptedSearch(ADA, pages={ADA.url: f"The page of Ada. {HOSTILE}"})
    play(scene, make_chat(SCRIPT, backend, delay=0.02))


def test_stop_aborts_the_generation_and_the_page_goes_on():
    chat = make_chat(SCRIPT, engine=(engine := ScriptedEngine(SCRIPT, delay=0.01)))

    async def scene(tab, address):
        await tab.open(address)
        await ask(tab, "slow")
        await tab.until("document.querySelector('.think')")
        assert await text_of(tab, "#send") == "Stop"
        await tab.run("document.getElementById('send').click()")
        await idle(tab)
        assert await text_of(tab, ".note") == "Stopped."
        async with asyncio.timeout(10):
            while engine.running:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert engine.aborted == 1
        await ask(tab, "Who wrote the first program?")
        await tab.until("document.querySelector('.answer')")
        assert tab.console == []

    play(scene, chat)


def test_text_of_models_and_pages_is_text_and_never_markup():
    async def scene(tab, address):
        await tab.open(address)
        await ask(tab, "hostile")
        await tab.until("document.querySelector('.answer')")
        await idle(tab)
        await tab.run("for (const box of document.querySelectorAll('details')) box.open = true")
        assert await text_of(tab, ".answer .text") == HOSTILE
        assert HOSTILE in await text_of(tab, ".forged .text")
        assert await text_of(tab, ".passage") == f"{HOSTILE}|{HOSTILE}"
        # The bad address is no link; the good one carries its markup as an address.
        assert await tab.run("[...document.querySelectorAll('details a')].map(a => a.protocol).join()") == "https:"
        await tab.run("document.querySelectorAll('details .link')[1].click()")
        await tab.until("document.getElementById('page').open")
        assert await text_of(tab, "#page-text") == HOSTILE
        inside = "article img, article script, article b:not(.head b), dialog img, dialog script, dialog b"
        assert await tab.run(f"document.querySelectorAll({json.dumps(inside)}).length") == 0
        assert await tab.run("window.hit") is None
        assert tab.console == []

    play(scene, make_chat(SCRIPT, ScriptedSearch(EVIL, EVIL_PAGE, pages={EVIL_PAGE.url: HOSTILE})))


def test_the_policy_stops_scripts_that_would_get_in():
    async def scene(tab, address):
        await tab.open(address)
        await tab.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hit=1\">')")
        script = "const s = document.createElement('script'); s.textContent = 'window.hit=2'; document.body.append(s)"
        await tab.run(f"(() => {{ {script} }})()")
        await asyncio.sleep(0.2)
        assert await tab.run("window.hit") is None
        assert any("Content Security Policy" in line for line in tab.console)

    play(scene, make_chat(SCRIPT))


def test_dead_searches_and_dead_engines_are_reported_and_the_page_recovers():
    backend = ScriptedSearch(ADA)
    chat = make_chat(SCRIPT, backend, engine=(engine := ScriptedEngine(SCRIPT)))

    async def scene(tab, address):
        await tab.open(address)
        backend.error = "http://127.0.0.1:8000/retrieve: no answer"
        await ask(tab, "Who wrote the first program?")
        await tab.until("document.querySelector('.stats')")
        assert await text_of(tab, ".error") == "The search failed: http://127.0.0.1:8000/retrieve: no answer"
        backend.error = None
        engine.error = EngineError("the rollout engine stopped: out of memory")
        await ask(tab, "Who wrote the first program?")
        await tab.until("document.querySelectorAll('.error').length === 2")
        assert "out of memory" in await text_of(tab, ".error")
        engine.error = None
        await tab.run("document.querySelector('.error button').click()")  # ask again
        await tab.until(
            "document.querySelectorAll('article').length === 3 && document.querySelectorAll('.stats').length === 2"
        )
        assert await text_of(tab, "article:last-of-type .answer .text") == "Ada Lovelace"
        assert tab.console == []

    play(scene, chat)


def test_a_server_that_went_away_is_reported_and_may_come_back():
    async def run():
        async with chromium() as tab:
            async with serving(make_chat(SCRIPT, delay=0.01)) as address:
                await tab.open(address)
                await ask(tab, "slow")
                await tab.until("document.querySelector('.think')")
            await tab.until("document.querySelector('.error')")  # broken off
            await idle(tab)
            await ask(tab, "slow")
            await tab.until("document.querySelectorAll('.error').length === 2")
            assert "cannot be reached" in await text_of(tab, ".error")
            port = int(address.rstrip("/").rpartition(":")[2])
            async with serving(make_chat(SCRIPT), port=port):
                await ask(tab, "Who wrote the first program?")
                await tab.until("document.querySelector('.answer')")

    asyncio.run(run())


def test_a_token_is_asked_for_and_limits_are_reported():
    async def scene(tab, address):
        await tab.open(address)
        await tab.until("!document.getElementById('token').hidden")
        assert "needs its token" in await text_of(tab, "#about")
        await ask(tab, "Who wrote the first program?")
        await tab.until("document.querySelector('.error')")
        assert "needs its token" in await text_of(tab, ".error")
        await tab.run("document.getElementById('token').value = 'abc'")
        await tab.run("document.getElementById('token-form').requestSubmit()")
        await tab.until("document.getElementById('about').textContent.includes('scripted')")
        await ask(tab, "Who wrote the first program?")
        await tab.until("document.querySelector('.answer')")
        await idle(tab)
        await ask(tab, "x" * 100)
        await tab.until("document.querySelectorAll('.error').length === 2")
        assert "100 characters, and 50 are allowed" in await text_of(tab, ".error")

    play(scene, make_chat(SCRIPT), token="abc", question_characters=50)
