"""The guardian: a small process that ends what a run leaves behind when its driver is killed.

A killed driver ends nothing: Ray's servers end with it, most of their children follow within seconds, and some stay, as do
weights in shared memory. The guardian sees the end of a pipe that the driver holds open. Standard library only: it starts in
30 ms and is no burden for the length of a run.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from searchr1.cluster.processes import RUN_ID, Family, end_all
from searchr1.rollout.shared_memory import remove_abandoned

LOOK_SECONDS = 1.0
PATIENCE_SECONDS = 2.0
"""For Ray's own processes to end after the driver, as most do."""
GRACE_SECONDS = 4.0
_DISMISSED = b"q"


class Guardian:
    """The driver's handle of the guardian process."""

    def __init__(self, run_id: str, weight_folders: Sequence[Path]) -> None:
        """Start it.

        Args:
            run_id: of the processes that end.
            weight_folders: in which weights are published.
        """
        root = Path(__file__).resolve().parents[2]
        code = f"import sys; sys.path.insert(0, {str(root)!r}); from searchr1.cluster.guardian import main; main()"
        words = [sys.executable, "-I", "-S", "-c", code, run_id, str(os.getpid()), *map(os.path.abspath, weight_folders)]
        # What ends all processes of a terminal or of a job must leave this one: it ends with the driver.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
        try:
            self._process = subprocess.Popen(words, stdin=subprocess.PIPE, cwd="/", start_new_session=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def pid(self) -> int:
        """The guardian's process id."""
        return self._process.pid

    def dismiss(self) -> None:
        """End it: the driver has cleaned up itself."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(_DISMISSED)
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def guarded(weight_folders: Sequence[Path]) -> Iterator[None]:
    """End the commands and servers that are started in the block if this process is killed in it.

    Args:
        weight_folders: in which they publish weights.
    """
    run_id, outer = uuid.uuid4().hex, os.environ.get(RUN_ID)
    guardian = Guardian(run_id, weight_folders)
    os.environ[RUN_ID] = run_id
    try:
        yield
    finally:
        del os.environ[RUN_ID]
        if outer is not None:
            os.environ[RUN_ID] = outer
        guardian.dismiss()


def main() -> None:
    """Watch until the pipe ends, then clean up."""
    run_id, driver, *folders = sys.argv[1:]
    family = Family(run_id)
    while True:
        ready, _, _ = select.select([0], [], [], LOOK_SECONDS)
        if not ready:
            family.look()
        elif os.read(0, 1) == _DISMISSED:
            return
        else:
            break
    ended = end_all(family, patience_s=PATIENCE_SECONDS, grace_s=GRACE_SECONDS)
    for folder in folders:
        remove_abandoned(Path(folder))
    if ended:
        with suppress(OSError):
            print(f"searchr1: the run's driver (process {driver}) is gone; ended {ended} processes of it", file=sys.stderr)
