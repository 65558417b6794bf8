"""The server's page for people, in a real browser."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time

import pytest
from support.chromium import chromium, find_chromium

pytestmark = [pytest.mark.browser, pytest.mark.skipif(find_chromium() is None, reason="no Chromium")]

HOSTILE = '<img src=x onerror="window.hit=1"><script>window.hit=2</script><b>bold</b>'
ROWS = [
    {"id": "0", "contents": '"Ada Lovelace"\nAda wrote the first program.', "url": "https://w.example/Ada"},
    {"id": "1", "contents": f'"{HOSTILE}"\nhostile {HOSTILE}', "url": "javascript:window.hit=3"},
]
PAGES = [{"url": "https://w.example/Ada", "contents": f"The whole page of Ada. {HOSTILE}"}]


@pytest.fixture
def server(tmp_path, request):
    for name, rows in (("corpus", ROWS), ("pages", PAGES)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [sys.executable, "-m", "searchr1.cli", "retrieval-server", "--retriever_name", "bm25", "--port", "0"]
    words += ["--corpus_path", str(tmp_path / "corpus.jsonl"), "--pages_path", str(tmp_path / "pages.jsonl")]
    env = os.environ | getattr(request, "param", {})
    process = subprocess.Popen([*words, "--save-address-to", str(tmp_path / "address")], env=env)
    deadline = time.monotonic() + 60
    while not (tmp_path / "address").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process, f"http://{(tmp_path / 'address').read_text()}/"
    process.kill()
    process.wait()


async def search(tab, query):
    await tab.run(f"document.getElementById('query').value = {json.dumps(query)}")
    await tab.run("document.getElementById('search').requestSubmit()")


def test_a_query_shows_ranked_passages_and_opens_a_page(server, tmp_path):
    async def run():
        async with chromium() as tab:
            await tab.open(server[1])
            await tab.until("document.getElementById('about').textContent.includes('passages: 2')")
            await search(tab, "Ada program")
            await tab.until("document.querySelectorAll('#hits li').length === 1")
            hit = await tab.run("document.querySelector('#hits li').innerText")
            assert "Ada Lovelace" in hit
            assert "wrote the first program" in hit
            assert float(await tab.run("document.querySelector('.score').textContent")) > 0
            await tab.run("document.querySelector('#hits .link').click()")
            await tab.until("document.getElementById('page').open")
            assert "The whole page of Ada." in await tab.run("document.getElementById('page-text').textContent")
            await tab.screenshot(tmp_path / "page.png")
            assert (tmp_path / "page.png").stat().st_size > 5000
            assert tab.console == []

    asyncio.run(run())


def test_what_a_corpus_holds_is_text_and_never_markup(server):
    async def run():
        async with chromium() as tab:
            await tab.open(server[1])
            await search(tab, "hostile")
            await tab.until("document.querySelectorAll('#hits li').length === 1")
            assert "<script>" in await tab.run("document.querySelector('#hits li').innerText")
            await tab.run("document.querySelector('#hits .link').click()")
            await tab.until("document.getElementById('page').open")
            assert (
                await tab.run(
                    "document.querySelectorAll('#hits img, #hits script, #hits b:not(.head b), dialog img').length"
                )
                == 0
            )
            assert await tab.run("window.hit") is None

    asyncio.run(run())


@pytest.mark.parametrize("server", [{"SEARCHR1_RETRIEVAL_TOKEN": "abc"}], indirect=True)
def test_a_server_with_a_token_asks_for_it(server):
    async def run():
        async with chromium() as tab:
            await tab.open(server[1])
            assert await tab.run("document.getElementById('token').hidden")
            await search(tab, "Ada")
            await tab.until("document.getElementById('problem').textContent.startsWith('401')")
            assert not await tab.run("document.getElementById('token').hidden")
            await tab.run("document.getElementById('token').value = 'abc'")
            await search(tab, "Ada")
            await tab.until("document.querySelectorAll('#hits li').length === 1")
            assert await tab.run("document.getElementById('problem').textContent") == ""

    asyncio.run(run())


def test_a_dead_server_is_reported(server):
    async def run():
        async with chromium() as tab:
            await tab.open(server[1])
            server[0].kill()
            server[0].wait()
            await search(tab, "Ada")
            await tab.until("document.getElementById('problem').textContent !== ''")

    asyncio.run(run())
