"""The processes of a run, the files in shared memory, and a retrieval server that can be taken away."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
TITLES = {
    "rollout": "ray::RolloutWorker",
    "actor": "ray::ActorWorker",
    "reward": "ray::RewardWorker",
    "inference": "ray::InferenceWorker",
    "channel": "ray::ChannelWorker",
    "manager": "ray::WorkerManager",
    "agent": "ray::RuntimeEnvAgent",
}
"""How Ray names its worker processes; a method's name may follow."""
PROGRAMS = {"raylet": "raylet", "gcs": "gcs_server"}
WATCH_EVERY_S = 0.3
SERVER_START_S = 90.0


class Family:
    """A process and every process that ever descended from it, also those whose parent is gone."""

    def __init__(self, root: int) -> None:
        self.root = root
        self._seen: dict[tuple[int, float], psutil.Process] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(WATCH_EVERY_S):
            self.look()

    def look(self) -> None:
        """Note who descends from a known process, or shares the root's session."""
        known = {self.root, *(process.pid for process in self.living())}
        for process in psutil.process_iter():
            try:
                ours = process.ppid() in known or process.pid == self.root or os.getsid(process.pid) == self.root
                if ours:
                    with self._lock:
                        self._seen.setdefault((process.pid, process.create_time()), process)
            except (psutil.Error, OSError):
                continue

    def living(self) -> list[psutil.Process]:
        """Those that still run; one that only waits to be collected does not."""
        with self._lock:
            seen = list(self._seen.values())
        return [process for process in seen if _runs(process)]

    def of(self, role: str) -> list[psutil.Process]:
        """The processes of a role."""
        if role == "driver":
            return [process for process in self.living() if process.pid == self.root]
        self.look()
        return [process for process in self.living() if _is(process, role)]

    def end(self) -> None:
        """Kill whatever is left."""
        self.look()
        for process in self.living():
            try:
                process.kill()
            except psutil.Error:
                continue

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        self._thread.join()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return False


def _is(process: psutil.Process, role: str) -> bool:
    return title(process).startswith(TITLES[role]) if role in TITLES else title(process) == PROGRAMS[role]


def title(process: psutil.Process) -> str:
    """What a process calls itself: Ray's workers by their class, others by their program."""
    try:
        first = process.cmdline()[0]
        return first if first.startswith("ray::") else process.name()
    except (psutil.Error, IndexError):
        return "?"


def shared_files() -> set[str]:
    """What lies in shared memory."""
    return {str(path) for path in SHARED_MEMORY.rglob("*")}


class Server:
    """`searchr1 retrieval-server` on a fixed port."""

    def __init__(self, world: Path, log: Path) -> None:
        noted = world / "port"  # the same in every part of a campaign: a run that goes on has its address in its settings
        if not noted.exists():
            with socket.socket() as found:
                found.bind(("127.0.0.1", 0))
                noted.write_text(str(found.getsockname()[1]), encoding="utf-8")
        self.port = int(noted.read_text(encoding="utf-8"))
        self.address = f"127.0.0.1:{self.port}"
        self._world, self._log = world, log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it can be searched."""
        from searchr1.retrieval.client.client import wait_until_healthy

        words = ["retrieval-server", "--retriever_name", "bm25", "--corpus_path", str(self._world / "corpus.jsonl")]
        words += ["--pages_path", str(self._world / "pages.jsonl"), "--port", str(self.port)]
        with self._log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "searchr1.cli", *words], stdout=log, stderr=log, start_new_session=True
            )
        wait_until_healthy(self.address, SERVER_START_S)

    def send(self, number: int) -> None:
        """Send a signal; one that ends it is waited for."""
        assert self._process is not None
        self._process.send_signal(number)
        if number not in (signal.SIGSTOP, signal.SIGCONT):
            self._process.wait(20)

    def stop(self) -> None:
        """End it."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def wait_until_gone(family: Family, seconds: float) -> list[psutil.Process]:
    """Wait until no process of a family is left. Returns those that are after all."""
    until = time.monotonic() + seconds
    while True:
        family.look()
        left = family.living()
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.1)
