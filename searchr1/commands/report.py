"""`searchr1 report RUN_DIR …`: write the page about a run, or one that compares several."""

from __future__ import annotations

import argparse
from pathlib import Path

from searchr1.errors import UserError
from searchr1.report.page import TRAJECTORIES, write_report


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="searchr1 report", description="Write a page about a run, or one that compares several."
    )
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="a run's folder, or one of several runs")
    parser.add_argument("--output", type=Path, help="the page (default: report.html in the first RUN_DIR)")
    parser.add_argument(
        "--trajectories",
        type=int,
        default=TRAJECTORIES,
        help=f"trajectories in the page, at most (default {TRAJECTORIES:,}); one takes 1 to 5 kB",
    )
    args = parser.parse_args(argv)
    if args.trajectories < 0:
        raise UserError(f"--trajectories {args.trajectories}: give 0 or more")
    output: Path = args.output or args.run_dirs[0] / "report.html"
    write_report(args.run_dirs, output, args.trajectories)
    print(f"report -> {output}")
    return 0
