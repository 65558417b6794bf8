"""`searchr1 watch RUN_DIR …`: serve the report's page while training goes on."""

from __future__ import annotations

import argparse
from pathlib import Path

from searchr1.commands.flags import add_address_flags, add_host_names_flag
from searchr1.errors import UserError
from searchr1.report.watch import PORT, WatchedRuns, WatchServer


def main(argv: list[str]) -> int:
    """Run the command until it is interrupted; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="searchr1 watch", description="Serve the page about a run, or several, while training goes on."
    )
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="a run's folder; it need not exist yet")
    add_address_flags(parser, PORT)
    add_host_names_flag(parser)
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
