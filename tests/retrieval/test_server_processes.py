"""The server as a process: loading, tokens, workers that die, clients that go away, signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import psutil
import pytest

from searchr1.cli import main
from searchr1.commands.retrieval_server import parse
from searchr1.errors import UserError

ROWS = [{"id": str(i), "contents": f'"Title {i}"\nword{i} common text'} for i in range(50)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = ["--corpus_path", str(folder / "corpus.jsonl"), "--save_dir", str(folder / "index"), "--retriever_name", "bm25"]
    assert main(["build-index", *flags]) == 0
    return folder


@contextlib.contextmanager
def server(files, *flags, env=None):
    """A running server; gives its process and its address."""
    address = files / f"address-{time.monotonic_ns()}"
    words = [sys.executable, "-m", "searchr1.cli", "retrieval-server", "--corpus_path", str(files / "corpus.jsonl")]
    words += ["--retriever_name", "bm25", "--port", "0", "--save-address-to", str(address), *flags]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | (env or {})
    )
    try:
        wait_for(lambda: address.exists() or process.poll() is not None)
        assert process.poll() is None, process.communicate()[0]
        yield process, f"http://{address.read_text()}"
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=20)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.wait(5)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def search(url, query="word7", **more):
    return httpx.post(f"{url}/retrieve", json={"queries": [query], "topk": 1} | more, timeout=20, trust_env=False)


def get(url, path):
    return httpx.get(url + path, timeout=20, trust_env=False)


def workers_of(process):
    """The serving children; Python's resource tracker is one more child."""
    found = []
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_a_token_guards_all_but_the_probes(files):
    with server(files, env={"SEARCHR1_RETRIEVAL_TOKEN": "s3cret"}) as (_, url):
        assert [get(url, path).status_code for path in ("/health", "/ready", "/")] == [200, 200, 200]
        assert [get(url, "/metrics").status_code, search(url).status_code] == [401, 401]
        wrong = httpx.post(
            f"{url}/retrieve", json={"queries": ["x"]}, headers={"authorization": "Bearer s3cre"}, trust_env=False
        )
        assert wrong.status_code == 401
        assert "s3cret" not in wrong.text
        right = httpx.post(
            f"{url}/retrieve", json={"queries": ["word7"]}, headers={"authorization": "Bearer s3cret"}, trust_env=False
        )
        assert right.json()["result"][0][0]["id"] == "7"


def test_metrics_count_requests_and_where_answers_came_from(files):
    with server(files) as (_, url):
        for _ in range(3):
            assert search(url).status_code == 200
        assert search(url, topk=-1).status_code == 422
        get(url, "/no/such/path")
        text = get(url, "/metrics").text
    assert 'searchr1_retrieval_requests_total{path="/retrieve",status="200"} 3.0' in text
    assert 'searchr1_retrieval_requests_total{path="/retrieve",status="422"} 1.0' in text
    assert 'searchr1_retrieval_requests_total{path="other",status="404"} 1.0' in text
    assert 'searchr1_retrieval_queries_total{source="cache"} 2.0' in text
    assert 'searchr1_retrieval_queries_total{source="searched"} 1.0' in text
    assert "searchr1_retrieval_batch_queries_count 1.0" in text


def test_workers_share_a_port_and_a_dead_one_is_replaced(files):
    with server(files, "--index_path", str(files / "index"), "--workers", "2") as (process, url):
        assert get(url, "/health").json()["passages"] == 50
        first = workers_of(process)
        assert len(first) == 2
        for number in range(40):
            assert search(url, f"word{number}").json()["result"][0][0]["id"] == str(number)
        metrics = get(url, "/metrics").text
        assert 'searchr1_retrieval_requests_total{path="/retrieve",status="200"} 40.0' in metrics
        first[0].kill()
        wait_for(lambda: len(workers_of(process)) == 2 and first[0].pid not in {p.pid for p in workers_of(process)})
        wait_for(lambda: all(search(url).status_code == 200 for _ in range(20)))
    assert not any(child.is_running() for child in first)


def test_a_polite_stop_is_an_ordinary_end(files):
    for flags in ([], ["--index_path", str(files / "index"), "--workers", "2"]):
        with server(files, *flags) as (process, _):
            process.terminate()
            log = process.communicate(timeout=20)[0]
            assert process.returncode == 0
            assert "leaked" not in log
            assert "Traceback" not in log


def test_workers_stop_when_their_parent_is_killed(files):
    with server(files, "--index_path", str(files / "index"), "--workers", "2") as (process, _):
        children = workers_of(process)
        process.kill()
        process.wait()
        wait_for(lambda: not any(child.is_running() for child in children), 15)


def test_workers_that_cannot_load_end_the_server_with_the_reason(files):
    words = [sys.executable, "-m", "searchr1.cli", "retrieval-server", "--corpus_path", str(files / "corpus.jsonl")]
    words += ["--retriever_name", "bm25", "--index_path", str(files / "nowhere"), "--port", "0", "--workers", "2"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "no such file" in result.stderr
    assert "Traceback" not in result.stderr


SLOW = """
import sys, time
from searchr1.errors import UserError
from searchr1.retrieval.server.metrics import Metrics
from searchr1.retrieval.server.address import bind
from searchr1.retrieval.server.processes import serve_here
def load():
    print("loading", flush=True)
    time.sleep(float(sys.argv[1]))
    raise UserError("--corpus_path x: cannot load")
listener = bind("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
try:
    serve_here(listener, load, Metrics(), 3, None, print)
except UserError as error:
    print("told:", error, flush=True)
"""


def test_while_it_loads_a_server_is_alive_but_not_ready():
    process = subprocess.Popen([sys.executable, "-c", SLOW, "4"], stdout=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
    assert process.stdout.readline() == "loading\n"
    assert get(url, "/health").json() == {"status": "loading"}
    for answer in (get(url, "/ready"), search(url)):
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
    assert "told: --corpus_path x: cannot load" in process.communicate(timeout=20)[0]


def test_a_server_can_be_stopped_while_it_loads():
    process = subprocess.Popen([sys.executable, "-c", SLOW, "100"], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=15)


def test_clients_that_go_away_do_no_harm(files):
    with server(files) as (process, url):
        port = int(url.rpartition(":")[2])
        body = json.dumps({"queries": ["common"] * 100}).encode()
        head = b"POST /retrieve HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(
            body
        )
        for cut in (10, len(head), len(head) + 20, len(head) + len(body)):
            for _ in range(20):
                with socket.create_connection(("127.0.0.1", port), timeout=5) as gone:
                    gone.sendall((head + body)[:cut])
                    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # reset
        assert search(url).status_code == 200
        assert psutil.Process(process.pid).num_fds() < 60


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--corpus_path is missing"),
        (["--corpus_path", "c", "--topk", "0"], "--topk 0"),
        (["--corpus_path", "c", "--workers", "2"], "needs --index_path"),
        (["--corpus_path", "c", "--workers", "0"], "--workers 0"),
        (["--corpus_path", "c", "--timeout_s", "0"], "--timeout_s"),
        (["--corpus_path", "c", "--reranker_model", "m", "--reranker_url", "u"], "give one of them"),
        (["--corpus_path", "c", "--reranker_model", "m", "--topk_retrieval", "2"], "--topk_retrieval 2"),
        (["--engine", "serper", "--corpus_path", "c"], "takes no --corpus_path"),
    ],
)
def test_flags_that_do_not_go_together_are_reported(flags, message):
    with pytest.raises(UserError, match=message):
        parse(flags)
