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
"""Told what was loaded."""


def peak_memory_mib() -> float:
    """The most memory that this process has held."""
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
        """Refuse new searches, finish those in flight."""
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
    end_politely()
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

    end_politely()
    Server(server_config(app)).run(sockets=[listener])


def server_config(app: Guard) -> uvicorn.Config:
    """How uvicorn is run."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE_S,
        server_header=False,
        proxy_headers=False,  # the client's address is not used
    )


def end_politely() -> None:
    """uvicorn raises SIGTERM again after it has stopped: make that an ordinary end, so that everything is cleaned up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


@dataclass(frozen=True, slots=True)
class Worker:
    """What a process of several runs: `run(listener, ready)` serves until a signal comes."""

    run: Callable[[socket.socket, Ready], None]

    def __call__(self, listener: socket.socket, news: Connection) -> None:
        """Entry point of the process."""
        threading.Thread(target=_follow_parent, daemon=True).start()
        try:
            self.run(listener, lambda about: news.send(about | {"peak_mib": round(peak_memory_mib())}))
        except UserError as error:
            print(f"searchr1 retrieval-server: {error}", file=sys.stderr, flush=True)
            sys.exit(2)


def _follow_parent() -> None:
    """A worker whose parent was killed stops too."""
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
    crew = Crew(listener, worker)
    try:
        for _ in range(count):
            crew.start()
        return crew.watch(count, ready, stop)
    finally:
        crew.stop()
        for number, handler in before.items():
            signal.signal(number, handler)
        del os.environ["PROMETHEUS_MULTIPROC_DIR"]
        shutil.rmtree(shared, ignore_errors=True)


class Crew:
    """The processes of a server."""

    def __init__(self, listener: socket.socket, worker: Worker) -> None:
        self._listener = listener
        self._worker = worker
        self._context = multiprocessing.get_context("spawn")
        self._members: dict[int, tuple[multiprocessing.process.BaseProcess, Connection]] = {}
        self._abouts: dict[int, dict[str, Any]] = {}
        self._deaths: list[float] = []

    def start(self) -> None:
        """One more process."""
        news, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=self._worker, args=(self._listener, theirs))
        process.start()
        theirs.close()
        self._members[process.sentinel] = (process, news)

    def watch(self, count: int, ready: Ready, stop: threading.Event) -> int:
        """Until `stop`, or until a worker cannot go on; returns the exit code."""
        announced = False
        while not stop.is_set():
            pipes = [news for _, news in self._members.values() if not news.closed]
            for event in multiprocessing.connection.wait([*self._members, *pipes], timeout=0.5):
                if isinstance(event, Connection):
                    self._hear(event)
                elif isinstance(event, int) and not stop.is_set() and (code := self._bury(event)) is not None:
                    return code
            if not announced and len(self._abouts) == count:
                announced = True
                ready(next(iter(self._abouts.values())) | {"workers": count})
        return 0

    def stop(self) -> None:
        """End all processes: politely, then not."""
        processes = [process for process, _ in self._members.values()]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + GRACE_S + 5
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0.1))
            if process.is_alive():
                process.kill()
                process.join()

    def _hear(self, news: Connection) -> None:
        try:
            about = news.recv()
        except (EOFError, OSError):
            news.close()
            return
        self._abouts |= {sentinel: about for sentinel, (_, other) in self._members.items() if other is news}

    def _bury(self, sentinel: int) -> int | None:
        """Start a dead worker again; or the exit code if there is no point in that."""
        process, news = self._members.pop(sentinel)
        news.close()
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
