"""A small demo world with a retrieval server, and training runs as a user starts them: in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from training_runs import NO_EVAL, kill_listener, wait_for_step

from searchr1.runner.demo import COLD_START, TRAIN_CONFIG, retrieval_server

SMALL = ("data.data_size=64", "algorithm.group_size=4", "data.rollout_batch_size=8", "runner.seq_length=512")


@dataclass
class DemoFolder:
    """A world on disk and what the YAML needs to know about it."""

    path: Path

    def train(self, address: str, *overrides: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Run `searchr1 train` to its end."""
        process = self.start(address, *overrides)
        output, _ = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    def start(self, address: str, *overrides: str) -> subprocess.Popen[str]:
        """Start `searchr1 train`."""
        env = os.environ | {
            "SEARCHR1_DEMO_DIR": str(self.path),
            "SEARCHR1_SEARCH_ADDR": address,
            "SEARCHR1_COLD_START": str(COLD_START),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "searchr1.cli", "train", str(TRAIN_CONFIG), *SMALL, *overrides],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoFolder:
    from searchr1.data.demo_world.files import write_world

    path = tmp_path_factory.mktemp("demo")
    write_world(5, path / "world")
    return DemoFolder(path)


@pytest.fixture
def address(demo: DemoFolder) -> Iterator[str]:
    with retrieval_server(demo.path / "world", demo.path / "retrieval.log") as found:
        yield found


@pytest.fixture(scope="session")
def restarted(demo: DemoFolder) -> Path:
    """The folder of a run of four steps, each saved, whose server was killed and came back after the first one."""
    with retrieval_server(demo.path / "world", demo.path / "retrieval-restarted.log") as address:
        port = int(address.rpartition(":")[2])
        words = ("runner.experiment_name=restarts", "runner.max_steps=4", "runner.save_interval=1", *NO_EVAL)
        process = demo.start(address, *words, "runner.keep_checkpoints=null")
        try:
            wait_for_step(demo.path / "restarts/metrics.jsonl", 1, process)
            kill_listener(port)
            time.sleep(1)
            server = ["retrieval-server", "--retriever_name", "bm25", "--corpus_path", str(demo.path / "world/corpus.jsonl")]
            again = subprocess.Popen([sys.executable, "-m", "searchr1.cli", *server, "--port", str(port)])
            try:
                output, _ = process.communicate(timeout=240)
            finally:
                again.terminate()
                again.wait(20)
        finally:
            process.kill()
    assert process.returncode == 0, output[-3000:]
    return demo.path / "restarts"
