"""What clients written for other systems send, and what they take out of the answer.

Search-R1, slime, RLinf, ASearcher, SkyRL and gem differ; verl, agent-lightning and torchtitan send what Search-R1 sends.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import httpx
import msgspec
import pytest

ROWS = [
    {"id": "7", "contents": '"Ada Lovelace"\nAda wrote the first program.\nShe was a countess.'},
    {"id": "8", "contents": '"Charles Babbage"\nCharles designed an engine.', "url": "https://w.example/Charles_Babbage"},
]
PAGES = [{"url": "https://en.example/w/index.php?title=Ada_Lovelace", "contents": "All about Ada. " * 3}]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    for name, rows in (("corpus", ROWS), ("pages", PAGES)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [sys.executable, "-m", "searchr1.cli", "retrieval-server", "--retriever_name", "bm25", "--port", "0"]
    words += ["--corpus_path", str(folder / "corpus.jsonl"), "--pages_path", str(folder / "pages.jsonl"), "--topk", "3"]
    process = subprocess.Popen([*words, "--save-address-to", str(folder / "address")])
    deadline = time.monotonic() + 60
    while not (folder / "address").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield f"http://{(folder / 'address').read_text()}"
    process.terminate()
    process.wait(10)


def post(address, body, **headers):
    answer = httpx.post(address, content=json.dumps(body), headers=headers, timeout=20, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_search_r1_takes_title_and_text_out_of_the_scored_document(url):
    found = post(f"{url}/retrieve", {"queries": ["Ada", "engine"], "topk": 3, "return_scores": True})["result"]
    text = ""
    for number, item in enumerate(found[0]):
        content = item["document"]["contents"]
        title, body = content.split("\n")[0], "\n".join(content.split("\n")[1:])
        text += f"Doc {number + 1}(Title: {title}) {body}\n"
    assert text == 'Doc 1(Title: "Ada Lovelace") Ada wrote the first program.\nShe was a countess.\n'
    assert isinstance(found[1][0]["score"], float)


def test_slime_sends_one_query_and_reads_the_first_list(url):
    found = post(f"{url}/retrieve", {"queries": ["Charles"], "topk": 1, "return_scores": True})["result"][0]
    assert [item["document"]["contents"].split("\n", 1)[0] for item in found] == ['"Charles Babbage"']


def test_rlinf_reads_contents_and_url_of_bare_documents(url):
    found = post(f"{url}/retrieve", {"queries": ["Ada Charles"], "topk": 3, "return_scores": False})["result"][0]
    assert {document["contents"]: document["url"] for document in found} == {
        ROWS[0]["contents"]: "",
        ROWS[1]["contents"]: ROWS[1]["url"],
    }


def test_the_topk_of_the_server_holds_where_the_client_says_nothing(url):
    assert len(post(f"{url}/retrieve", {"queries": ["Ada Charles"]})["result"][0]) == 2


def test_asearcher_opens_pages_by_the_other_form_of_their_address(url):
    asked = ["https://en.example/w/index.php/Ada_Lovelace", "https://en.example/nothing"]
    found = post(f"{url}/access", {"urls": asked}, **{"content-type": "application/json"})["result"]
    assert found == [{"url": PAGES[0]["url"], "contents": PAGES[0]["contents"]}, None]


def test_a_client_that_does_not_name_the_type_of_its_body(url):
    assert post(f"{url}/retrieve", {"queries": ["Ada"]}, **{"content-type": "text/plain"})["result"][0][0]["id"] == "7"


def test_skyrl_sends_a_query_alone_and_reads_a_list_of_lists(url):
    found = post(f"{url}/retrieve", {"query": "Charles", "topk": 3, "return_scores": True})["result"]
    text = ["".join(f"Doc {i + 1}: {item['document']['contents'].strip()}\n" for i, item in enumerate(row)) for row in found]
    assert text == ['Doc 1: "Charles Babbage"\nCharles designed an engine.\n']


def test_gem_sends_and_reads_msgpack(url):
    body = msgspec.msgpack.encode({"queries": ["Ada"], "topk": 3, "return_scores": True})
    answer = httpx.post(f"{url}/retrieve", content=body, timeout=20, trust_env=False)
    assert answer.headers["content-type"] == "application/msgpack"
    found = msgspec.msgpack.decode(answer.content)["result"][0]
    assert [item["document"]["contents"] for item in found] == [ROWS[0]["contents"]]
    assert isinstance(found[0]["score"], float)
    broken = httpx.post(f"{url}/retrieve", content=body[:-3], timeout=20, trust_env=False)
    assert (broken.status_code, "msgpack" in broken.text) == (422, True)


def test_search_r1_sends_the_queries_of_all_attempts_of_a_step(url):
    """512 questions, five attempts each: 2,560 queries, most of them different; an answer for each, in their order."""
    queries = [f"{'Ada' if number % 2 else 'Charles'} {number}" for number in range(2560)]
    found = post(f"{url}/retrieve", {"queries": queries, "topk": 3, "return_scores": True})["result"]
    assert [row[0]["document"]["id"] for row in found] == ["8", "7"] * 1280
