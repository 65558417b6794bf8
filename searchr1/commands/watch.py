"""`searchr1 watch RUN_DIR …`: serve the report's page while training goes on."""

from __future__ import annotations

import argparse
from pathlib import Path

from searchr1.errors import UserError
from searchr1.report.watch import PORT, WatchedRuns, WatchServer


def main(argv: list[str]) -> int:
    """Run the command until it is interrupted; return its exit code."""
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
    watched = WatchedRuns(args.run_dirs)
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
