"""A retrieval server that stops answering is named at once, and so is its return."""

from __future__ import annotations

import queue
import socket
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from searchr1.retrieval.client.outages import REFUSED, SILENT, OutageWatch, ServerState, problem_of

URL = "http://10.0.0.1:8000"
CONSEQUENCE = "searches wait"


def said(answers, **settings):
    """What a server's state says of answers at times: (time, problem or None)."""
    state = ServerState(f"tools.search.server_addr: {URL}", CONSEQUENCE, **settings)
    return [(now, text) for now, problem in answers if (text := state.note(problem, now))], state.outages


@pytest.mark.parametrize(
    ("answers", "times", "outages"),
    [
        ([(0, None), (5, None), (10, None)], [], 0),
        ([(0, None), (5, REFUSED), (6, REFUSED), (7, None)], [5, 7], 1),
        ([(0, None), (5, SILENT), (12, None)], [], 0),  # slow once: it is only slow
        ([(0, None), (5, SILENT), (8, SILENT), (11, SILENT), (30, None)], [8, 30], 1),
        ([(0, "status 503"), (1, "status 503"), (9, None)], [1, 9], 1),
        ([(0, REFUSED), (59, REFUSED), (60, REFUSED), (119, REFUSED), (120, REFUSED)], [0, 60, 120], 1),
        ([(0, REFUSED), (5, None), (10, REFUSED), (15, None)], [0, 5, 10, 15], 2),
        ([(0, SILENT), (3, REFUSED)], [3], 1),
    ],
)
def test_an_outage_is_said_once_reminded_of_each_minute_and_ended(answers, times, outages):
    lines, counted = said(answers)
    assert ([now for now, _ in lines], counted) == (times, outages)


def test_the_line_names_key_server_problem_and_what_follows():
    lines, _ = said([(0, REFUSED), (61, REFUSED), (75, None)])
    assert [text for _, text in lines] == [
        f"tools.search.server_addr: {URL} does not answer (connection refused); searches wait",
        f"tools.search.server_addr: {URL} has not answered for 61 s (connection refused); searches wait",
        f"tools.search.server_addr: {URL} answers again after 75 s",
    ]


def test_a_server_that_need_not_be_there_is_missed_only_after_it_was():
    assert said([(0, REFUSED), (5, REFUSED)], awaited=False) == ([], 0)
    lines, counted = said([(0, REFUSED), (5, None), (10, REFUSED)], awaited=False)
    assert ([now for now, _ in lines], counted) == ([10], 1)


class Scripted(BaseHTTPRequestHandler):
    """Answers with the server's status."""

    def do_GET(self):
        self.send_response(self.server.status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *words):
        pass


def serve(port=0, status=200):
    server = ThreadingHTTPServer(("127.0.0.1", port), Scripted)
    server.status = status
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


def end(server):
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "problem"), [(200, None), (503, "status 503"), (502, "status 502"), (404, None), (401, None)]
)
def test_a_server_of_another_system_need_not_know_ready(status, problem):
    server = serve(status=status)
    try:
        assert problem_of(f"http://127.0.0.1:{server.server_port}") == problem
    finally:
        end(server)


def test_a_stopped_server_takes_connections_and_says_nothing(monkeypatch):
    monkeypatch.setattr("searchr1.retrieval.client.outages.ANSWER_WITHIN_S", 0.05)
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert problem_of(url) == SILENT
    assert problem_of(url) == REFUSED


def test_what_is_no_http_is_a_problem_and_no_crash():
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:

        def babble():
            connection, _ = listening.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"\x00\x01 nonsense\r\n\r\n")

        threading.Thread(target=babble, daemon=True).start()
        assert "nonsense" in problem_of(f"http://127.0.0.1:{listening.getsockname()[1]}")


def test_a_watch_follows_every_server_and_counts():
    lines = queue.Queue()
    first, second = serve(), serve()
    ports = [first.server_port, second.server_port]
    addresses = [f"127.0.0.1:{port}" for port in ports]
    with OutageWatch([*addresses, addresses[0]], 20, every_s=0.02, report=lines.put) as watch:
        assert watch.metrics() == {"tool/server_outages": 0.0}
        end(second)
        assert lines.get(timeout=10) == (
            f"tools.search.server_addr: http://{addresses[1]} does not answer (connection refused); the other one is asked "
            "instead; searches are tried again for up to 20 s each (tools.search.timeout_s)"
        )
        second = serve(ports[1])
        assert lines.get(timeout=10).startswith(f"tools.search.server_addr: http://{addresses[1]} answers again after")
        assert watch.metrics() == {"tool/server_outages": 1.0}
        assert watch.metrics() == {"tool/server_outages": 0.0}
    end(first)
    end(second)
    assert lines.empty(), "a server is watched once, and not after the block"


def test_without_servers_nothing_is_watched_or_counted():
    before = threading.active_count()
    with OutageWatch([], 20) as watch:
        assert threading.active_count() == before
        assert watch.metrics() == {}
