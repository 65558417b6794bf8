"""Runs in processes of their own: waiting for their steps, taking their server away."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from searchr1.tracking.loggers import read_metrics

NO_EVAL = ("runner.val_check_interval=-1", "runner.val_before_train=False")


def wait_for_step(metrics: Path, step: int, process: subprocess.Popen[str], timeout: float = 200) -> None:
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
