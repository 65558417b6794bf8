"""The processes of a run: which belong to it, how they end, and what ends them when nobody else does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid

import pytest

from searchr1.cluster.processes import RUN_ID, Family, Guardian, end_all, environment, identify, is_running, marked, stat_of
from searchr1.rollout import shared_memory as shared_folder

SLEEP = "import time; time.sleep(120)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(120)"
PARENT = (
    "import subprocess, sys, os, time\n"
    # Without the run's id, as a process that has written over its environment.
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(120)'], env={}, stdout=subprocess.DEVNULL)\n"
    "print(child.pid, flush=True)\n"
    "time.sleep(120)\n"
)


@pytest.fixture
def run_id():
    return uuid.uuid4().hex


@pytest.fixture
def start(run_id):
    """Start processes that are ended after the test."""
    started = []

    def start(code, belongs=True):
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | ({RUN_ID: run_id} if belongs else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def members(family):
    family.look()
    return {process.pid for process in family.running()}


def test_the_run_s_processes_are_those_with_its_id_and_their_children(start, run_id):
    family = Family(run_id)
    own, parent, stranger = start(SLEEP), start(PARENT), start(SLEEP, belongs=False)
    child = int(parent.stdout.readline())
    wait_until(lambda: members(family) == {own.pid, parent.pid, child})
    parent.kill()
    parent.wait()
    assert members(family) == {own.pid, child}, "an orphan stays a member"
    assert stat_of(child).parent != parent.pid
    assert stranger.poll() is None
    assert environment(own.pid)[RUN_ID] == run_id
    assert end_all(family, patience_s=0, grace_s=5) == 2
    assert not members(family)


def test_a_process_that_ended_keeps_its_number_until_its_parent_has_waited(start, run_id):
    family = Family(run_id)
    process = start(SLEEP)
    wait_until(lambda: process.pid in members(family))
    known = identify(process.pid)
    process.send_signal(signal.SIGKILL)
    wait_until(lambda: members(family) == set())
    assert family.members[known].exit_status == signal.SIGKILL
    assert not is_running(known)
    process.wait()
    family.look()
    assert family.members == {}
    assert stat_of(process.pid) is None


def test_a_number_that_another_process_has_now_is_not_the_same_process(start):
    process = identify(start(SLEEP).pid)
    assert is_running(process)
    assert not is_running(type(process)(process.pid, process.start - 1))


def test_everything_ends_stopped_and_deaf_processes_too(start, run_id):
    deaf, stopped, stranger = start(DEAF), start(SLEEP), start(SLEEP, belongs=False)
    assert deaf.stdout.readline() == "deaf\n"
    stopped.send_signal(signal.SIGSTOP)
    assert end_all(Family(run_id), patience_s=0.1, grace_s=0.5) == 2
    assert (deaf.wait(5), stopped.wait(5)) == (-signal.SIGKILL, -signal.SIGTERM)
    assert stranger.poll() is None


def test_what_ends_by_itself_is_not_ended(start, run_id):
    process = start("import time; time.sleep(0.3)")
    assert end_all(Family(run_id), patience_s=10, grace_s=0.5) == 0
    assert process.wait(5) == 0


def test_marked_processes_take_no_signals_of_a_terminal(run_id):
    with marked(run_id):
        process = subprocess.Popen([sys.executable, "-c", SLEEP])
    try:
        wait_until(lambda: environment(process.pid).get(RUN_ID) == run_id)
        for kind in (signal.SIGINT, signal.SIGHUP):
            process.send_signal(kind)
        time.sleep(0.2)
        assert process.poll() is None
        process.terminate()
        assert process.wait(5) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert RUN_ID not in os.environ
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_a_run_id_of_an_outer_process_comes_back(run_id, monkeypatch):
    monkeypatch.setenv(RUN_ID, "outer")
    with marked(run_id):
        assert os.environ[RUN_ID] == run_id
    assert os.environ[RUN_ID] == "outer"


DRIVER = (
    "import subprocess, sys, time\n"
    "from pathlib import Path\n"
    "from searchr1.rollout.shared_memory import SharedFolder\n"
    "from searchr1.cluster.processes import Guardian\n"
    "from searchr1.cluster.processes import marked\n"
    "run_id, folder = sys.argv[1:]\n"
    "guardian = Guardian(run_id, [Path(folder)])\n"
    "with marked(run_id):\n"
    "    worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(120)'], stdout=subprocess.DEVNULL)\n"
    "weights = SharedFolder(Path(folder), 1)\n"
    "(weights.path / 'bucket-0').write_bytes(bytes(100))\n"
    "print(worker.pid, guardian.pid, flush=True)\n"
    "time.sleep(120)\n"
)


def test_the_guardian_ends_what_a_killed_driver_leaves(run_id, tmp_path):
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, run_id, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        worker, guardian = (identify(int(pid)) for pid in driver.stdout.readline().split())
        assert list(tmp_path.iterdir())
        for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # as a scheduler that ends all processes of a job
            os.kill(guardian.pid, kind)
        driver.kill()
        driver.wait()
        wait_until(lambda: not is_running(worker) and not is_running(guardian), 15)
        assert list(tmp_path.iterdir()) == []
        assert f"(process {driver.pid}) is gone; ended 1 processes" in driver.stderr.read()
    finally:
        driver.kill()
        driver.communicate()


def test_a_dismissed_guardian_ends_nothing(start, run_id, tmp_path):
    process = start(SLEEP)
    guardian = Guardian(run_id, [tmp_path])
    known = identify(guardian.pid)
    guardian.dismiss()
    assert not is_running(known)
    assert process.poll() is None


def test_folders_of_weights_are_never_there_without_their_lock(tmp_path, monkeypatch):
    """A look from another process between making and locking must not take the folder for an abandoned one."""
    lock = shared_folder._lock

    def look_then_lock(folder):
        shared_folder.remove_abandoned(tmp_path)
        return lock(folder)

    monkeypatch.setattr(shared_folder, "_lock", look_then_lock)
    folder = shared_folder.SharedFolder(tmp_path, 3)
    assert folder.path.is_dir()
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_only_folders_of_this_user_are_removed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "bucket-0").write_text("of another program")
    root = tmp_path / "shm"
    root.mkdir()
    (root / f"{shared_folder.PREFIX}v1-planted").symlink_to(elsewhere)
    shared_folder.remove_abandoned(root)
    assert (elsewhere / "bucket-0").read_text() == "of another program"
