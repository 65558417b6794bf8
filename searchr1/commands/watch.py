"""`searchr1 watch RUN_DIR`: the report's page, served while training goes on. It reads the run and never writes."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import ipaddress
import json
import re
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

from searchr1.commands.report import escape, runs_in
from searchr1.errors import UserError
from searchr1.report.follow import Stamp, WatchedRun
from searchr1.report.overview import names_of, overview_of
from searchr1.report.page_parts import page_parts, policy
from searchr1.report.run_files import COLUMNS, LoggedFile, Row

PORT = 8765
REQUEST_TIMEOUT_S = 30.0
MOST_BODIES = 500
"""Trajectories of one answer."""
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d+)?")
SMALL = 2_000
"""Bytes up to which an answer is not compressed."""


class Watched:
    """The runs behind the page. Safe for threads."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """`folders`: of runs, or of several runs each; they need not exist yet."""
        self._lock = threading.Lock()
        self._folders = list(folders)
        self._runs: list[WatchedRun] = []
        self._overview: dict[str, Any] = {}
        self._look()
        for run in self._runs:
            run.refresh()

    def _look(self) -> bool:
        """Look for the runs: an evaluation makes a folder per method when it starts. Returns whether they are others."""
        found = [run for folder in self._folders for run in _watched_in(folder)]
        if found == [run.folder for run in self._runs]:
            return False
        known = {run.folder: run for run in self._runs}
        self._runs = [known.get(folder) or WatchedRun(folder, "") for folder in found]
        for run, name in zip(self._runs, names_of(found), strict=True):
            run.name = name
        return True

    def overview(self) -> dict[str, Any]:
        """What the page shows at once; `version` changes with it."""
        with self._lock:
            changed = [self._look(), *(run.refresh() for run in self._runs)]
            problem = " ".join(run.problem for run in self._runs if run.problem)
            if any(changed) or not self._overview or self._overview["problem"] != problem:
                self._overview = self._describe(problem)
            return self._overview

    def _describe(self, problem: str) -> dict[str, Any]:
        told = overview_of([run.view() for run in self._runs], self._body_of)
        told |= {"live": True, "problem": problem}
        told["files"] = [
            {"key": _key(number, file), "run": number, "mode": file.mode, "step": file.step} | _version(stamp)
            for number, run in enumerate(self._runs)
            for file, stamp in run.files.items()
        ]
        told["version"] = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
        return told

    def rows(self, key: str, start: int) -> dict[str, Any]:
        """The list of a file's trajectories from number `start` on."""
        with self._lock:
            run, file = self._find(key)
            return {"columns": COLUMNS, "rows": run.index(file).briefs[start:]}

    def bodies(self, key: str, start: int, count: int) -> list[Row]:
        """Whole trajectories of a file."""
        with self._lock:
            run, file = self._find(key)
            return run.index(file).bodies(start, count)

    def same(self, question: str) -> dict[str, Any]:
        """The files that hold a question with this id."""
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
            return None  # written again since it was listed; the next look finds it

    def _find(self, key: str) -> tuple[WatchedRun, LoggedFile]:
        for number, run in enumerate(self._runs):
            for file in run.files:
                if _key(number, file) == key:
                    return run, file
        raise UserError("this step is not there; the run may have been started again")


class Handler(BaseHTTPRequestHandler):
    """GET of the page and of four kinds of JSON. Anything else is refused."""

    server: WatchServer
    protocol_version = "HTTP/1.1"
    timeout = REQUEST_TIMEOUT_S
    server_version = "searchr1"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer one request."""
        if not self.server.allows(self.headers.get("host", "")):
            # Another site's name that was pointed at this machine must not read the run.
            return self._json({"problem": "unknown host name; start searchr1 watch with --allow-host NAME"}, 403)
        try:
            url = urllib.parse.urlsplit(self.path)
        except ValueError:  # an address that is none
            return self._json({"problem": "no such page"}, 404)
        query = dict(urllib.parse.parse_qsl(url.query))
        try:
            if url.path == "/":
                overview = self.server.watched.overview()
                page = "".join(page_parts(escape(overview["title"]), overview))
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
        self.send_header("content-security-policy", policy(connect=True) + "; frame-ancestors 'none'")
        self.send_header("x-content-type-options", "nosniff")
        self.send_header("referrer-policy", "no-referrer")
        self.send_header("cross-origin-resource-policy", "same-origin")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the page asks every two seconds."""


class WatchServer(ThreadingHTTPServer):
    """The server, and whom it answers."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], watched: Watched, names: Sequence[str]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, Handler)
        self.watched = watched
        self._names = {"localhost", address[0].lower(), *(name.lower() for name in names)}

    def server_bind(self) -> None:
        """As a plain TCP server does: without asking the network for this machine's name, which can take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away in the middle of an answer is no error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def allows(self, host: str) -> bool:
        """Whether a Host header names this server: an IP address, localhost, or a name that was given."""
        found = _HOST.fullmatch(host.lower())
        if found is None:
            return False
        name = found[1]
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True


def _key(run: int, file: LoggedFile) -> str:
    return f"{run}-{file.mode}-{file.step}"


def _version(stamp: Stamp) -> dict[str, Any]:
    """`version` changes with the file; `file` too where it is another one, and stays where lines were added."""
    return {"version": "-".join(map(str, stamp)), "file": str(stamp[0]), "bytes": stamp[1]}


def _number(query: dict[str, str], name: str) -> int:
    text = query.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"{name} is no number")
    return int(text)


def _watched_in(folder: Path) -> list[Path]:
    """The runs that are there; else the folder itself, where one may begin."""
    try:
        return runs_in(folder)
    except UserError:
        return [folder]


def main(argv: list[str]) -> int:
    """Entry point of the sub-command."""
    parser = argparse.ArgumentParser(
        prog="searchr1 watch", description="Serve the page about a run, or several, while training goes on."
    )
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="a run's folder; it need not exist yet")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=PORT, help=f"default {PORT}; 0 takes a free one")
    parser.add_argument(
        "--allow-host",
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name by which browsers may reach the server",
    )
    args = parser.parse_args(argv)
    if not 0 <= args.port < 65536:
        raise UserError(f"--port {args.port}: give 0 to 65535")
    watched = Watched(args.run_dirs)
    try:
        server = WatchServer((args.host, args.port), watched, args.allow_host)
    except OSError as error:
        raise UserError(f"--host {args.host} --port {args.port}: cannot listen ({error.strerror})") from error
    with server:
        problem = watched.overview()["problem"]
        if problem:
            print(problem, flush=True)
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(
            f"watching {', '.join(map(str, args.run_dirs))} on http://{host}:{server.server_port}/ (Ctrl-C ends)", flush=True
        )
        server.serve_forever()
    return 0
