"""What a server of a million passages keeps in memory beyond its index."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import httpx
import psutil
import pytest

PASSAGES = 1_000_000
GIB = 1 << 30


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_million_passages_and_pages_fit_in_a_gibibyte_beyond_the_index(tmp_path):
    rng = random.Random(0)
    words = [f"word{number}" for number in range(20_000)]
    with (tmp_path / "corpus.jsonl").open("w") as file:
        for row in range(PASSAGES):
            text = " ".join(rng.choices(words, k=25))
            file.write(f'{{"id": "{row}", "contents": "\\"Title {row}\\"\\n{text}", "url": "https://w.example/{row}"}}\n')
    corpus = ["--retriever_name", "bm25", "--corpus_path", str(tmp_path / "corpus.jsonl")]
    command = [sys.executable, "-m", "searchr1.cli"]
    subprocess.run([*command, "build-index", *corpus, "--save_dir", str(tmp_path / "index")], check=True, timeout=600)
    command += ["retrieval-server", *corpus, "--index_path", str(tmp_path / "index"), "--port", "0", "--cache_mib", "64"]
    command += ["--pages_path", str(tmp_path / "corpus.jsonl"), "--save-address-to", str(tmp_path / "address")]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "address").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with httpx.Client(base_url=f"http://{(tmp_path / 'address').read_text()}", trust_env=False, timeout=30) as http:
            for _ in range(300):
                queries = [" ".join(rng.choices(words, k=6)) for _ in range(20)]
                assert len(http.post("/retrieve", json={"queries": queries}).json()["result"]) == 20
                urls = [f"https://w.example/{rng.randrange(PASSAGES)}" for _ in range(20)]
                assert None not in http.post("/access", json={"urls": urls}).json()["result"]
        resident = psutil.Process(process.pid).memory_info().rss
    finally:
        process.terminate()
        process.wait(20)
    index = sum(file.stat().st_size for file in (tmp_path / "index").iterdir())
    assert resident < index + GIB
    assert resident < 1.5 * GIB  # the index is 200 MB
