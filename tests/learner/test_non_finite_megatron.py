"""Megatron: one rank's gradient that is not finite costs every rank this one update, and nothing else.

Run as a script, this file is one of the ranks: `test_non_finite_megatron.py MODEL OUT`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import policy_ranks
from support.models import make_model
from support.trajectories import random_trajectories

JOBS = {
    "data parallel, fp32": {},
    "tensor parallel, fp16": {"tp": 2, "precision": "fp16"},
}


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_non_finite_gradient_on_one_rank_skips_the_update_on_all(tmp_path):
    model = make_model("qwen2", True, tmp_path / "model")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(
        [*launcher, str(model), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=180
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    for name in JOBS:
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}-{rank}.pt")
            assert (found["skipped"], found["updates"]) == (1.0, 0.0), (name, rank)
            assert found["unchanged"], (name, rank)
            assert (found["next_skipped"], found["next_updates"]) == (0.0, 1.0), (name, rank)
            assert found["next_finite"], (name, rank)
            assert found["next_changed"], (name, rank)


def rank_main(model: str, out: Path) -> None:
    from megatron.core import parallel_state

    from searchr1.device import Device
    from searchr1.learner.policy import Policy

    torch.set_num_threads(1)
    for name, job in JOBS.items():
        policy = Policy.start(policy_ranks.make_config(model, job), Device.detect("cpu"), policy_ranks.STEPS)
        rank = torch.distributed.get_rank()
        trajectories, advantages = random_trajectories(0)
        share = slice(policy.dp_rank, None, policy.backend.layout.data_parallel)
        part, wanted = trajectories[share], advantages[share]
        wild = [1e38 if policy.dp_rank == 0 else 0.0] * len(part)
        before = weights(policy)
        metrics = policy.train_step(part, wild, [0] * len(part))
        after = weights(policy)
        again = policy.train_step(part, wanted, [0] * len(part))
        last = weights(policy)
        found = {
            "skipped": metrics["actor/skipped_updates"],
            "updates": metrics["actor/updates"],
            "unchanged": all(torch.equal(before[key], after[key]) for key in before),
            "next_skipped": again["actor/skipped_updates"],
            "next_updates": again["actor/updates"],
            "next_finite": all(bool(tensor.isfinite().all()) for tensor in last.values()),
            "next_changed": any(not torch.equal(after[key], last[key]) for key in last),
        }
        torch.save(found, out / f"{name}-{rank}.pt")
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def weights(policy) -> dict[str, torch.Tensor]:
    """This rank's own parts."""
    return {str(index): item.parameter.detach().clone() for index, item in enumerate(policy.backend.parameters)}


if __name__ == "__main__":
    rank_main(sys.argv[1], Path(sys.argv[2]))
