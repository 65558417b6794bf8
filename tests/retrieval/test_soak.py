"""Ten minutes at full load: no error, and memory that stays where it was."""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time

import aiohttp
import psutil
import pytest

SECONDS = float(os.environ.get("SEARCHR1_SOAK_SECONDS", "600"))
CLIENTS = 64


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 120)
def test_memory_stays_flat_under_full_load(tmp_path):
    rng = random.Random(0)
    words = [f"word{number}" for number in range(3000)]
    with (tmp_path / "corpus.jsonl").open("w") as file:
        for row in range(5000):
            text = " ".join(rng.choices(words, k=60))
            file.write(json.dumps({"id": str(row), "contents": f'"T{row}"\n{text}', "url": f"https://w/{row}"}) + "\n")
    command = [sys.executable, "-m", "searchr1.cli", "retrieval-server", "--retriever_name", "bm25", "--port", "0"]
    command += ["--corpus_path", str(tmp_path / "corpus.jsonl"), "--pages_path", str(tmp_path / "corpus.jsonl")]
    command += ["--cache_mib", "8", "--save-address-to", str(tmp_path / "address")]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "address").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        memory, errors, answered = asyncio.run(soak(f"http://{(tmp_path / 'address').read_text()}", process.pid, words))
    finally:
        process.terminate()
        process.wait(20)
    assert errors == []
    assert answered > 100 * SECONDS
    # The first quarter warms allocators and fills the cache.
    early = statistics.median(memory[len(memory) // 4 : len(memory) // 2])
    late = statistics.median(memory[-len(memory) // 4 :])
    assert late < early * 1.02 + 4, memory


async def soak(url, pid, words):
    """(MiB over time, errors, answers)"""
    until = time.monotonic() + SECONDS
    memory, errors, answered = [], [], 0
    server = psutil.Process(pid)

    async def client(session, number):
        nonlocal answered
        rng = random.Random(number)
        while time.monotonic() < until and not errors:
            query = " ".join(rng.choices(words, k=rng.randrange(1, 9)))
            calls = [("/retrieve", {"queries": [query] * rng.randrange(1, 4), "topk": rng.choice([1, 3, 10])})]
            calls += [("/access", {"urls": [f"https://w/{rng.randrange(6000)}"]})] if rng.random() < 0.1 else []
            calls += [("/retrieve", {"queries": 3})] if rng.random() < 0.01 else []
            for path, body in calls:
                async with session.post(url + path, json=body) as answer:
                    await answer.read()
                    if answer.status != (422 if body == {"queries": 3} else 200):
                        errors.append(f"{path} {body}: {answer.status}")
                answered += 1

    async def watch():
        while time.monotonic() < until and not errors:
            memory.append(server.memory_info().rss / 2**20)
            await asyncio.sleep(min(2.0, SECONDS / 40))

    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=CLIENTS)) as session:
        await asyncio.gather(watch(), *(client(session, number) for number in range(CLIENTS)))
    return memory, errors, answered
