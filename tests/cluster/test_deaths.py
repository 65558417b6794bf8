"""Watching processes: who has died and how, last words, and processes that stand still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid

import pytest

from searchr1.cluster import lifetime as deaths
from searchr1.cluster.lifetime import Watcher, how_ended, tail
from searchr1.cluster.processes import RUN_ID, Family
from searchr1.errors import WorkerDied

RAYLET = (
    "import os, signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGCHLD, lambda *_: os.waitpid(-1, os.WNOHANG))\n"
    "worker = {'RAY_ACTOR': '1', 'GROUP_NAME': 'RolloutGroup', 'RANK': '1'}\n"
    "for words in (worker, worker | {'GROUP_NAME': 'searchr1', 'RANK': '0'}, {}):\n"
    "    child = subprocess.Popen([sys.argv[1], '-c', 'import time; time.sleep(120)'], env=os.environ | words,\n"
    "                             stdout=subprocess.DEVNULL)\n"
    "    print(child.pid, flush=True)\n"
    "while True:\n"
    "    time.sleep(1)\n"
)


class Run:
    """A raylet with two workers and a process that may end, watched."""

    def __init__(self, folder):
        run_id = uuid.uuid4().hex
        # Names are taken from the command line, as of Ray's own binaries.
        program = folder / "raylet"
        program.symlink_to(sys.executable)
        self.raylet = subprocess.Popen(
            [program, "-c", RAYLET, sys.executable],
            env=os.environ | {RUN_ID: run_id, "PYTHONHOME": sys.base_prefix},
            stdout=subprocess.PIPE,
            text=True,
        )
        self.rollout, self.channel, self.other = (int(self.raylet.stdout.readline()) for _ in range(3))
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.family = Family(run_id)
        self.woken = threading.Event()
        self.watcher = Watcher(self.family, lambda: self.logs, self.woken.set)

    def end(self):
        self.watcher.stop()
        for pid in (self.rollout, self.channel, self.other):
            if any(process.pid == pid for process in self.family.members):
                os.kill(pid, signal.SIGKILL)
        self.raylet.kill()
        self.raylet.communicate()


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(deaths, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(deaths, "STOPPED_AFTER_SECONDS", 0.2)
    run = Run(tmp_path)
    run.watcher.start()
    wait_until(lambda: len(run.watcher._names) == 3)
    yield run
    run.end()


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def test_a_worker_that_dies_is_named_with_its_last_words(run):
    (run.logs / f"worker-abc-01000000-{run.rollout}.err").write_text("\n".join(f"line {n}" for n in range(40)) + "\n\n")
    os.kill(run.rollout, signal.SIGKILL)
    assert run.woken.wait(5)
    death = run.watcher.death(0)
    assert isinstance(death, WorkerDied)
    first, where, *lines = str(death).splitlines()
    assert first.startswith(f"rank 1 of RolloutGroup (process {run.rollout}) ")
    assert where == f"its last lines ({run.logs}/worker-abc-01000000-{run.rollout}.err):"
    assert lines == [f"    line {n}" for n in range(25, 40)]


def test_the_channel_has_a_name_of_its_own(run):
    os.kill(run.channel, signal.SIGKILL)
    assert run.woken.wait(5)
    assert str(run.watcher.death(0)).startswith(f"the channel between the groups (process {run.channel}) ")
    assert "it has written no line into" in str(run.watcher.death(0))


def test_ray_s_servers_come_before_the_workers_that_end_with_them(run):
    for pid in (run.rollout, run.channel):
        os.kill(pid, signal.SIGSTOP)  # so that the raylet is seen to die first or at the same time
    worry = "[2026-11-27 21:48:15,167 W 17 17] (raylet) memory.cc:1: low"
    (run.logs / "raylet.out").write_text(f"{worry}\n[2026-11-27 21:48:15,167 I 17 17] (raylet) stats.cc:1: fine\n  mean 1\n")
    run.raylet.kill()
    for pid in (run.rollout, run.channel):
        os.kill(pid, signal.SIGKILL)
    assert run.woken.wait(5)
    first, _, *lines = str(run.watcher.death(0)).splitlines()
    assert first == f"Ray's raylet (process {run.raylet.pid}) was killed by SIGKILL"
    assert lines == [f"    {worry}"]
    assert run.watcher.ray_is_dead


def test_other_processes_may_end(run):
    os.kill(run.other, signal.SIGKILL)
    wait_until(lambda: all(process.pid != run.other for process in run.family.running()))
    assert not run.woken.wait(0.3)
    assert run.watcher.death(0) is None


def test_a_stopped_process_is_reported_and_goes_on(run, capsys):
    os.kill(run.rollout, signal.SIGSTOP)
    wait_until(lambda: run.watcher.times_stopped == 1)
    os.kill(run.rollout, signal.SIGCONT)
    wait_until(lambda: not run.watcher._stopped)
    stopped, continued = capsys.readouterr().err.splitlines()
    assert stopped.startswith(f"rank 1 of RolloutGroup (process {run.rollout}) has been stopped (SIGSTOP) for ")
    assert f"kill -CONT {run.rollout} " in stopped
    assert continued == f"rank 1 of RolloutGroup (process {run.rollout}) goes on"
    assert not run.woken.is_set()
    assert run.watcher.times_stopped == 1


def test_a_kill_for_want_of_memory_is_said(run, monkeypatch):
    monkeypatch.setattr(deaths, "oom_kills", lambda: 10**9)
    os.kill(run.rollout, signal.SIGKILL)
    assert run.woken.wait(5)
    assert "ran out of memory" in str(run.watcher.death(0)).splitlines()[0]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        ("import os; os.kill(os.getpid(), 40)", "was killed by signal 40"),
        ("raise SystemExit(3)", "has ended with exit code 3"),
        ("", "has ended with exit code 0"),
    ],
)
def test_how_a_process_ended(code, expected):
    pid = os.posix_spawn(sys.executable, [sys.executable, "-S", "-c", code], os.environ)
    assert how_ended(os.waitpid(pid, 0)[1]) == expected


def test_last_lines_are_readable_whatever_is_in_the_log(tmp_path):
    log = tmp_path / "worker.err"
    log.write_bytes(
        b":actor_name:Rank\n"
        + b"x" * 200_000
        + b"\n:job_id:01\n\x1b[31mred\x1b[0m\r\n\n\xff broken\nprogress 1\rprogress 2\n"
        + b"y" * 1000
    )
    found = tail(log)
    assert found == ["x" * 300, "red", "\ufffd broken", "progress 1", "progress 2", "y" * 300]
    assert tail(tmp_path / "missing") == []


def test_the_kernel_counts_its_kills():
    if not os.path.exists("/proc/vmstat"):
        pytest.skip("no /proc/vmstat")
    count = subprocess.run(
        ["awk", "/^oom_kill /{print $2}", "/proc/vmstat"], capture_output=True, text=True, check=True
    ).stdout
    assert deaths.oom_kills() >= int(count or 0)


RAY_SAYS = """The actor died unexpectedly before finishing this task.
\tclass_name: RolloutWorker
\tactor_id: b927795bf15234a7f41374a201000000
\tpid: 8506
\tname: RolloutGroup:1
\tnamespace: RLinf
\tip: 192.0.2.2
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly
exits with a connection error code 2. End of file."""


def test_what_only_ray_noticed_is_the_same_sentence(tmp_path):
    (tmp_path / "worker-1-2-8506.err").write_text("oh\n")
    first, _, last = str(deaths.death_by_ray(RAY_SAYS, tmp_path)).splitlines()
    assert first.startswith("rank 1 of RolloutGroup (process 8506 on 192.0.2.2) has died ")
    assert last == "    oh"
    channel = str(deaths.death_by_ray(RAY_SAYS.replace("RolloutGroup:1", "searchr1:0"), tmp_path))
    assert channel.startswith("the channel between the groups (process 8506 ")
    other = str(deaths.death_by_ray("The actor is temporarily\nunavailable.", tmp_path))
    assert other.startswith("a worker process has died ")
    assert other.endswith("; Ray reports: The actor is temporarily unavailable.")


RAY_KILLED = """1 worker(s) were killed due to the node running low on memory. Memory on the node was 2.25GB used
/ 23.54GB limit (0.095608)
Considered workers: [
Selected to kill: (Task: job ID=01000000, lease ID=0000, task name=RolloutWorker.__init__, required resources={}, pid=28477,
"""


def test_a_process_that_ray_has_killed_for_want_of_memory_is_known(run, tmp_path):
    """As Ray 2.60 writes it."""
    line = "Selected to kill: (Task: job ID=01, task name=x, required resources={}, pid=17, actual memory used=0.05GB)\n"
    (run.logs / "raylet.out").write_text("[2026-11-27 W 1 1] low\n" + line)
    assert deaths.was_chosen_by_ray(run.logs, 17)
    assert not deaths.was_chosen_by_ray(run.logs, 1)
    assert not deaths.was_chosen_by_ray(tmp_path / "missing", 17)
    with (run.logs / "raylet.out").open("a") as file:
        file.write(line.replace("17", str(run.rollout)))
    os.kill(run.rollout, signal.SIGKILL)
    assert run.woken.wait(5)
    assert f"(process {run.rollout}) was killed by Ray, which does so when the memory " in str(run.watcher.death(0))
    assert str(deaths.death_by_ray(RAY_KILLED, tmp_path)).startswith("a worker process was killed by Ray, which does so ")


@pytest.mark.parametrize(
    ("words", "parent", "expected"),
    [
        ("/opt/ray/raylet --port 1", None, "Ray's raylet"),
        ("/opt/ray/raylet --port 1", "Ray's raylet", ""),  # a worker between fork and exec
        ("/opt/ray/gcs_server --port 1", None, "Ray's GCS"),
        ("ray::WorkerManager", "Ray's raylet", "RLinf's WorkerManager"),
        ("ray::WorkerManager.register", "Ray's raylet", "RLinf's WorkerManager"),
        ("ray::IDLE", "Ray's raylet", ""),
        ("VLLM::Worker_TP1", "rank 0 of RolloutGroup", "vLLM's Worker_TP1 of rank 0 of RolloutGroup"),
        ("VLLM::Worker_TP1", "vLLM's Worker_TP1 of rank 0 of RolloutGroup", ""),  # a compiler, between fork and exec
        ("ray::ActorWorker", "rank 0 of ActorGroup", ""),  # a saver that it forked
    ],
)
def test_names(words, parent, expected, monkeypatch):
    monkeypatch.setattr(deaths, "title", lambda pid: words)
    monkeypatch.setattr(deaths, "environment", lambda pid: {})
    assert deaths.name_of(17, parent) == expected
