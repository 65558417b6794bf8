"""Runs the server: in this process, or in several that share one port and are started again when they die."""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.connection
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import uvicorn

from searchr1.errors import UserError
from searchr1.http_guard import Guard
from searchr1.retrieval.server.app import Backend, ServerState, create_app

GRACE_S = 5
"""Requests in flight have so long to finish when the server stops."""
MAX_RESTARTS_A_MINUTE = 5

Load = Callable[[], Backend]
Ready = Callable[[dict[str, Any]], None]
"""Called with a description of what was loaded."""


def peak_memory_mib() -> float:
    """Return the most memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class LoadingServer(uvicorn.Server):
    """Takes connections at once, loads in a thread, and answers searches from then on."""

    def __init__(self, config: uvicorn.Config, state: ServerState, load: Load, ready: Ready) -> None:
        super().__init__(config)
        self._state, self._load, self._ready = state, load, ready
        self._backend: Backend | None = None
        self.problem: BaseException | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take connections and start to load."""
        await super().startup(sockets)
        # A daemon: Ctrl-C need not wait for the end of a long load.
        threading.Thread(target=self._load_all, args=(asyncio.get_running_loop(),), daemon=True).start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Reject new searches, finish those in flight."""
        self._state.backend = None
        await super().shutdown(sockets)
        if self._backend is not None:
            await self._backend.service.aclose()

    def _load_all(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            backend = self._load()
        except BaseException as error:
            self.problem = error
            self.should_exit = True
            return
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._loaded, backend)

    def _loaded(self, backend: Backend) -> None:
        self._backend = self._state.backend = backend
        self._ready(backend.about)


def serve_here(listener: socket.socket, load: Load, metrics: Any, topk: int, token: str | None, ready: Ready) -> None:
    """Serve in this process until a signal comes.

    Raises:
        UserError: what `load` raised.
    """
    state = ServerState(topk)
    server = LoadingServer(server_config(create_app(state, metrics, token)), state, load, ready)
    exit_on_sigterm()
    server.run(sockets=[listener])
    if server.problem is not None:
        raise server.problem


def serve_app(app: Guard, listener: socket.socket, started: Callable[[], None] | None) -> None:
    """Serve an application that is loaded already, until a signal comes."""

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if started is not None:
                started()

    exit_on_sigterm()
    Server(server_config(app)).run(sockets=[listener])


def server_config(app: Guard) -> uvicorn.Config:
    """Return the configuration of uvicorn."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE_S,
        server_header=False,
        proxy_headers=False,  # the client's address is not used
    )


def exit_on_sigterm() -> None:
    """Make SIGTERM, which uvicorn raises again after it has stopped, an ordinary exit, so that everything is cleaned up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


@dataclass(frozen=True, slots=True)
class Worker:
    """The work of one process of several: `run(listener, ready)` serves until a signal comes."""

    run: Callable[[socket.socket, Ready], None]

    def __call__(self, listener: socket.socket, messages: Connection) -> None:
        """Entry point of the process."""
        threading.Thread(target=_end_with_parent, daemon=True).start()
        try:
            self.run(listener, lambda about: messages.send(about | {"peak_mib": round(peak_memory_mib())}))
        except UserError as error:
            print(f"searchr1 retrieval-server: {error}", file=sys.stderr, flush=True)
            sys.exit(2)


def _end_with_parent() -> None:
    """Stop when the parent was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def serve_in_workers(listener: socket.socket, worker: Worker, count: int, ready: Ready) -> int:
    """Serve in `count` processes until a signal comes; returns the exit code.

    A worker that dies after it was ready is started again; one that cannot load ends the server.
    """
    shared = tempfile.mkdtemp(prefix="searchr1-metrics-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = shared
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    workers = WorkerProcesses(listener, worker)
    try:
        for _ in range(count):
            workers.start()
        return workers.watch(count, ready, stop)
    finally:
        workers.stop()
        for number, handler in before.items():
            signal.signal(number, handler)
        del os.environ["PROMETHEUS_MULTIPROC_DIR"]
        shutil.rmtree(shared, ignore_errors=True)


class WorkerProcesses:
    """The processes of a server."""

    def __init__(self, listener: socket.socket, worker: Worker) -> None:
        self._listener = listener
        self._worker = worker
        self._context = multiprocessing.get_context("spawn")
        self._members: dict[int, tuple[multiprocessing.process.BaseProcess, Connection]] = {}
        self._abouts: dict[int, dict[str, Any]] = {}
        self._deaths: list[float] = []

    def start(self) -> None:
        """Start one more process."""
        messages, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=self._worker, args=(self._listener, theirs))
        process.start()
        theirs.close()
        self._members[process.sentinel] = (process, messages)

    def watch(self, count: int, ready: Ready, stop: threading.Event) -> int:
        """Watch the processes until `stop`, or until one cannot go on; return the exit code."""
        announced = False
        while not stop.is_set():
            pipes = [messages for _, messages in self._members.values() if not messages.closed]
            for event in multiprocessing.connection.wait([*self._members, *pipes], timeout=0.5):
                if isinstance(event, Connection):
                    self._receive(event)
                elif isinstance(event, int) and not stop.is_set() and (code := self._restart(event)) is not None:
                    return code
            if not announced and len(self._abouts) == count:
                announced = True
                ready(next(iter(self._abouts.values())) | {"workers": count})
        return 0

    def stop(self) -> None:
        """End all processes: with SIGTERM, then with SIGKILL."""
        processes = [process for process, _ in self._members.values()]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + GRACE_S + 5
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0.1))
            if process.is_alive():
                process.kill()
                process.join()

    def _receive(self, messages: Connection) -> None:
        try:
            about = messages.recv()
        except (EOFError, OSError):
            messages.close()
            return
        self._abouts |= {sentinel: about for sentinel, (_, other) in self._members.items() if other is messages}

    def _restart(self, sentinel: int) -> int | None:
        """Start a dead worker again; or the exit code if there is no point in that."""
        process, messages = self._members.pop(sentinel)
        messages.close()
        process.join()
        mark_dead(process.pid)
        was_ready = self._abouts.pop(sentinel, None) is not None
        if not was_ready and len(self._deaths) == 0:
            return process.exitcode if process.exitcode and process.exitcode > 0 else 1
        self._deaths = [*(t for t in self._deaths if t > time.monotonic() - 60), time.monotonic()]
        if len(self._deaths) > MAX_RESTARTS_A_MINUTE:
            print("retrieval-server: workers die again and again; giving up", file=sys.stderr, flush=True)
            return 1
        print(f"retrieval-server: worker {process.pid} died ({process.exitcode}); starting it again", flush=True)
        self.start()
        return None


def mark_dead(pid: int | None) -> None:
    """Take a worker's gauges out of /metrics."""
    from prometheus_client.multiprocess import mark_process_dead

    if pid is not None:
        mark_process_dead(pid)
