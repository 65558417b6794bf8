from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1.errors import UserError
from searchr1.report.follow import GrowingMetrics, Indexed, WatchedRun
from searchr1.report.run_files import logged_files
from searchr1.tracking.loggers import JsonlLogger
from searchr1.tracking.trajectory_log import eval_file, remove_later, train_file, write_trajectories


def steps(metrics):
    return [row["step"] for row in metrics.rows]


def test_only_what_is_new_is_read(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    log = JsonlLogger(path, 0)
    log.log(1, {"x": 1.0})
    metrics = GrowingMetrics(path)
    assert metrics.refresh()
    assert not metrics.refresh()
    first = metrics.rows[0]
    log.log(2, {"x": 2.0})
    assert metrics.refresh()
    assert steps(metrics) == [1, 2]
    assert metrics.rows[0] is first, "not read again"


@given(st.lists(st.integers(1, 60), max_size=8))
def test_a_file_that_arrives_in_any_pieces(tmp_path_factory, cuts):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    content = "".join(
        json.dumps({"step": step, "名": "ë" * step}, ensure_ascii=False) + "\n" for step in range(1, 6)
    ).encode()
    metrics = GrowingMetrics(path)
    for end in [*sorted(cuts), len(content)]:
        path.write_bytes(content[:end])
        metrics.refresh()
        assert len(metrics.rows) == content[:end].count(b"\n")
        assert not metrics.problem


def test_a_run_that_is_resumed_or_started_again_is_read_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = GrowingMetrics(path)
    assert not metrics.refresh()
    for step in (1, 2, 3):
        JsonlLogger(path, step).log(step, {"x": 1.0})
    metrics.refresh()
    assert steps(metrics) == [1, 2, 3]
    log = JsonlLogger(path, 1)  # goes on after step 1
    log.log(2, {"x": 5.0})
    metrics.refresh()
    assert [(row["step"], row["x"]) for row in metrics.rows] == [(1, 1.0), (2, 5.0)]
    # Written over in place, and longer than before: its beginning tells.
    path.write_text("".join(json.dumps({"step": step, "other": 1}) + "\n" for step in range(20)))
    metrics.refresh()
    assert steps(metrics) == list(range(20))
    path.unlink()
    assert metrics.refresh()
    assert metrics.rows == []


def test_a_damaged_line_is_named_and_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{torn\n[]\n\n{"step": 2, "x": NaN}\n{"st')
    metrics = GrowingMetrics(path)
    metrics.refresh()
    assert steps(metrics) == [1, 2]
    assert metrics.rows[1]["x"] is None
    assert metrics.problem == f"{path}:2: no row of metrics; passed over"


def test_a_growing_evaluation_is_read_on(tmp_path, make_trajectory):
    path = tmp_path / "eval_step_0.jsonl"
    write_trajectories(path, [make_trajectory(i) for i in range(3)])
    lines = path.read_bytes().splitlines(keepends=True)
    index = Indexed(path)
    path.write_bytes(lines[0] + lines[1][:50])
    index.refresh()
    assert len(index.briefs) == 1
    path.write_bytes(b"".join(lines))
    index.refresh()
    assert [brief[0] for brief in index.briefs] == ["one_hop/0", "one_hop/1", "one_hop/2"]
    assert [row["id"] for row in index.bodies(1, 5)] == ["one_hop/1", "one_hop/2"]
    write_trajectories(path, [make_trajectory(7)])
    index.refresh()
    assert [brief[0] for brief in index.briefs] == ["one_hop/7"]
    path.unlink()
    with pytest.raises(UserError, match="not readable"):
        index.refresh()


def test_a_run_comes_into_being_goes_on_and_goes(tmp_path, make_trajectory):
    folder = tmp_path / "run"
    run = WatchedRun(folder, "run")
    run.refresh()
    assert "There is no folder" in run.problem
    folder.mkdir()
    run.refresh()
    assert "holds no run yet" in run.problem
    remove_later(folder, 0)
    write_trajectories(eval_file(folder, 0), [make_trajectory(0)])
    assert run.refresh()
    assert not run.refresh()
    assert run.problem == ""
    view = run.view()
    assert [brief[0] for brief in view.last] == ["one_hop/0"]
    assert view.first == []
    write_trajectories(train_file(folder, 1), [make_trajectory(5)])
    assert run.refresh()
    assert [file.step for file in run.files] == [0, 1]
    shutil.rmtree(folder)
    assert run.refresh()
    assert run.view().files == []


@pytest.mark.parametrize("question", ["one_hop/3", 'a"b\\c', "谁/0", "\ud83d"])
def test_a_question_is_looked_up_by_its_whole_id(tmp_path, make_trajectory, question):
    remove_later(tmp_path, 0)
    named, other = make_trajectory(0), make_trajectory(1)
    named.sample.id, other.sample.id = question, question + "0"
    write_trajectories(train_file(tmp_path, 1), [named])
    write_trajectories(train_file(tmp_path, 2), [other])
    run = WatchedRun(tmp_path, "run")
    run.refresh()
    assert [run.holds(file, question) for file in logged_files(tmp_path)] == [True, False]
