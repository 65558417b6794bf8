"""RLinf's YAMLs train: two steps of a tiny model, with only paths, sizes and the device changed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.rlinf_trees import tree

from searchr1.config.load import load_config
from searchr1.demo.demo import COLD_START
from searchr1.demo.files import write_world
from searchr1.demo.processes import retrieval_server
from searchr1.tracking.loggers import read_metrics

SIZES = (
    "cluster.device=cpu", "cluster.slots=1", "data.rollout_batch_size=4", "algorithm.group_size=2", "runner.seq_length=512",
    "runner.max_tokens_per_mbs=1024", "data.max_prompt_length=96", "runner.max_steps=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("rlinf") / "world"
    write_world(5, folder)
    with retrieval_server(folder, folder / "retrieval.log") as server:
        yield folder, server.address


@pytest.mark.slow  # an engine and a trainer start in processes of their own: about a minute each
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["fsdp2", "loss-scale"])
def test_two_steps(name, world, tmp_path):
    folder, address = world
    path = tmp_path / "tree.yaml"
    path.write_text(yaml.safe_dump(tree(name), sort_keys=False))
    words = [
        *SIZES,
        f"rollout.model.model_path={COLD_START}",
        f"data.train_data_paths=[{folder}/train.jsonl]",
        f"data.val_data_paths=[{folder}/train.jsonl]",  # the training questions: no evaluation
        f"tools.search.server_addr={address}",
        f"runner.output_dir={tmp_path}",
        "runner.experiment_name=run",
    ]
    command = [sys.executable, "-m", "searchr1.cli", "train", str(path), *words]
    run = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    assert "\nignored   rollout.sglang.attention_backend: " in run.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if "actor/loss" in row] == [1, 2]
    saved = load_config(tmp_path / "run/config.yaml")
    assert (saved.agentloop.max_turns, saved.agentloop.toolcall_parser, saved.notes) == (1, "searchr1-qwen", [])
