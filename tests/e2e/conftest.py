"""A small demo world with a retrieval server, and training runs as a user starts them: in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from searchr1.demo.demo import COLD_START, CPU_RECIPES
from searchr1.demo.processes import retrieval_server

SMALL = (
    "data.data_size=64", "algorithm.group_size=4", "data.rollout_batch_size=8", "runner.seq_length=512",
    "runner.logger.logger_backends=[]",
)  # fmt: skip


@dataclass
class DemoFolder:
    """A world on disk and what the YAML needs to know about it."""

    path: Path

    def train(self, address: str, *overrides: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
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
            [sys.executable, "-m", "searchr1.cli", "train", str(CPU_RECIPES.train), *SMALL, *overrides],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoFolder:
    from searchr1.demo.files import write_world

    path = tmp_path_factory.mktemp("demo")
    write_world(5, path / "world")
    return DemoFolder(path)


@pytest.fixture
def address(demo: DemoFolder) -> Iterator[str]:
    with retrieval_server(demo.path / "world", demo.path / "retrieval.log") as server:
        yield server.address
