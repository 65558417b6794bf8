"""A model answers on a real engine and a real retrieval server, as people start them: serve-chat, infer, chat."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time

import aiohttp
import pytest

from searchr1.data.reading import read_rows
from searchr1.demo.demo import COLD_START
from searchr1.demo.processes import retrieval_server

MODEL = ("--model_path", str(COLD_START), "--prompt_template", "demo", "--max_turns", "3")


async def stream(session, url, question, leave_after=None):
    """The events of one answer."""
    events = []
    async with session.post(f"{url}/ask", json={"question": question}) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if line.strip():
                events.append(json.loads(line))
            if leave_after is not None and len(events) > leave_after:
                break
    return events


async def talk(url, questions):
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        answers = await asyncio.gather(*(stream(session, url, question) for question in questions))
        for events in answers:
            assert events[0]["type"] == "started"
            assert events[-1]["type"] == "done"
            stats = events[-1]["stats"]
            assert sum(event["type"] == "text" for event in events) > stats["turns"]
            found = [event for event in events if event["type"] == "found"]
            assert sum(len(event["results"]) for event in found) == stats["searches"]
            for event in found:
                assert all(passage["url"].startswith("https://encyclopedia.example/") for passage in event["results"][0])
        assert sum(events[-1]["stats"]["searches"] for events in answers) > 0
        assert sum(events[-1]["answer"] is not None for events in answers) > len(answers) / 2
        url_found = next(e["results"][0][0]["url"] for events in answers for e in events if e["type"] == "found")
        async with session.post(f"{url}/page", json={"url": url_found}) as page:
            assert len((await page.json())["text"]) > 100
        # Greedy: the same question alone is answered the same.
        again = await stream(session, url, questions[0])
        assert again[-1]["answer"] == answers[0][-1]["answer"]
        # Who leaves takes their request along.
        await stream(session, url, questions[1], leave_after=2)
        deadline = time.monotonic() + 30
        while True:
            async with session.get(f"{url}/health") as health:
                if (await health.json())["running"] == 0:
                    break
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        return [events[-1]["answer"] for events in answers]


def questions_of(demo):
    return [row["question"] for _, row in read_rows(demo.path / "world" / "test.jsonl")][:6]


@pytest.fixture(scope="module")
def served(demo, tmp_path_factory):
    """What a server answered, which then ended well."""
    folder = tmp_path_factory.mktemp("chat")
    with retrieval_server(demo.path / "world", folder / "retrieval.log") as server:
        return served_answers(demo, server.address, folder)


def served_answers(demo, address, tmp_path):
    command = [sys.executable, "-m", "searchr1.cli"]
    words = ["serve-chat", *MODEL, "--retriever-url", address, "--port", "0", "--save-address-to", str(tmp_path / "address")]
    server = subprocess.Popen([*command, *words])
    try:
        deadline = time.monotonic() + 180
        while not (tmp_path / "address").exists():
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        answers = asyncio.run(talk(f"http://{(tmp_path / 'address').read_text()}", questions_of(demo)))
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
    return answers


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_served_model_answers_several_people_at_once(served):
    assert len(served) == 6


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_infer_answers_as_the_server_does(demo, address, served):
    words = ["infer", *MODEL, "--retriever-url", f"http://{address}", "--prompt", "-", "--json"]
    result = subprocess.run(
        [sys.executable, "-m", "searchr1.cli", *words],
        input="\n".join(questions_of(demo)),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert [json.loads(line)["answer"] for line in result.stdout.splitlines()] == served


@pytest.mark.slow
def test_the_terminal_chat_answers_a_pipe(demo, address):
    question = questions_of(demo)[0]
    words = ["chat", *MODEL, "--retriever-url", address]
    process = subprocess.Popen(
        [sys.executable, "-m", "searchr1.cli", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        process.stdin.write("/model\n" + question + "\n/nonsense\n/history\n/quit\n")
        process.stdin.flush()
        output, _ = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "tokens/s" in output
    assert "no command /nonsense" in output
    assert output.count(question) == 2
    assert "\x1b" not in output
