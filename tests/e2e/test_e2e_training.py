"""The whole loop as a user runs it, with real processes: shortened, interrupted, and with its server taken away."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.training_runs import NO_EVAL, kill_listener, wait_for_step

from searchr1.report.run_files import read_rows
from searchr1.tracking.loggers import read_metrics

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # the whole pipeline: three starts of Ray and vLLM, about two minutes
@pytest.mark.timeout(900)
def test_demo_with_two_steps_ends_with_a_model_a_table_and_a_page(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "searchr1.cli", "demo", "--steps", "2", "--out", str(tmp_path / "demo"), "data.data_size=80"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert (tmp_path / "demo/model/model.safetensors").is_file()
    assert (tmp_path / "demo/eval/eval.json").is_file()
    page = (tmp_path / "demo/train/report.html").read_text()
    assert '"title":"Reward"' in page
    turns = [turn for row in read_rows(tmp_path / "demo/train/trajectories/eval_step_0.jsonl") for turn in row["turns"]]
    assert all(sum(turn["token_chars"]) == len(turn["policy_text"]) for turn in turns), "every sampled token is in the log"
    rows = read_metrics(tmp_path / "demo/train/metrics.jsonl")
    steps = [row for row in rows if "reward/mean" in row]
    assert [row["step"] for row in steps] == [1, 2]
    # fp32 on both sides: engine and actor agree on every sampled token.
    assert all(row["mismatch/logprob_gap_max"] < 1e-4 for row in steps)
    assert all(row["tool/failure_rate"] == 0 for row in steps)
    assert all(row["rollout/refills"] == 0 for row in steps)


DIES = ("runner.save_interval=1", "runner.max_steps=500", "tools.search.timeout_s=5")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_server_that_dies_mid_run_ends_it_with_a_clear_error(demo, address):
    process = demo.start(address, "runner.experiment_name=dies", *DIES, *NO_EVAL)
    folder = demo.path / "dies"
    try:
        wait_for_step(folder / "metrics.jsonl", 1, process)
        port = address.rpartition(":")[2]
        kill_listener(int(port))
        output, _ = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 2, output[-3000:]
    message = output[output.rindex("searchr1 train:") :]
    assert "tools.search.server_addr" in message
    assert "calls failed" in message
    assert "Traceback" not in message
    noticed = f"tools.search.server_addr: http://{address} does not answer (connection refused)"
    assert noticed in output[: output.index(message)], "the outage is said before the run gives up"
    assert (folder / "checkpoints/global_step_1/manifest.json").is_file()
