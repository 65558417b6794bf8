"""A run whose server is killed and comes back; and from its checkpoints one whose learning rate is a hundred times too high:
noticed, stopped, and put right as its message says."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.training_runs import NO_EVAL, as_after, kill_listener, wait_for_step

from searchr1.checkpoints.manifest import checkpoint_steps
from searchr1.demo.processes import retrieval_server
from searchr1.tracking.loggers import read_metrics

NORMAL = 1e-4
COMMON = (
    "runner.experiment_name=explodes", *NO_EVAL, "runner.save_interval=1", "runner.keep_checkpoints=null",
    "runner.health.patience=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def restarted(demo) -> Path:
    """The folder of a run of four steps, each saved, whose server was killed and came back after the first one."""
    with retrieval_server(demo.path / "world", demo.path / "retrieval-restarted.log") as server:
        port = int(server.address.rpartition(":")[2])
        words = ("runner.experiment_name=restarts", "runner.max_steps=4", "runner.save_interval=1", *NO_EVAL)
        process = demo.start(server.address, *words, "runner.keep_checkpoints=null")
        try:
            wait_for_step(demo.path / "restarts/metrics.jsonl", 1, process)
            kill_listener(port)
            time.sleep(1)
            words = ["retrieval-server", "--retriever_name", "bm25", "--corpus_path", str(demo.path / "world/corpus.jsonl")]
            again = subprocess.Popen([sys.executable, "-m", "searchr1.cli", *words, "--port", str(port)])
            try:
                output, _ = process.communicate(timeout=600)
            finally:
                again.terminate()
                again.wait(20)
        finally:
            process.kill()
    assert process.returncode == 0, output[-3000:]
    assert "unhealthy" not in output
    return demo.path / "restarts"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_killed_and_restarted_mid_run_costs_no_search(restarted):
    rows = [row for row in read_metrics(restarted / "metrics.jsonl") if "tool/failure_rate" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert sum(row["tool/retries"] for row in rows) > 0, "the server was not missed"
    assert all(row["tool/failure_rate"] == 0 for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_exploding_run_is_stopped_and_goes_on_from_the_checkpoint_it_names(demo, restarted, address):
    folder = demo.path / "explodes"
    as_after(2, restarted, folder)

    # The warm-up is over, so the third step's update is as wild as it gets.
    wild = ("runner.resume_dir=auto", f"actor.optim.lr={100 * NORMAL}", "runner.max_steps=30")
    exploded = demo.train(address, *wild, *COMMON, timeout=500)
    assert exploded.returncode == 2, exploded.stdout[-3000:]
    message = exploded.stdout[exploded.stdout.rindex("searchr1 train:") :]
    assert "Traceback" not in message
    found = re.search(r"steps (\d+) to (\d+) were unhealthy", message)
    assert found, message
    first, last = map(int, found.groups())
    assert (first, last) == (4, 6)
    warnings = re.findall(
        r"step (\d+) is unhealthy \((\d) in a row\): \S+ .* runner\.health\.\w+=\S+; helps: ", exploded.stdout
    )
    assert {(int(step), int(count)) for step, count in warnings} == {(4, 1), (5, 2), (6, 3)}
    assert "step 4 is unhealthy: its checkpoint is left out" in exploded.stdout
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "reward/mean" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6], "metrics were lost"
    assert rows[-1]["actor/lr"] == pytest.approx(100 * NORMAL)
    # Step 3's update made the weights that step 4 failed with.
    assert checkpoint_steps(folder / "checkpoints") == [1, 2]
    assert (folder / "checkpoints/suspect_step_3").is_dir()

    [line] = [line for line in message.splitlines() if line.startswith("  runner.resume_dir=")]
    resume, rate = line.split()
    assert resume == f"runner.resume_dir={folder}/checkpoints/global_step_2"
    assert rate == f"actor.optim.lr={50 * NORMAL:g}"
    healed = demo.train(address, resume, f"actor.optim.lr={NORMAL}", "runner.max_steps=5", *COMMON)
    assert healed.returncode == 0, healed.stdout[-3000:]
    assert "unhealthy" not in healed.stdout
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "reward/mean" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["actor/lr"] == pytest.approx(NORMAL)
    assert rows[-1]["reward/mean"] > 0
    assert checkpoint_steps(folder / "checkpoints") == [1, 2, 3, 4, 5]
