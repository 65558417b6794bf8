"""PPO as a user runs it: a run that is killed goes on as if it had not been, critic included."""

from __future__ import annotations

import signal

import pytest
from training_runs import NO_EVAL, wait_for_step

from searchr1.tracking.loggers import read_metrics

PPO = ("algorithm.adv_type=gae", "critic.use_critic_model=True", "critic.optim.lr=1e-3", "algorithm.n_minibatches=2")
BACKENDS = {
    "fsdp": ((), ()),
    # The policy stays on FSDP2; the critic is cut by tensors before the stop, and by layers after it.
    "megatron": (
        ("critic.training_backend=megatron", "critic.model.tensor_model_parallel_size=2"),
        ("critic.training_backend=megatron", "critic.model.pipeline_model_parallel_size=2"),
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_and_resumed_ppo_run_gives_the_metrics_of_an_uninterrupted_one(demo, address, backend):
    before, after = BACKENDS[backend]
    common = ("runner.max_steps=4", "runner.save_interval=2", *PPO, *NO_EVAL)
    whole = demo.train(address, f"runner.experiment_name=ppo-{backend}", *common, *before, timeout=400)
    assert whole.returncode == 0, whole.stdout[-3000:]
    name = f"runner.experiment_name=ppo-{backend}-killed"
    process = demo.start(address, name, *common, *before)
    metrics = demo.path / f"ppo-{backend}-killed/metrics.jsonl"
    try:
        wait_for_step(metrics, 3, process, timeout=400)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    resumed = demo.train(address, name, "runner.resume_dir=auto", *common, *after, timeout=400)
    assert resumed.returncode == 0, resumed.stdout[-3000:]
    expected = {row["step"]: row for row in read_metrics(demo.path / f"ppo-{backend}/metrics.jsonl")}
    found = {row["step"]: row for row in read_metrics(metrics)}
    assert sorted(found) == sorted(expected) == [1, 2, 3, 4]
    assert expected[4]["critic/value"] != 0
    for step in (3, 4):
        for key in ("reward/mean", "reward/exact_match", "rollout/searches", "rollout/response_length"):
            assert found[step][key] == expected[step][key], (step, key)
        for key in ("actor/loss", "actor/grad_norm", "critic/loss", "critic/value", "critic/grad_norm",
                    "critic/explained_variance"):  # fmt: skip
            assert found[step][key] == pytest.approx(expected[step][key], rel=1e-3, abs=1e-6), (step, key)
