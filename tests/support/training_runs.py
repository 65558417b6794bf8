"""Runs in processes of their own: waiting for their steps, taking their server away."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from searchr1.tracking.loggers import read_metrics

NO_EVAL = ("runner.val_check_interval=-1", "runner.val_before_train=False")


def wait_for_step(metrics: Path, step: int, process: subprocess.Popen[str], timeout: float = 400) -> None:
    deadline = time.monotonic() + timeout
    while not (metrics.exists() and any(row["step"] >= step for row in read_metrics(metrics))):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, "the run is too slow"
        time.sleep(0.1)


def kill_listener(port: int) -> None:
    import psutil

    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            os.kill(connection.pid, signal.SIGKILL)


def as_after(step: int, run: Path, folder: Path) -> None:
    """Copy a run that saved every step or this one, as it was after `step`."""
    shutil.copytree(run, folder)
    for checkpoint in (folder / "checkpoints").glob("global_step_*"):
        if int(checkpoint.name.rpartition("_")[2]) > step:
            shutil.rmtree(checkpoint)
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
