"""The processes of a run, read from /proc, and the guardian that ends what a killed driver leaves behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from searchr1.rollout.shared_memory import remove_abandoned

RUN_ID = "SEARCHR1_RUN_ID"
"""Environment variable of all processes of a run that has a Ray of its own."""
PROC = Path("/proc")
_YOUNG_SECONDS = 5.0
"""A process may still have its parent's environment: between fork and exec."""
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Process:
    """One process; the kernel gives its number to another one later, but not with the same start."""

    pid: int
    start: int
    """In clock ticks since the machine started."""


@dataclass(frozen=True, slots=True)
class Stat:
    """The content of /proc/PID/stat."""

    state: str
    """R, S, D, T (stopped), t (by a debugger), Z (ended, not waited for), X."""
    parent: int
    start: int
    exit_status: int | None = None
    """As `waitpid` gives it, of one that has ended."""

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.state in "ZXx"


def stat_of(pid: int) -> Stat | None:
    """Return the state of a process; None if there is none of this number."""
    try:
        text = (PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    fields = text[text.rindex(b")") + 2 :].split()  # the name before may hold anything
    state = fields[0].decode()
    return Stat(state, int(fields[1]), int(fields[19]), int(fields[49]) if state == "Z" else None)


def identify(pid: int) -> Process | None:
    """Return the process that has this number now; None if there is none."""
    stat = stat_of(pid)
    return Process(pid, stat.start) if stat is not None else None


def is_running(process: Process) -> bool:
    """Return whether a process is there and has not ended."""
    stat = stat_of(process.pid)
    return stat is not None and stat.start == process.start and not stat.ended


def title(pid: int) -> str:
    """Return a process's command line, as ps shows it; "" if it is gone."""
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def environment(pid: int) -> dict[str, str]:
    """Return the environment that a process was started with; {} if it is gone, another user's, or has written over it."""
    try:
        text = (PROC / str(pid) / "environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)


class Family:
    """All processes of a run, as they come and go: those that have its id in their environment, and their children."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._strangers: set[int] = set()
        self.members: dict[Process, Stat] = {}
        """Those that were there at the last look, ended ones included as long as nobody has waited for them."""

    def look(self) -> None:
        """Read /proc again."""
        pids = {int(entry) for entry in os.listdir(PROC) if entry.isdigit()}
        self._strangers &= pids
        seen: dict[Process, Stat] = {}
        by_pid: dict[int, Process] = {}
        known = {process.pid: process for process in self.members}
        uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
        # In the order of their numbers parents come before children, but where the numbers began anew.
        for pid in sorted(pids - self._strangers - {os.getpid()}):
            stat = stat_of(pid)
            if stat is None:
                continue
            process = Process(pid, stat.start)
            parent = by_pid.get(stat.parent) or known.get(stat.parent)
            if known.get(pid) == process or parent is not None or environment(pid).get(RUN_ID) == self._run_id:
                seen[process] = stat
                by_pid[pid] = process
            elif uptime - stat.start / _TICKS > _YOUNG_SECONDS:
                self._strangers.add(pid)
        self.members = seen

    def running(self) -> list[Process]:
        """Those that had not ended at the last look."""
        return [process for process, stat in self.members.items() if not stat.ended]


def end_all(family: Family, *, patience_s: float, grace_s: float) -> int:
    """End what is left of a run. Returns how many processes had to be ended.

    Args:
        family: of the run.
        patience_s: they may take to end by themselves.
        grace_s: between SIGTERM and SIGKILL.
    """
    _await_end(family, patience_s)
    asked: set[Process] = set()
    deadline = time.monotonic() + grace_s
    while running := family.running():
        kind = signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL
        _send(running if kind == signal.SIGKILL else (p for p in running if p not in asked), kind)
        asked |= set(running)
        if time.monotonic() > deadline + grace_s:  # in the kernel (a file system that hangs): it ends when that lets go
            break
        _await_end(family, 0.1)
    return len(asked)


def _await_end(family: Family, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    family.look()
    while family.running() and time.monotonic() < deadline:
        time.sleep(0.05)
        family.look()


def _send(processes: Iterable[Process], kind: signal.Signals) -> None:
    for process in processes:
        if is_running(process):
            with suppress(OSError):
                os.kill(process.pid, kind)
                os.kill(process.pid, signal.SIGCONT)  # a stopped one takes no SIGTERM


@contextmanager
def marked(run_id: str) -> Iterator[None]:
    """Give what is started in the block the run's id, and keep it out of reach of what a terminal sends.

    Ctrl-C and a closed terminal reach every process of a terminal's group; workers must live until the driver has
    stopped. The signals are blocked in this thread alone: another thread takes them, and this one handles them.
    """
    outer = os.environ.get(RUN_ID)
    os.environ[RUN_ID] = run_id
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        del os.environ[RUN_ID]
        if outer is not None:
            os.environ[RUN_ID] = outer


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
        code = f"import sys; sys.path.insert(0, {str(root)!r}); from searchr1.cluster.processes import main; main()"
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
