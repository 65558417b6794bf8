"""A server of the report's page for runs that are still being written. It only reads the runs."""

from __future__ import annotations

import gzip
import hashlib
import json
import socket
import socketserver
import sys
import threading
import urllib.parse
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from searchr1.errors import UserError
from searchr1.http_guard import HostNames
from searchr1.report.follow import Stamp, WatchedRun
from searchr1.report.overview import names_of, overview_of
from searchr1.report.page import REPORT, render
from searchr1.report.run_files import COLUMNS, LoggedFile, Row, runs_in

PORT = 8765
REQUEST_TIMEOUT_S = 30.0
MOST_BODIES = 500
"""Trajectories in one answer."""
SMALL = 2_000
"""Bytes up to which an answer is sent uncompressed."""


class WatchedRuns:
    """The runs behind the page. Safe for threads."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Read what there is of the runs in `folders`: each a run, or several runs; they need not exist yet."""
        self._lock = threading.Lock()
        self._folders = list(folders)
        self._runs: list[WatchedRun] = []
        self._overview: dict[str, Any] = {}
        self._look()
        for run in self._runs:
            run.refresh()

    def _look(self) -> bool:
        """Look for the runs (an evaluation makes a folder per method when it starts); return whether they changed."""
        folders = [run for folder in self._folders for run in _watched_in(folder)]
        if folders == [run.folder for run in self._runs]:
            return False
        known = {run.folder: run for run in self._runs}
        self._runs = [known.get(folder) or WatchedRun(folder, "") for folder in folders]
        for run, name in zip(self._runs, names_of(folders), strict=True):
            run.name = name
        return True

    def overview(self) -> dict[str, Any]:
        """Return what the page shows at once; its `version` changes with it."""
        with self._lock:
            changed = [self._look(), *(run.refresh() for run in self._runs)]
            problem = " ".join(run.problem for run in self._runs if run.problem)
            if any(changed) or not self._overview or self._overview["problem"] != problem:
                self._overview = self._describe(problem)
            return self._overview

    def _describe(self, problem: str) -> dict[str, Any]:
        overview = overview_of([run.view() for run in self._runs], self._body_of)
        overview |= {"live": True, "problem": problem}
        overview["files"] = [
            {"key": _key(number, file), "run": number, "mode": file.mode, "step": file.step} | _version(stamp)
            for number, run in enumerate(self._runs)
            for file, stamp in run.files.items()
        ]
        overview["version"] = hashlib.sha256(json.dumps(overview).encode()).hexdigest()[:16]
        return overview

    def rows(self, key: str, start: int) -> dict[str, Any]:
        """Return the list of a file's trajectories from number `start` on."""
        with self._lock:
            run, file = self._find(key)
            return {"columns": COLUMNS, "rows": run.index(file).briefs[start:]}

    def bodies(self, key: str, start: int, count: int) -> list[Row]:
        """Return whole trajectories of a file."""
        with self._lock:
            run, file = self._find(key)
            return run.index(file).bodies(start, count)

    def same(self, question: str) -> dict[str, Any]:
        """Return the files that hold a question with this id."""
        with self._lock:
            files = [(number, run, file) for number, run in enumerate(self._runs) for file in run.files]
        return {"files": [_key(number, file) for number, run, file in files if run.holds(file, question)]}

    def _body_of(self, number: int, file: LoggedFile, question: str) -> Row | None:
        run = self._runs[number]
        try:
            index = run.index(file)
            places = [place for place, brief in enumerate(index.briefs) if brief[0] == question]
            return index.bodies(places[0], 1)[0] if places else None
        except UserError:
            return None  # replaced since it was listed; the next refresh reads it

    def _find(self, key: str) -> tuple[WatchedRun, LoggedFile]:
        for number, run in enumerate(self._runs):
            for file in run.files:
                if _key(number, file) == key:
                    return run, file
        raise UserError("this step is not there; the run may have been started again")


class Handler(BaseHTTPRequestHandler):
    """Answer GET of the page and of four kinds of JSON; reject anything else."""

    server: WatchServer
    protocol_version = "HTTP/1.1"
    timeout = REQUEST_TIMEOUT_S
    server_version = "searchr1"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer one request."""
        if not self.server.host_names.accept(self.headers.get("host", "")):
            return self._json({"problem": "unknown host name; start searchr1 watch with --allow-host NAME"}, 403)
        try:
            url = urllib.parse.urlsplit(self.path)
        except ValueError:  # an address that is none
            return self._json({"problem": "no such page"}, 404)
        query = dict(urllib.parse.parse_qsl(url.query))
        try:
            if url.path == "/":
                overview = self.server.watched.overview()
                page = "".join(render(overview))
                return self._send(page.encode(), "text/html; charset=utf-8")
            if url.path == "/api/overview":
                overview = self.server.watched.overview()
                return self._json(overview, 304 if self.headers.get("if-none-match") == overview["version"] else 200)
            if url.path == "/api/rows":
                return self._json(self.server.watched.rows(query.get("file", ""), _number(query, "from")))
            if url.path == "/api/bodies":
                start, count = _number(query, "from"), min(_number(query, "count"), MOST_BODIES)
                return self._json(self.server.watched.bodies(query.get("file", ""), start, count))
            if url.path == "/api/same":
                return self._json(self.server.watched.same(query.get("id", "")))
        except UserError as error:
            return self._json({"problem": str(error)}, 409)
        self._json({"problem": "no such page"}, 404)

    def _json(self, value: Any, status: int = 200) -> None:
        body = b"" if status == 304 else json.dumps(value).encode()
        self._send(body, "application/json", status)

    def _send(self, body: bytes, kind: str, status: int = 200) -> None:
        packed = len(body) > SMALL and "gzip" in self.headers.get("accept-encoding", "")
        if packed:
            body = gzip.compress(body, 3)
        self.send_response(HTTPStatus(status))
        if status != 304:
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
        if packed:
            self.send_header("content-encoding", "gzip")
        self.send_header("cache-control", "no-store")
        self.send_header("content-security-policy", REPORT.policy("frame-ancestors 'none'", connect=True))
        self.send_header("x-content-type-options", "nosniff")
        self.send_header("referrer-policy", "no-referrer")
        self.send_header("cross-origin-resource-policy", "same-origin")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the page sends a request every two seconds."""


class WatchServer(ThreadingHTTPServer):
    """The HTTP server and the host names that it answers to."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], watched: WatchedRuns, names: Sequence[str]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, Handler)
        self.watched = watched
        self.host_names = HostNames([address[0], *names])

    def server_bind(self) -> None:
        """Bind as a plain TCP server: a look-up of this machine's name in the network can take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report errors, but not that a browser went away in the middle of an answer."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def _key(run: int, file: LoggedFile) -> str:
    return f"{run}-{file.mode}-{file.step}"


def _version(stamp: Stamp) -> dict[str, Any]:
    """Return `version`, which changes with the file, `file`, which changes only when it is replaced, and `bytes`."""
    return {"version": "-".join(map(str, stamp)), "file": str(stamp[0]), "bytes": stamp[1]}


def _number(query: dict[str, str], name: str) -> int:
    text = query.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"{name} is not a number")
    return int(text)


def _watched_in(folder: Path) -> list[Path]:
    """Return the runs in a folder; without any, the folder itself, where a run may begin."""
    try:
        return runs_in(folder)
    except UserError:
        return [folder]
