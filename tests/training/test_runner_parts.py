"""The small parts of the training loop: run folders, mini-batches, failures of workers, the command line."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import numpy as np
import pytest

from searchr1.agent.trajectory import Sample, Trajectory
from searchr1.cli import COMMANDS, main
from searchr1.cluster.failure import Failure, WorkerError, reported, unwrap
from searchr1.config.schema import Config
from searchr1.errors import UserError
from searchr1.training.train import hash_seed, is_due, minibatch_ids


def config(tmp_path, **runner):
    made = Config()
    made.runner.output_dir = str(tmp_path)
    for name, value in runner.items():
        setattr(made.runner, name, value)
    return made


def make(index, rollout_id):
    return Trajectory(
        sample=Sample(f"s/{index}", index, [1], "", []),
        rollout_id=rollout_id,
        response_ids=np.ones(2, dtype=np.int32),
        loss_mask=np.ones(2, dtype=np.bool_),
        rollout_logprobs=np.zeros(2, dtype=np.float32),
        turns=[],
        stop="answer",
    )


@pytest.mark.parametrize("shuffle", [True, False])
def test_groups_are_never_split_over_minibatches(tmp_path, shuffle):
    made = config(tmp_path)
    made.algorithm.n_minibatches = 3
    made.algorithm.shuffle_rollout = shuffle
    trajectories = [make(index, rollout_id) for index in range(6) for rollout_id in range(4)]
    ids = minibatch_ids(trajectories, made, step=1)
    pairs = {(t.sample.index, number) for t, number in zip(trajectories, ids, strict=True)}
    assert len(pairs) == 6
    assert sorted(ids) == [0] * 8 + [1] * 8 + [2] * 8
    assert ids == minibatch_ids(trajectories, made, step=1)


def test_intervals():
    assert [step for step in range(1, 8) if is_due(step, 7, 3)] == [3, 6, 7]
    assert not any(is_due(step, 7, -1) for step in range(1, 8))
    assert len({hash_seed(seed, step) for seed in range(20) for step in range(200)}) == 4000


def test_failures_travel_as_values():
    class Worker:
        @reported
        async def works(self):
            return 3

        @reported
        async def fails(self):
            raise ValueError("broken")

        @reported
        async def refuses(self):
            raise UserError("give another path")

    worker = Worker()
    assert asyncio.run(worker.works()) == 3
    failure = asyncio.run(worker.fails())
    assert isinstance(failure, Failure)
    with pytest.raises(WorkerError, match=r"actor rank 1: ValueError: broken(.|\n)*in fails"):
        unwrap([1, failure], "actor")
    with pytest.raises(UserError, match=r"^give another path$"):
        unwrap([asyncio.run(worker.refuses())], "actor")


def test_every_command_has_help_and_a_main():
    import importlib

    for module, _ in COMMANDS.values():
        assert callable(importlib.import_module(module).main)


def test_unknown_command_and_missing_file(capsys):
    assert main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err
    assert main(["train", "/nowhere.yaml"]) == 2
    assert "/nowhere.yaml: no such file" in capsys.readouterr().err
    assert main([]) == 0


LIGHT = ["searchr1.config.load", "searchr1.rewards.registry", "searchr1.agent.loop", "searchr1.commands.retrieval_server"]


@pytest.mark.parametrize("module", [*LIGHT, "searchr1.data.dataset", "searchr1.report.page", "searchr1.evaluation.page"])
def test_light_parts_import_without_the_heavy_libraries(module):
    code = f"import sys, {module}; print([m for m in ('ray', 'vllm', 'megatron', 'rlinf') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert found.stdout.strip() == "[]"


def test_a_missing_library_is_reported_with_the_command_that_brings_it():
    code = "import sys; sys.modules['uvicorn'] = None; from searchr1.cli import main; sys.exit(main(['retrieval-server']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "needs uvicorn; run: pip install 'searchr1[retrieval]'" in result.stderr
    assert "Traceback" not in result.stderr
