"""Signals that ask for a stop, sent to a process that is like a command of ours."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from searchr1 import cli
from searchr1.errors import WorkerDied
from searchr1.shutdown import Stopped, is_stopping, stops_cleanly

COMMAND = """
import signal, subprocess, sys, time, types
from searchr1 import cli
from searchr1 import shutdown

how = sys.argv[1]

def main(argv):
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
    with shutdown.ended_at_once(child.kill):
        try:
            print(child.pid, flush=True)
            time.sleep(60)
        finally:
            if how == "hangs":
                print("putting away", flush=True)
                time.sleep(60)
            child.kill()
            print("put away", flush=True)
    return 0

shutdown.STOP_WITHIN_SECONDS = float(sys.argv[2])
shutdown.SECOND_AFTER_SECONDS = 0.2
sys.modules["fake"] = types.SimpleNamespace(main=main)
cli.COMMANDS["fake"] = ("fake", "")
sys.exit(cli.main(["fake"]))
"""
STOPS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


def start(how="stops", stop_within=60, ignored=()):
    def dispositions():
        # Whoever runs the tests in the background may have had SIGINT ignored, which children inherit.
        for kind, _ in STOPS:
            signal.signal(kind, signal.SIG_IGN if kind in ignored else signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, how, str(stop_within)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=dispositions,
    )


def gone(pid):
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        with open(f"/proc/{pid}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] == "Z":
                return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(("kind", "code"), STOPS)
def test_a_signal_stops_cleanly_with_its_exit_code(kind, code):
    process = start()
    process.stdout.readline()
    process.send_signal(kind)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output) == (code, "put away\n")
    assert errors == f"searchr1 fake: stopped by {kind.name}\n"


def test_a_second_signal_ends_at_once_with_what_was_started():
    process = start("hangs")
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "putting away\n"
    process.send_signal(signal.SIGTERM)  # the same one: a terminal and a parent both send it
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=10)
    assert (process.returncode, output) == (130, "")
    assert gone(child)


def test_a_stop_that_takes_too_long_ends_at_once():
    process = start("hangs", stop_within=0.3)
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 143
    assert gone(child)


def test_nohup_is_kept():
    process = start(ignored=(signal.SIGHUP,))
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 143


def test_a_terminal_that_is_closed_stops_cleanly_although_nothing_can_be_written_there():
    pid, terminal = pty.fork()
    if not pid:
        for kind, _ in STOPS:
            signal.signal(kind, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, "-c", COMMAND, "stops", "60"])
    child = int(os.read(terminal, 100))
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert gone(child)


def test_handlers_are_put_back_and_a_stop_is_forgotten():
    before = [signal.getsignal(kind) for kind, _ in STOPS]
    with pytest.raises(Stopped) as found, stops_cleanly():
        signal.raise_signal(signal.SIGTERM)
    assert found.value.exit_code == 143
    assert not is_stopping()
    assert [signal.getsignal(kind) for kind, _ in STOPS] == before


def test_a_forked_child_ends_as_if_there_were_no_handler():
    with stops_cleanly():
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            os.write(writing, b"r")  # Python drops signals that come while it forks
            time.sleep(20)
            os._exit(0)
        os.read(reading, 1)
        os.kill(pid, signal.SIGTERM)
        assert os.waitpid(pid, 0)[1] == signal.SIGTERM


def test_a_death_is_one_message_and_exit_code_1(monkeypatch, capsys):
    def main(argv):
        error = WorkerDied("rank 0 of ActorGroup (process 17) was killed by SIGKILL", "its last lines (a.err):\n    oh")
        error.go_on = " after step 3; go on with runner.resume_dir=auto"
        raise error

    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    monkeypatch.setattr("searchr1.commands.report.main", main)
    monkeypatch.setattr(cli, "leave", leave)
    with pytest.raises(Left) as found:
        cli.main(["report"])
    assert found.value.args == (1,)
    assert capsys.readouterr().err == (
        "searchr1 report: rank 0 of ActorGroup (process 17) was killed by SIGKILL after step 3; go on with "
        "runner.resume_dir=auto\nits last lines (a.err):\n    oh\n"
    )
