"""`searchr1 eval` as a user runs it: killed half way, its server taken away, and all methods in one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from searchr1.demo.demo import COLD_START, CPU_RECIPES
from searchr1.demo.processes import retrieval_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def start(folder: Path, address: str, *overrides: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "searchr1.cli", "eval", str(CPU_RECIPES.eval), f"rollout.model.model_path={COLD_START}"]
    env = os.environ | {"SEARCHR1_DEMO_DIR": str(folder), "SEARCHR1_SEARCH_ADDR": address}
    return subprocess.Popen(
        [*words, "runner.logger.logger_backends=[]", *overrides],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    return output


def wait_for_rows(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not (path.exists() and path.read_bytes().count(b"\n") >= count):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, "the evaluation is too slow"
        time.sleep(0.02)


def answers(path: Path) -> dict[tuple[int, int], object]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = {
        (row["number"], row["replica"]): (
            row["stop"],
            [(t["policy_text"], t["tool_text"]) for t in row["turns"]],
            row["reward"],
        )
        for row in rows
    }
    assert len(found) == len(rows), "something was asked twice"
    return found


def test_kill_9_costs_no_finished_question_and_changes_nothing(demo, address):
    common = ("data.data_size=200", "algorithm.group_size=2")
    finish(start(demo.path, address, *common, "runner.experiment_name=eval-whole"))
    killed = demo.path / "eval-killed"
    rows = killed / "search/trajectories/eval_step_0.jsonl"
    process = start(demo.path, address, *common, "runner.experiment_name=eval-killed")
    try:
        wait_for_rows(rows, 160, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = rows.read_bytes()
    before = before[: before.rindex(b"\n") + 1]
    finished = before.count(b"\n") // 2
    assert 80 <= finished < 200, "it was not killed half way"
    # As a kill in the middle of a write would leave it.
    rows.write_bytes(before + b'{"number": 199, "id": "one_')
    output = finish(start(demo.path, address, *common, "runner.experiment_name=eval-killed"))
    assert f"search: {finished} of 200 questions were finished before" in output
    assert rows.read_bytes().startswith(before)
    whole = demo.path / "eval-whole"
    assert answers(rows) == answers(whole / "search/trajectories/eval_step_0.jsonl")
    for name in ("eval.json", "results.json"):
        assert json.loads((killed / name).read_text()) == json.loads((whole / name).read_text())
    assert "pass@2" in (killed / "results.md").read_text()

    output = finish(start(demo.path, address, *common, "runner.experiment_name=eval-killed"))
    assert "every question was finished before" in output
    assert "starting evaluation groups" not in output
    process = start(demo.path, address, *common, "runner.experiment_name=eval-killed", "runner.seed=5")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "seed was 0, is 5" in output


def test_all_methods_in_one_run_and_a_server_that_dies_in_the_middle(demo, tmp_path):
    common = (
        "data.data_size=100",
        "evaluation.methods=[direct,cot,rag,search]",
        "data.max_prompt_length=400",
        "runner.seq_length=800",
        "runner.experiment_name=eval-methods",
        "tools.search.timeout_s=2",
        "tools.search.max_failure_rate=0.05",
    )
    folder = demo.path / "eval-methods"
    with retrieval_server(demo.path / "world", tmp_path / "retrieval.log") as server:
        process = start(demo.path, server.address, *common)
        wait_for_rows(folder / "search/trajectories/eval_step_0.jsonl", 20, process)
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 2, output[-3000:]
    message = output[output.rindex("searchr1 eval:") :]
    assert "tools.search.server_addr" in message
    assert "of 400 questions are finished and kept in" in message
    assert "Traceback" not in message
    with retrieval_server(demo.path / "world", tmp_path / "retrieval.log") as server:
        output = finish(start(demo.path, server.address, *common))
    found = json.loads((folder / "results.json").read_text())["methods"]
    assert list(found) == ["direct", "cot", "rag", "search"]
    assert all(one["all"]["questions"] == 100 for one in found.values())
    assert all(found[name]["all"]["facts"]["turns"] == 1 for name in ("direct", "cot", "rag"))
    assert found["search"]["all"]["facts"]["tool_failure_rate"] == 0
    assert found["search"]["all"]["scores"]["exact_match"]["mean"] > 0.2
    assert "search loop" in (folder / "results.html").read_text()
    assert json.loads((folder / "eval.json").read_text())["val/questions"] == 100
