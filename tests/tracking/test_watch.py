from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
from urllib.parse import quote

import pytest

from searchr1.commands.watch import main
from searchr1.errors import UserError
from searchr1.evaluation.summary import validation_metrics
from searchr1.report.watch import WatchedRuns, WatchServer
from searchr1.tracking.loggers import JsonlLogger
from searchr1.tracking.trajectory_log import eval_file, remove_later, train_file, write_trajectories


@pytest.fixture
def run(tmp_path, make_trajectory):
    folder = tmp_path / "run"
    folder.mkdir()
    remove_later(folder, 0)
    log = JsonlLogger(folder / "metrics.jsonl", 0)
    for step in (0, 4):
        rows = [make_trajectory(i, right=i < step) for i in range(6)]
        write_trajectories(eval_file(folder, step), rows)
        log.log(step, validation_metrics(rows))
    write_trajectories(train_file(folder, 1), [make_trajectory(0, rollout_id) for rollout_id in range(3)])
    return folder


@pytest.fixture
def server(run):
    with WatchServer(("127.0.0.1", 0), WatchedRuns([run]), ["watch.example"]) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def get_json(server, path):
    answer, body = ask(server, path)
    assert answer.status == 200, body
    return json.loads(body)


def test_the_page_and_its_policy(server):
    answer, body = ask(server, "/")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert b'<script type="application/json" id="overview">' in body
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_overview_is_sent_again_only_when_it_changed(server, run, make_trajectory):
    overview = get_json(server, "/api/overview")
    assert [file["key"] for file in overview["files"]] == ["0-eval-0", "0-eval-4", "0-train-1"]
    assert overview["summaries"][0]["example"]["attempts"][1]["key"].startswith("0/eval/4/0/one_hop/")
    answer, body = ask(server, "/api/overview", if_none_match=overview["version"])
    assert (answer.status, body) == (304, b"")
    write_trajectories(train_file(run, 2), [make_trajectory(9)])
    answer, body = ask(server, "/api/overview", if_none_match=overview["version"])
    assert answer.status == 200
    assert json.loads(body)["files"][-1]["key"] == "0-train-2"


def test_a_step_is_given_on_demand(server):
    index = get_json(server, "/api/rows?file=0-eval-4&from=0")
    assert [row[0] for row in index["rows"]] == [f"one_hop/{i}" for i in range(6)]
    assert index["columns"][0] == "id"
    assert len(get_json(server, "/api/rows?file=0-eval-4&from=4")["rows"]) == 2
    bodies = get_json(server, "/api/bodies?file=0-eval-4&from=2&count=2")
    assert [body["id"] for body in bodies] == ["one_hop/2", "one_hop/3"]
    assert bodies[0]["turns"][0]["queries"] == ["who"]
    assert get_json(server, f"/api/same?id={quote('one_hop/0')}")["files"] == ["0-eval-0", "0-eval-4", "0-train-1"]
    assert get_json(server, "/api/same?id=one_hop/5")["files"] == ["0-eval-0", "0-eval-4"]


@pytest.mark.parametrize(
    ("path", "status", "problem"),
    [
        ("/api/rows?file=0-eval-5&from=0", 409, "this step is not there"),
        ("/api/rows?file=../../secret&from=0", 409, "this step is not there"),
        ("/api/rows?file=0-eval-4", 409, "from is not a number"),
        ("/api/bodies?file=0-eval-4&from=-1&count=5", 409, "from is not a number"),
        ("/../../../etc/passwd", 404, "no such page"),
        ("/%2e%2e/%2e%2e/etc/passwd", 404, "no such page"),
        ("/..%2f..%2fetc%2fpasswd", 404, "no such page"),
        ("/%2e%2e%5c%2e%2e%5cetc%5cpasswd", 404, "no such page"),
        ("//etc/passwd", 404, "no such page"),
        ("file:///etc/passwd", 404, "no such page"),
        ("http://127.0.0.1/etc/passwd", 404, "no such page"),
        ("/etc/passwd%00.html", 404, "no such page"),
        ("/metrics.jsonl", 404, "no such page"),
        ("/trajectories/step_1.jsonl", 404, "no such page"),
        ("/configs/step_0.yaml", 404, "no such page"),
        ("/api/overview/../../secret", 404, "no such page"),
        ("/api/rows?file=0-train-1%00&from=0", 409, "this step is not there"),
        ("/api/rows?file=%2e%2e%2fsecret&from=0", 409, "this step is not there"),
        ("/api/rows?file=/etc/passwd&from=0", 409, "this step is not there"),
        ("/api", 404, "no such page"),
        ("//[/api/overview", 404, "no such page"),
    ],
)
def test_what_is_not_there_is_reported(server, path, status, problem):
    answer, body = ask(server, path)
    assert answer.status == status
    assert problem in json.loads(body)["problem"]


def test_a_step_that_is_a_link_to_another_file_shows_nothing_of_it(server, run, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("root:key-of-somebody:0:0\n", encoding="utf-8")
    train_file(run, 1).unlink()
    train_file(run, 1).symlink_to(secret)
    for path in ("/", "/api/overview", "/api/rows?file=0-train-1&from=0", "/api/bodies?file=0-train-1&from=0&count=9"):
        assert b"key-of-somebody" not in ask(server, path)[1]


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1.evil.example"])
def test_another_site_may_not_read_an_answer(server, origin):
    answer, _ = ask(server, "/api/overview", origin=origin)
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_a_damaged_step_is_reported_and_the_rest_is_shown(server, run):
    eval_file(run, 4).write_text("{torn\n")
    assert get_json(server, "/api/overview")["files"]
    answer, body = ask(server, "/api/rows?file=0-eval-4&from=0")
    assert answer.status == 409
    assert "eval_step_4.jsonl:1: not valid JSON" in json.loads(body)["problem"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:1234", 200),
        ("[::1]:80", 200),
        ("10.0.0.7", 200),
        ("watch.example:8765", 200),
        ("WATCH.example", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("evil.example@127.0.0.1", 403),
        ("", 403),
    ],
)
def test_only_names_of_this_machine_are_answered(server, host, status):
    answer, _ = ask(server, "/api/overview", host=host)
    assert answer.status == status


def test_nothing_but_reading(server):
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        answer, _ = ask(server, "/api/overview", method=method)
        assert answer.status == 501
    assert "access-control-allow-origin" not in ask(server, "/")[0].headers


def test_large_answers_are_compressed_for_those_who_can(server):
    answer, _ = ask(server, "/", accept_encoding="gzip")
    assert answer.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in ask(server, "/")[0].headers


def test_a_run_that_does_not_exist_yet(tmp_path, make_trajectory):
    watched = WatchedRuns([tmp_path / "later"])
    assert "There is no folder" in watched.overview()["problem"]
    (tmp_path / "later").mkdir()
    remove_later(tmp_path / "later", 0)
    write_trajectories(train_file(tmp_path / "later", 1), [make_trajectory()])
    overview = watched.overview()
    assert overview["problem"] == ""
    assert overview["files"][0]["key"] == "0-train-1"


def test_an_evaluation_that_begins_later_is_shown_below_its_folder(tmp_path, make_trajectory):
    folder = tmp_path / "compared"
    watched = WatchedRuns([folder])
    assert watched.overview()["files"] == []
    for method in ("direct", "search"):
        run_of_one = folder / method
        run_of_one.mkdir(parents=True)
        remove_later(run_of_one, 0)
        write_trajectories(eval_file(run_of_one, 0), [make_trajectory()])
    overview = watched.overview()
    assert overview["runs"] == ["direct", "search"]
    assert [file["key"] for file in overview["files"]] == ["0-eval-0", "1-eval-0"]
    assert overview["problem"] == ""


def test_mistakes_are_reported(tmp_path, server):
    with pytest.raises(UserError, match="--port 70000"):
        main([str(tmp_path), "--port", "70000"])
    with pytest.raises(UserError, match="cannot listen"):
        main([str(tmp_path), "--port", str(server.server_port)])


def test_the_command_prints_where_it_serves(run):
    words = [sys.executable, "-m", "searchr1.cli", "watch", str(run), "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"watching {run} on http://127.0.0.1:")
    finally:
        process.terminate()
        process.communicate()
