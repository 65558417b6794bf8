"""examples/rl_loop.py trains as `searchr1 train` does: the same rollouts, losses and gradients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.training_runs import NO_EVAL

from searchr1.tracking.loggers import read_metrics

ROOT = Path(__file__).parents[2]
WHOLE = ("data.data_size=-1", "algorithm.group_size=8", "data.rollout_batch_size=16", "runner.seq_length=640", *NO_EVAL)
STEPS = 2
LOOP = """
import asyncio, json, sys
from pathlib import Path
from rl_loop import train
rows = asyncio.run(train(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
print(json.dumps(rows))
"""


@pytest.mark.slow  # two trainings of two steps
@pytest.mark.timeout(900)
def test_two_steps_equal_those_of_a_run_with_worker_groups(demo, address):
    run = demo.train(address, "runner.experiment_name=groups", f"runner.max_steps={STEPS}", *WHOLE, timeout=400)
    assert run.returncode == 0, run.stdout[-3000:]
    expected = read_metrics(demo.path / "groups/metrics.jsonl")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
    words = [sys.executable, "-c", LOOP, str(demo.path), address, str(STEPS)]
    loop = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert loop.returncode == 0, loop.stderr[-3000:]
    rows = json.loads(loop.stdout.splitlines()[-1])
    assert len(rows) == len(expected) == STEPS
    for ours, theirs in zip(rows, expected, strict=True):
        assert ours["reward"] == theirs["reward/mean"]
        assert ours["searches"] == theirs["rollout/searches"]
        assert ours["loss"] == pytest.approx(theirs["actor/loss"], rel=1e-4, abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["actor/grad_norm"], rel=1e-3)
