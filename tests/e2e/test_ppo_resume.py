"""PPO as a user runs it: a run that is killed, or goes on in another layout, goes on as if it had not been stopped."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from support.training_runs import NO_EVAL, as_after, wait_for_step

from searchr1.tracking.loggers import read_metrics

PPO = (
    "algorithm.adv_type=gae", "critic.use_critic_model=True", "critic.optim.lr=1e-3", "algorithm.n_minibatches=2",
    "runner.max_steps=4", "runner.save_interval=2", "rollout.validate_weight_first_sync=True", *NO_EVAL,
)  # fmt: skip
EXACT = ("reward/mean", "reward/exact_match", "rollout/searches", "rollout/response_length")
NEAR = (
    "actor/loss", "actor/grad_norm", "actor/kl", "actor/entropy", "critic/loss", "critic/value", "critic/grad_norm",
    "critic/explained_variance",
)  # fmt: skip


def cut(group, way):
    return (f"{group}.training_backend=megatron", f"{group}.model.{way}_model_parallel_size=2")


def assert_same(run, whole):
    expected = {row["step"]: row for row in read_metrics(whole / "metrics.jsonl")}
    found = {row["step"]: row for row in read_metrics(run / "metrics.jsonl")}
    assert sorted(found) == sorted(expected) == [1, 2, 3, 4]
    assert expected[4]["critic/value"] != 0
    assert all(row["mismatch/logprob_gap_max"] < 1e-4 for rows in (expected, found) for row in rows.values())
    for step in (3, 4):
        for key in EXACT:
            assert found[step][key] == expected[step][key], (step, key)
        for key in NEAR:
            assert found[step][key] == pytest.approx(expected[step][key], rel=1e-3, abs=1e-6), (step, key)


def train(demo, address, name, *words):
    run = demo.train(address, f"runner.experiment_name={name}", *PPO, *words, timeout=400)
    assert run.returncode == 0, run.stdout[-3000:]
    return demo.path / name


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_killed_and_resumed_run_gives_the_metrics_of_an_uninterrupted_one(demo, address):
    """The policy is on FSDP2; the critic is cut by tensors before the kill, and by layers after it."""
    whole = train(demo, address, "ppo", *cut("critic", "tensor"))
    process = demo.start(address, "runner.experiment_name=ppo-killed", *PPO, *cut("critic", "tensor"))
    try:
        wait_for_step(demo.path / "ppo-killed/metrics.jsonl", 3, process, timeout=400)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert_same(train(demo, address, "ppo-killed", "runner.resume_dir=auto", *cut("critic", "pipeline")), whole)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_megatron_run_goes_on_in_another_layout_and_converts(demo, address):
    """The policy is cut by tensors, then by layers; the critic is on FSDP2."""
    whole = train(demo, address, "ppo-mg", *cut("actor", "tensor"))
    as_after(2, whole, demo.path / "ppo-mg-other")
    resumed = train(demo, address, "ppo-mg-other", "runner.resume_dir=auto", *cut("actor", "pipeline"))
    assert_same(resumed, whole)
    words = ["convert", "mg2hf", "--checkpoint", str(resumed / "checkpoints/global_step_4/actor")]
    converted = subprocess.run(
        [sys.executable, "-m", "searchr1.cli", *words, "--output", str(demo.path / "mg-model"), "--verify"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert converted.returncode == 0, converted.stderr[-3000:]
