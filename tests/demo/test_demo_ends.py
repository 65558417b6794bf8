"""`searchr1 demo` as the parent of its commands: signals are forwarded, a dead server is named, a kill leaves no process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from searchr1.cluster.processes import identify, is_running
from searchr1.demo import processes
from searchr1.errors import UserError
from searchr1.shutdown import Stopped, stops_cleanly

# A command that records the signal that stops it.
COMMAND = (
    "import signal, sys, time\n"
    "def stop(signum, frame):\n"
    "    open(sys.argv[1], 'w').write(signal.Signals(signum).name)\n"
    "    sys.exit(128 + signum)\n"
    "for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):\n"
    "    signal.signal(kind, stop)\n"
    "open(sys.argv[1], 'w').write('ready')\n"
    "time.sleep(60)\n"
)


@pytest.fixture
def program(monkeypatch):
    # Started with nohup or in the background, the tests ignore signals, and so would what they start.
    before = {
        kind: signal.signal(kind, signal.default_int_handler) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    monkeypatch.setattr(processes, "PROGRAM", (sys.executable, "-c", COMMAND))
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.05)
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


class ActsOnceReady:
    """A server that calls `act` as soon as the command is ready."""

    def __init__(self, file, act):
        self.file, self.act = file, act

    def require_running(self):
        if self.file.exists() and self.file.read_text() == "ready":
            self.act()


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_forwarded_and_the_command_awaited(kind, tmp_path):
    file = tmp_path / "signal"
    with pytest.raises(Stopped) as stopped, stops_cleanly():
        processes.run_command(file, server=ActsOnceReady(file, lambda: signal.raise_signal(kind)))
    assert stopped.value.exit_code == 128 + kind
    assert file.read_text() == kind.name


@pytest.mark.usefixtures("program")
def test_a_dead_server_stops_the_command_and_is_named(tmp_path):
    log, file = tmp_path / "server.log", tmp_path / "signal"
    log.write_text("no more memory\n")
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    server = processes.Server("127.0.0.1:1", process, log)
    server.require_running()

    def end():
        process.kill()
        process.wait()
        server.require_running()

    with pytest.raises(UserError, match=rf"process {process.pid}\) was ended by SIGKILL(.|\n)*no more memory"):
        processes.run_command(file, server=ActsOnceReady(file, end))
    assert file.read_text() == "SIGTERM"


def test_a_killed_demo_leaves_no_process(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "from searchr1.cluster.processes import guarded\n"
        "with guarded([]):\n"
        "    child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
        "    print(child.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    child = identify(int(process.stdout.readline()))
    process.kill()
    process.wait()
    deadline = time.monotonic() + 15
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.stdout.close()
