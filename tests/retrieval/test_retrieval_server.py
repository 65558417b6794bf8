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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from searchr1.errors import UserError
from searchr1.retrieval.client.client import SearchClient, wait_until_healthy
from searchr1.retrieval.server.address import bind, reachable_address, write_address

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


def start(files, *flags, pages=True, into=None):
    """`into`: the folder that the address is written into, by a flag among `flags`."""
    address = files / f"address-{time.monotonic_ns()}"
    words = [sys.executable, "-m", "searchr1.cli", "retrieval-server", "--corpus_path", str(files / "corpus.jsonl")]
    words += ["--port", "0", *([] if into else ["--save-address-to", str(address)]), *flags]
    words += ["--pages_path", str(files / "pages.jsonl")] if pages else []
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while not (found := [address] if address.exists() else list(into.glob("*.txt")) if into else []):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, found[0].read_text()


@pytest.fixture(scope="module")
def server(files):
    process, address = start(files, "--retriever_name", "bm25", "--topk", "2")
    yield address
    process.terminate()
    process.wait(10)


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=f"http://{server}", timeout=20, trust_env=False) as client:
        yield client


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
    assert result[0][0]["document"]["url"] == ""


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
    expected = {"status": "ok", "passages": 3, "pages": 2, "retriever": "bm25"}
    assert httpx.get(f"http://{server}/health", trust_env=False).json() == expected
    assert httpx.get(f"http://{server}/ready", trust_env=False).json() == {"status": "ready"}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"queries": "text"},
        {"queries": [1]},
        {"queries": ["x"], "topk": -1},
        {"queries": ["x"], "query": "x"},
        {"queries": None, "query": None},
        {"query": ["x"]},
        {"queries": ["x"], "topk": "many"},
        {"queries": ["x"] * 33_000},
        {"queries": ["x"] * 600, "topk": 110},
        {"queries": ["x" * (1 << 20) + "x"]},
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


@pytest.mark.parametrize("query", ["", "zzz", "\x00", "💥"])
def test_a_query_without_known_words_finds_nothing(server, query):
    assert post(server, "/retrieve", {"queries": [query]}).json() == {"result": [[]]}


@pytest.mark.parametrize("default", [{}, {"topk": None}, {"topk": 0}, {"topk": 0, "topk_rerank": 0, "topk_retrieval": 0}])
def test_no_topk_is_the_servers(server, default):
    result = post(server, "/retrieve", {"queries": ["Ada Charles für"]} | default).json()["result"]
    assert len(result[0]) == 2


def test_a_long_query_is_searched_by_its_beginning(server):
    result = post(server, "/retrieve", {"queries": ["Lovelace " + "x" * 1_000_000], "topk": 1})
    assert result.json()["result"][0][0]["id"] == "0"


def test_a_huge_body_is_rejected(server):
    answer = httpx.post(f"http://{server}/retrieve", content=b" " * (17 << 20), timeout=20, trust_env=False)
    assert answer.status_code == 413


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
bodies = json_values | st.fixed_dictionaries(
    {"queries": st.lists(st.text(max_size=20), max_size=4) | json_values},
    optional={"topk": st.integers() | json_values, "return_scores": json_values, "urls": json_values},
)
odd_bytes = st.sampled_from([b"", b"{", b"[" * 50_000, b"\xff\xfe", b'{"queries": ["\\ud800"]}', b'{"urls": ["http://[x"]}'])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/retrieve", "/access"]), content=bodies.map(lambda body: json.dumps(body).encode()) | odd_bytes
)
def test_no_body_breaks_the_server(http, path, content):
    answer = http.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 422)
    answer.json()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_any_text_is_a_query_and_an_address(http, texts):
    for path, key in (("/retrieve", "queries"), ("/access", "urls")):
        answer = http.post(path, json={key: texts})
        assert answer.status_code == 200
        assert len(answer.json()["result"]) == len(texts)


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


def test_requests_with_different_topk_at_once(server):
    async def run():
        clients = [SearchClient([server], topk=topk, timeout_s=30) for topk in (1, 2, 3)]
        # A word of every passage, so that each has a score.
        found = await asyncio.gather(*(client.search(["Ada Charles für"]) for client in clients for _ in range(10)))
        for client in clients:
            await client.aclose()
        return [len(hits[0]) for hits in found]

    assert asyncio.run(run()) == [1] * 10 + [2] * 10 + [3] * 10


def test_client_reads_pages(server):
    async def run():
        client = SearchClient([server])
        pages = await client.access([ROWS[0][2], "https://wiki.example/nobody"])
        assert await client.access([]) == []
        await client.aclose()
        return pages

    page, nobody = asyncio.run(run())
    assert (page.url, page.contents, nobody) == (ROWS[0][2], ROWS[0][1] * 2, None)


def test_without_pages_every_address_is_null_and_the_server_says_so_once(files):
    folder = files / "addresses"
    folder.mkdir()
    process, address = start(files, "--retriever_name", "bm25", "--save-address-to", str(folder), pages=False, into=folder)
    try:
        for _ in range(2):
            answer = post(address, "/access", {"urls": ["x", "https://wiki.example/Ada_Lovelace"]})
            assert (answer.status_code, answer.json()) == (200, {"result": [None, None]})
    finally:
        process.terminate()
        log = process.communicate(timeout=10)[0]
    host, port = address.split(":")
    assert [file.name for file in folder.iterdir()] == [f"Host{host}_IP{port}.txt"], "RLinf's name"
    assert log.count("started without --pages_path") == 1
    assert "building the BM25 index in memory" in log
    assert "passages 3, pages 0, retriever bm25; loaded in" in log
    assert "peak_mib" in log
    assert f"http://{address}" in log


def test_where_an_address_is_written(tmp_path):
    (tmp_path / "file").write_text("of an earlier server")
    (tmp_path / "folder").mkdir()
    for place in ("file", "new/file", "folder", "made/"):
        write_address(f"{tmp_path}/{place}", "10.1.2.3:8000")
    write_address(tmp_path / "folder", "[::1]:80")
    written = {str(file.relative_to(tmp_path)): file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    assert written == {
        "file": "10.1.2.3:8000",
        "new/file": "10.1.2.3:8000",
        "folder/Host10.1.2.3_IP8000.txt": "10.1.2.3:8000",
        "made/Host10.1.2.3_IP8000.txt": "10.1.2.3:8000",
        "folder/Host[::1]_IP80.txt": "[::1]:80",
    }


def test_listening_everywhere_announces_an_address_that_others_reach():
    address = reachable_address("0.0.0.0", 8000)
    assert address.endswith(":8000")
    assert not address.startswith("0.")
    assert reachable_address("::1", 8000) == "[::1]:8000"


def test_port_in_use_is_reported(server, files):
    port = server.rpartition(":")[2]
    words = [sys.executable, "-m", "searchr1.cli", "retrieval-server", "--retriever_name", "bm25"]
    words += ["--corpus_path", str(files / "corpus.jsonl"), "--port", port]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert f"--port {port}" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("192.0.2.77", 0)])
def test_what_cannot_be_bound_is_reported(host, port):
    with pytest.raises(UserError, match="cannot listen"):
        bind(host, port)


def test_wait_until_healthy_gives_up():
    with pytest.raises(UserError, match="did not answer"):
        wait_until_healthy(f"127.0.0.1:{free_port()}", 0.3)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
