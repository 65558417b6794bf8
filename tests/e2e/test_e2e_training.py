"""The whole loop as a user runs it, with real processes: shortened, interrupted, and with its server taken away."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from training_runs import NO_EVAL, kill_listener, wait_for_step

from searchr1.runner.demo import ROOT, retrieval_server
from searchr1.tracking.loggers import read_metrics
from searchr1.tracking.run_files import read_rows


@pytest.mark.timeout(400)
def test_demo_with_two_steps_ends_with_a_model_a_table_and_a_page(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "searchr1.cli", "demo", "--steps", "2", "--out", str(tmp_path / "demo"), "data.data_size=80"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=380,
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


@pytest.mark.timeout(400)
def test_server_that_dies_mid_run_ends_it_with_a_clear_error(demo, address):
    process = demo.start(address, "runner.experiment_name=dies", "runner.save_interval=1", "runner.max_steps=500", *NO_EVAL)
    folder = demo.path / "dies"
    try:
        wait_for_step(folder / "metrics.jsonl", 1, process)
        port = address.rpartition(":")[2]
        kill_listener(int(port))
        output, _ = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 2, output[-3000:]
    message = output[output.rindex("searchr1 train:") :]
    assert "tools.search.server_addr" in message
    assert "calls failed" in message
    assert "Traceback" not in message
    assert (folder / "checkpoints/global_step_1/sizes.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_server_killed_and_restarted_mid_run_costs_no_search(demo, tmp_path):
    with retrieval_server(demo.path / "world", tmp_path / "retrieval.log") as address:
        port = int(address.rpartition(":")[2])
        process = demo.start(address, "runner.experiment_name=restarts", "runner.max_steps=4", *NO_EVAL)
        metrics = demo.path / "restarts/metrics.jsonl"
        try:
            wait_for_step(metrics, 1, process)
            kill_listener(port)
            time.sleep(1)
            words = ["retrieval-server", "--retriever_name", "bm25", "--corpus_path", str(demo.path / "world/corpus.jsonl")]
            again = subprocess.Popen([sys.executable, "-m", "searchr1.cli", *words, "--port", str(port)])
            try:
                output, _ = process.communicate(timeout=240)
            finally:
                again.terminate()
                again.wait(20)
        finally:
            process.kill()
    assert process.returncode == 0, output[-3000:]
    rows = [row for row in read_metrics(metrics) if "tool/failure_rate" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert sum(row["tool/retries"] for row in rows) > 0, "the server was not missed"
    assert all(row["tool/failure_rate"] == 0 for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_and_resumed_run_gives_the_metrics_of_an_uninterrupted_one(demo, address):
    common = ("runner.max_steps=4", "runner.save_interval=2", *NO_EVAL)
    whole = demo.train(address, "runner.experiment_name=whole", *common)
    assert whole.returncode == 0, whole.stdout[-3000:]
    process = demo.start(address, "runner.experiment_name=killed", *common)
    try:
        wait_for_step(demo.path / "killed/metrics.jsonl", 3, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    resumed = demo.train(address, "runner.experiment_name=killed", "runner.resume_dir=auto", *common)
    assert resumed.returncode == 0, resumed.stdout[-3000:]
    expected = {row["step"]: row for row in read_metrics(demo.path / "whole/metrics.jsonl")}
    found = {row["step"]: row for row in read_metrics(demo.path / "killed/metrics.jsonl")}
    assert sorted(found) == sorted(expected) == [1, 2, 3, 4]
    for step in (3, 4):
        for name in ("reward/mean", "reward/exact_match", "rollout/searches", "rollout/response_length"):
            assert found[step][name] == expected[step][name], (step, name)
        for name in ("actor/loss", "actor/grad_norm", "actor/kl", "actor/entropy"):
            assert found[step][name] == pytest.approx(expected[step][name], rel=1e-3, abs=1e-6), (step, name)


MEGATRON = ("actor.training_backend=megatron", "rollout.validate_weight_first_sync=True", *NO_EVAL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_megatron_run_goes_on_in_another_layout_and_converts(demo, address):
    """Two steps tensor-parallel, two more pipeline-parallel, and the same metrics as four tensor-parallel ones."""
    tensor, pipeline = "actor.model.tensor_model_parallel_size=2", "actor.model.pipeline_model_parallel_size=2"
    common = (*MEGATRON, "runner.save_interval=2")
    whole = demo.train(address, "runner.experiment_name=mg-whole", "runner.max_steps=4", tensor, *common)
    assert whole.returncode == 0, whole.stdout[-3000:]
    first = demo.train(address, "runner.experiment_name=mg", "runner.max_steps=2", tensor, *common)
    assert first.returncode == 0, first.stdout[-3000:]
    second = ("runner.experiment_name=mg", "runner.max_steps=4", "runner.resume_dir=auto", pipeline, *common)
    resumed = demo.train(address, *second)
    assert resumed.returncode == 0, resumed.stdout[-3000:]
    expected = {row["step"]: row for row in read_metrics(demo.path / "mg-whole/metrics.jsonl")}
    found = {row["step"]: row for row in read_metrics(demo.path / "mg/metrics.jsonl")}
    assert sorted(found) == sorted(expected) == [1, 2, 3, 4]
    for step in found:
        assert found[step]["mismatch/logprob_gap_max"] < 1e-4
        for name in ("reward/mean", "rollout/searches", "rollout/response_length"):
            assert found[step][name] == expected[step][name], (step, name)
        for name in ("actor/loss", "actor/grad_norm", "actor/kl", "actor/entropy"):
            assert found[step][name] == pytest.approx(expected[step][name], rel=1e-3, abs=1e-6), (step, name)
    words = ["convert", "mg2hf", "--checkpoint", str(demo.path / "mg/checkpoints/global_step_4/actor")]
    converted = subprocess.run(
        [sys.executable, "-m", "searchr1.cli", *words, "--output", str(demo.path / "mg-model"), "--verify"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert converted.returncode == 0, converted.stderr[-3000:]
