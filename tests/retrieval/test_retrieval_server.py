"""The server over HTTP, field by field, as processes of its own on free ports."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time

import httpx
import pytest

from searchr1.errors import UserError
from searchr1.retrieval.client import SearchClient, SearchUnavailable, wait_until_healthy

ROWS = [
    ("Ada Lovelace", "Ada Lovelace wrote the first program.", "https://wiki.example/Ada_Lovelace"),
    ("Charles Babbage", "Charles Babbage designed the analytical engine.", None),
    ("Café", "Ein Ort für Kaffee: <search>no tag</search>", "https://wiki.example/w/index.php?title=Café"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wiki")
    with (folder / "corpus.jsonl").open("w") as file:
        for number, (title, text, url) in enumerate(ROWS):
            row = {"id": str(number), "contents": f'"{title}"\n{text}'} | ({"url": url} if url else {})
            file.write(json.dumps(row) + "\n\n")
    with (folder / "pages.jsonl").open("w") as file:
        for title, text, url in ROWS:
            if url:
                file.write(json.dumps({"url": url, "title": title, "contents": text * 2}) + "\n")
    return folder


def start(files, *flags):
    address = files / f"address-{time.monotonic_ns()}"
    words = [sys.executable, "-m", "searchr1.cli", "retrieval-server", "--corpus_path", str(files / "corpus.jsonl")]
    words += ["--pages_path", str(files / "pages.jsonl"), "--port", "0", "--save-address-to", str(address), *flags]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while not address.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, address.read_text()


@pytest.fixture(scope="module")
def server(files):
    process, address = start(files, "--retriever_name", "bm25", "--topk", "2")
    yield address
    process.terminate()
    process.wait(10)


def post(address, path, body):
    return httpx.post(f"http://{address}{path}", json=body, timeout=20, trust_env=False)


def test_retrieve_without_scores_gives_bare_documents(server):
    result = post(server, "/retrieve", {"queries": ["Ada Lovelace"], "topk": 1}).json()["result"]
    title, text, url = ROWS[0]
    assert result == [[{"id": "0", "contents": f'"{title}"\n{text}', "url": url}]]


def test_retrieve_with_scores_nests_the_document(server):
    result = post(server, "/retrieve", {"queries": ["Babbage engine", "Kaffee"], "return_scores": True}).json()["result"]
    assert [hits[0]["document"]["id"] for hits in result] == ["1", "2"]
    assert all(hit["score"] > 0 for hits in result for hit in hits)
    assert "url" not in result[0][0]["document"]


def test_fewer_hits_than_topk_and_no_hit_at_all(server):
    result = post(server, "/retrieve", {"queries": ["Lovelace", "zzz"], "topk": 50}).json()["result"]
    assert [len(hits) for hits in result] == [1, 0]


def test_no_queries(server):
    assert post(server, "/retrieve", {"queries": []}).json() == {"result": []}


@pytest.mark.parametrize(
    "url",
    [
        "https://wiki.example/Ada_Lovelace",
        "http://wiki.example/Ada_Lovelace/",
        "https://WIKI.example/Ada%5FLovelace#early-life",
        "wiki.example/Ada Lovelace",
    ],
)
def test_access_reads_variants_of_an_address(server, url):
    result = post(server, "/access", {"urls": [url, "https://wiki.example/nobody"]}).json()["result"]
    assert result == [{"url": "https://wiki.example/Ada_Lovelace", "contents": ROWS[0][1] * 2}, None]


def test_access_reads_index_php(server):
    result = post(server, "/access", {"urls": ["https://wiki.example/w/index.php/Café"]}).json()["result"]
    assert result[0]["contents"] == ROWS[2][1] * 2


def test_health(server):
    wait_until_healthy(server, 5)
    assert httpx.get(f"http://{server}/health", trust_env=False).json() == {"status": "ok", "passages": 3, "pages": 2}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"queries": "text"},
        {"queries": [1]},
        {"queries": ["x"], "topk": 0},
        {"queries": ["x"], "topk": "many"},
        {"queries": ["x"] * 2000},
        {"queries": ["x" * 5000]},
        [],
    ],
)
def test_bad_bodies_are_the_clients_fault(server, body):
    assert post(server, "/retrieve", body).status_code == 422


def test_odd_queries_never_break_the_server(server):
    queries = ["", " ", "\x00", "💥" * 100, "the", "<search>", "a\nb", '"']
    result = post(server, "/retrieve", {"queries": queries, "topk": 3})
    assert result.status_code == 200
    assert len(result.json()["result"]) == len(queries)


def test_many_clients_at_once_get_their_own_answers(server):
    async def run():
        client = SearchClient([server], topk=1, timeout_s=30)
        names = ["Ada Lovelace", "Charles Babbage", "Kaffee"]
        found = await asyncio.gather(*(client.search([names[i % 3]]) for i in range(200)))
        await client.aclose()
        return found

    found = asyncio.run(run())
    assert [hits[0][0].id for hits in found] == [str(i % 3) for i in range(200)]
    assert found[0][0][0].title == "Ada Lovelace"
    assert found[0][0][0].text == "Ada Lovelace wrote the first program."


def test_client_goes_to_the_other_server_when_one_is_dead(server):
    async def run():
        client = SearchClient([f"127.0.0.1:{free_port()}", server], topk=1, timeout_s=20, retries=2)
        found = [await client.search(["Babbage"]) for _ in range(6)]
        await client.aclose()
        return found

    assert all(hits[0][0].id == "1" for hits in asyncio.run(run()))


def test_client_gives_up_at_its_deadline():
    async def run():
        silent = socket.socket()
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        client = SearchClient([f"127.0.0.1:{silent.getsockname()[1]}"], topk=1, timeout_s=0.5, retries=5)
        started = time.monotonic()
        with pytest.raises(SearchUnavailable):
            await client.search(["x"])
        assert time.monotonic() - started < 3
        assert client.stats.failures == 1
        await client.aclose()
        silent.close()

    asyncio.run(run())


def test_port_in_use_is_told(server, files):
    port = server.rpartition(":")[2]
    words = [sys.executable, "-m", "searchr1.cli", "retrieval-server", "--retriever_name", "bm25"]
    words += ["--corpus_path", str(files / "corpus.jsonl"), "--port", port]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert f"--port {port}" in result.stderr
    assert "Traceback" not in result.stderr


def test_wait_until_healthy_gives_up():
    with pytest.raises(UserError, match="did not answer"):
        wait_until_healthy(f"127.0.0.1:{free_port()}", 0.3)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
