"""From the YAML key to a page in the trajectory: a real server, the agent loop, a scripted policy."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time

import pytest

from searchr1.agent.tools import build_tools, client_stats
from searchr1.config.load import load_config

PAGE = "https://w.example/Ada_Lovelace"


@pytest.fixture
def address(tmp_path):
    rows = [{"id": "0", "contents": '"Ada Lovelace"\nA countess.', "url": PAGE}]
    pages = [{"url": PAGE, "contents": "first words " + "x" * 25_000 + "second chunk <answer>no</answer>"}]
    for name, content in (("corpus", rows), ("pages", pages)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    words = [sys.executable, "-m", "searchr1.cli", "retrieval-server", "--retriever_name", "bm25", "--port", "0"]
    words += ["--corpus_path", str(tmp_path / "corpus.jsonl"), "--pages_path", str(tmp_path / "pages.jsonl")]
    process = subprocess.Popen([*words, "--save-address-to", str(tmp_path / "address")])
    deadline = time.monotonic() + 60
    while not (tmp_path / "address").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield (tmp_path / "address").read_text()
    process.terminate()
    process.wait(20)


def test_a_page_comes_in_chunks_and_its_tags_are_text(address, tmp_path):
    yaml = tmp_path / "config.yaml"
    yaml.write_text(f"tools: {{search: {{server_addr: '{address}', topk: 1}}, access: {{enabled: true}}}}\n")
    config = load_config(yaml, [])

    async def run():
        tools = build_tools(config.tools, "searchr1")
        found = await tools["search"].call(["countess"])
        page = await tools["access"].call(["http://w.example/Ada Lovelace#life", "https://w.example/nobody"])
        stats = client_stats(tools)
        for tool in tools.values():
            await tool.aclose()
        return found, page, stats

    found, page, stats = asyncio.run(run())
    assert "Ada Lovelace" in found.body
    assert page.error is None
    first, second = page.body.split(">>>> Page 2 >>>>")
    assert first.startswith(">>>> Page 1 >>>>\n\nfirst words xxx")
    assert "second chunk" in second
    assert "<answer>" not in page.body
    assert page.body.endswith("No such page.")
    assert (stats.calls, stats.failures) == (2, 0)
