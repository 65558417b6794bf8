"""From a run's first process to its last: what is started, who watches it, and how a death ends the run."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from searchr1.cluster import ray_start, rlinf_compat
from searchr1.cluster.channels import CHANNEL
from searchr1.cluster.failure import WorkerError
from searchr1.cluster.processes import PROC, Family, Guardian, Process, Stat, end_all, environment, marked, title
from searchr1.cluster.rlinf_compat import LOG_MARKS, MANAGERS, SERVER_WARNING, WORKER_GROUP, WORKER_MARK, WORKER_RANK
from searchr1.errors import WorkerDied
from searchr1.rollout.shared_memory import PREFIX, remove_abandoned
from searchr1.shutdown import ended_at_once, is_stopping

LOOK_SECONDS = 0.5
STOPPED_AFTER_SECONDS = 5.0
REPEAT_SECONDS = 60.0
NOTICE_SECONDS = 3.0
"""After Ray reports that an actor has gone, until its process must have been seen to be gone."""
LAST_LINES = 15
_LINE_LENGTH = 300
_TAIL_BYTES = 64 << 10
_SERVERS = {"gcs_server": "Ray's GCS", "raylet": "Ray's raylet"}
_CHOSEN = "was killed by Ray, which does so when the memory of a machine or container is nearly used up"
_CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[^\x20-\x7e\x80-\uffff\U00010000-\U0010ffff\t]")


class Watcher:
    """A thread that looks at the run's processes twice a second."""

    def __init__(self, family: Family, logs: Callable[[], Path], wake: Callable[[], None]) -> None:
        """Args:
        family: of the run; only this thread uses it until `stop` returns.
        logs: Ray's folder of logs.
        wake: called in the thread when a process has died, once.
        """
        self._family = family
        self._logs = logs
        self._wake = wake
        self._end = threading.Event()
        self._noticed = threading.Event()
        self._names: dict[Process, str] = {}
        self._stopped: dict[Process, tuple[float, float]] = {}
        self._out_of_memory = (oom_kills(), 0.0)
        self._death: WorkerDied | None = None
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)
        self.times_stopped = 0
        """How often a process was seen to stand still."""
        self.ray_is_dead = False
        """Whether what has died is one of Ray's servers, without which nothing of Ray answers."""

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End watching: from here on processes may go."""
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()

    def death(self, within_s: float) -> WorkerDied | None:
        """Return what has died; wait for it as long as `within_s`."""
        self._noticed.wait(within_s)
        return self._death

    def _run(self) -> None:
        while not self._end.wait(LOOK_SECONDS):
            self._family.look()
            self._look(time.monotonic())
            if self._death is not None:
                self._noticed.set()
                self._wake()
                return

    def _look(self, now: float) -> None:
        kills = oom_kills()
        if kills > self._out_of_memory[0]:
            self._out_of_memory = (kills, now)
        members = self._family.members
        known = {process.pid: self._names.get(process, "") for process in members}
        for process, stat in members.items():
            if process not in self._names and not stat.ended:
                name = name_of(process.pid, known.get(stat.parent))
                if name:
                    self._names[process] = name
        gone = [process for process in self._names if process not in members or members[process].ended]
        if gone:
            # Workers end with Ray's servers, so these come first.
            first = min(gone, key=lambda process: self._names[process] not in _SERVERS.values())
            self.ray_is_dead = self._names[first] in _SERVERS.values()
            self._death = self._describe(first, members.get(first), now)
            return
        for process in self._names:
            self._report_stopped(process, members[process], now)

    def _describe(self, process: Process, stat: Stat | None, now: float) -> WorkerDied:
        name, logs = self._names[process], self._logs()
        how = how_ended(stat.exit_status if stat is not None else None)
        if was_chosen_by_ray(logs, process.pid):
            how = _CHOSEN
        elif self._out_of_memory[1] and now - self._out_of_memory[1] < 10:
            how = "was killed by the kernel: the machine or its container ran out of memory"
        return WorkerDied(f"{name} (process {process.pid}) {how}", last_words(logs, name, process.pid))

    def _report_stopped(self, process: Process, stat: Stat, now: float) -> None:
        if stat.state != "T":
            if process in self._stopped and self._stopped.pop(process)[1]:
                print(f"{self._names[process]} (process {process.pid}) goes on", file=sys.stderr, flush=True)
            return
        since, reported = self._stopped.setdefault(process, (now, 0.0))
        if now - since < STOPPED_AFTER_SECONDS or (reported and now - reported < REPEAT_SECONDS):
            return
        self.times_stopped += not reported
        self._stopped[process] = (since, now)
        print(
            f"{self._names[process]} (process {process.pid}) has been stopped (SIGSTOP) for {now - since:.0f} s, and the "
            f"run waits for it until runner.step_timeout_s; let it go on: kill -CONT {process.pid} "
            f"(stops noticed in this run: {self.times_stopped})",
            file=sys.stderr,
            flush=True,
        )


def death_by_ray(message: str, logs: Path) -> WorkerDied:
    """Put into our own sentence what Ray reports about an actor that has gone.

    Args:
        message: of Ray's exception.
        logs: Ray's folder of logs on this machine.
    """
    how = _CHOSEN if "running low on memory" in message else how_ended(None)
    name, pid, address = (re.search(rf"^\s*{key}: (\S+)$", message, re.MULTILINE) for key in ("name", "pid", "ip"))
    if name is None or pid is None or address is None:
        return WorkerDied(f"a worker process {how}; Ray reports: {' '.join(message.split())[:_LINE_LENGTH]}")
    group, _, rank = name[1].rpartition(":")
    called = _called(group, rank)
    return WorkerDied(f"{called} (process {pid[1]} on {address[1]}) {how}", last_words(logs, called, int(pid[1])))


def name_of(pid: int, parent: str | None) -> str:
    """Return what a user calls a process without which the run cannot go on; "" for others.

    Args:
        pid: of the process.
        parent: what its parent is called; None if that is not of the run. A process that was just forked looks like its
            parent, so what looks like a server and is below one is none.
    """
    words = title(pid)
    if parent is None:
        return _SERVERS.get(os.path.basename(words.split(" ", 1)[0]), "")
    if parent != _SERVERS["raylet"]:
        # Of an engine on several GPUs; a process without a name of its own may be below it for a moment.
        engine = parent.startswith("rank ") and words.startswith("VLLM::")
        return f"vLLM's {words.removeprefix('VLLM::')} of {parent}" if engine else ""
    if name := _worker(pid):
        return name
    kind = words.removeprefix("ray::").split(".")[0]
    return f"RLinf's {kind}" if kind in MANAGERS else ""


def _worker(pid: int) -> str:
    variables = environment(pid)
    if WORKER_MARK not in variables:
        return ""
    return _called(variables.get(WORKER_GROUP, "?"), variables.get(WORKER_RANK, "?"))


def _called(group: str, rank: str) -> str:
    return "the channel between the groups" if group == CHANNEL else f"rank {rank} of {group}"


def how_ended(status: int | None) -> str:
    """Return a process's end in words.

    Args:
        status: as `waitpid` gives it; None if only its parent can ask.
    """
    if status is None:
        return "has died (killed from outside, out of memory, or crashed)"
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"has ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def last_words(logs: Path, name: str, pid: int) -> str:
    """Return the last lines that a process has written, under a line that names their file."""
    server = next((server for server, text in _SERVERS.items() if text == name), "")
    stem = server or f"worker-*-{pid}"
    for path in (*logs.glob(f"{stem}.err"), *logs.glob(f"{stem}.out")):
        lines = tail(path, SERVER_WARNING if server else None)
        if lines:
            return "\n".join([f"its last lines ({path}):", *(f"    {line}" for line in lines)])
    return f"it has written no {'warning' if server else 'line'} into {logs}"


def was_chosen_by_ray(logs: Path, pid: int) -> bool:
    """Return whether Ray's memory monitor has killed a process, according to its raylet's log."""
    chosen = re.compile(rf"^Selected to kill:.*\bpid={pid}\b")
    return any(chosen.search(line) for line in _last_part(logs / "raylet.out").splitlines())


def tail(path: Path, only: re.Pattern[str] | None = None) -> list[str]:
    """Return the last lines of a log that are not empty (and match `only`), cut to a readable length."""
    lines = [_CONTROL.sub("", line).rstrip()[:_LINE_LENGTH] for line in re.split(r"[\r\n]", _last_part(path))]
    wanted = [line for line in lines if line and not line.startswith(LOG_MARKS) and (only is None or only.match(line))]
    return wanted[-LAST_LINES:]


def _last_part(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def oom_kills() -> int:
    """Return how often the kernel has killed a process of this machine for want of memory."""
    try:
        count = re.search(r"^oom_kill (\d+)$", (PROC / "vmstat").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return 0
    return int(count[1]) if count else 0


RAY_SECONDS = 15.0
SILENT_RAY_SECONDS = 1.0
"""Ray may take to shut down. If its GCS is dead or stopped it would wait 7 s and more for an answer."""
FOREIGN_RAY_SECONDS = 5.0
WAITS_SECONDS = 2.0
"""Threads that wait for calls may take to leave Ray."""
PATIENCE_SECONDS, GRACE_SECONDS = 1.0, 4.0


class Lifetime:
    """The processes of one run, and their end. Use `lifetime`."""

    def __init__(self, owns_ray: bool, weight_folders: Sequence[Path]) -> None:
        self._run_id = uuid.uuid4().hex
        self._owns_ray = owns_ray
        self._weight_folders = weight_folders
        self._guardian = Guardian(self._run_id, weight_folders) if owns_ray else None
        self._failures: list[BaseException] = []
        self._waits: rlinf_compat.Waits | None = None
        self._family = Family(self._run_id)
        self._watcher = Watcher(self._family, rlinf_compat.logs_folder, lambda: os.kill(os.getpid(), signal.SIGUSR1))

    @contextmanager
    def starting_ray(self) -> Iterator[None]:
        """Make what is started in the block a part of the run, and wake this process when a part of it dies."""
        self._waits = rlinf_compat.report_failures(self._failures)
        with (
            rlinf_compat.own_failure_handler(self._died),
            rlinf_compat.own_sigterm_handler(self._ray_is_up),
            marked(self._run_id) if self._owns_ray else nullcontext(),
        ):
            yield

    def _ray_is_up(self) -> None:
        if self._owns_ray:
            self._watcher.start()

    def end(self) -> None:
        """End all processes of the run, and remove what they left in shared memory."""
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if self._owns_ray:
            self._watcher.stop()
        if self._waits is not None:
            self._waits.end(WAITS_SECONDS)
        stopped = any(stat.state == "T" for stat in self._family.members.values())
        if self._watcher.ray_is_dead or stopped:
            end_all(self._family, patience_s=0.0, grace_s=1.0)  # the raylet would wait for its GCS
            ray_start.shut_down(SILENT_RAY_SECONDS)
        else:
            ray_start.shut_down(RAY_SECONDS)
        if self._owns_ray:
            end_all(self._family, patience_s=PATIENCE_SECONDS, grace_s=GRACE_SECONDS)
        self._remove_weights()
        if self._guardian is not None:
            self._guardian.dismiss()

    def _remove_weights(self) -> None:
        # A Ray that is not ours ends our workers, and with them their locks, some time after we have left it.
        deadline = time.monotonic() + (0.0 if self._owns_ray else FOREIGN_RAY_SECONDS)
        while True:
            for folder in self._weight_folders:
                remove_abandoned(folder)
            if time.monotonic() >= deadline or not any(any(f.glob(f"{PREFIX}*")) for f in self._weight_folders):
                return
            time.sleep(0.2)

    def kill(self) -> None:
        """End all processes of the run at once, when there is no time to ask them. The guardian removes what they left."""
        if self._owns_ray:
            end_all(Family(self._run_id), patience_s=0.0, grace_s=0.0)

    def explain(self, error: BaseException | None) -> Exception | None:
        """Return the death behind an error, as one sentence; None if no process has died.

        Ray, and processes that were connected with the one that died, may notice before the watcher does.
        """
        from ray.exceptions import OutOfMemoryError, RayActorError, RayError

        death = self._watcher.death(NOTICE_SECONDS) if self._owns_ray else None
        if death is not None:
            return death
        if error is None or isinstance(error, (RayActorError, OutOfMemoryError)):
            return death_by_ray(str(error), rlinf_compat.logs_folder())
        return WorkerError(f"a call of a worker group failed: {error}") if isinstance(error, RayError) else None

    def _died(self, signum: int, frame: object) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        # Whoever ends all processes of a job ends this one too, and that is then the reason: `Stopped` is raised here.
        time.sleep(0.2)
        if is_stopping():
            return
        error = self.explain(self._failures[0] if self._failures else None)
        raise error if error is not None else WorkerError(f"a call of a worker group failed: {self._failures[0]!r}")


@contextmanager
def lifetime(num_nodes: int, weight_folders: Sequence[Path]) -> Iterator[Lifetime]:
    """Keep track of a run's processes in the block; all of them have ended after it.

    Args:
        num_nodes: of the cluster.
        weight_folders: in which weights are published.
    """
    from ray.exceptions import RayError

    run = Lifetime(ray_start.is_own(num_nodes), weight_folders)
    try:
        with ended_at_once(run.kill):
            yield run
    except (RayError, WorkerError) as error:
        death = run.explain(error)
        if death is None:
            raise
        raise death from None
    finally:
        run.end()
