"""`searchr1 report RUN_DIR …`: one HTML page of a summary, curves and trajectories; it loads nothing from outside."""

from __future__ import annotations

import argparse
import html
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from searchr1.errors import UserError
from searchr1.report.overview import RunView, ends_of, names_of, overview_of
from searchr1.report.page_parts import packed_json, page_parts
from searchr1.report.run_files import (
    COLUMNS,
    LoggedFile,
    Row,
    brief,
    evenly_by_group,
    logged_files,
    parse_row,
    read_lines,
    read_rows,
    shares,
)
from searchr1.tracking.legs import settings_changes
from searchr1.tracking.loggers import METRICS_FILE, read_metrics

TRAJECTORIES = 10_000
"""Trajectories in the page."""
CHUNK = 50
"""Trajectories that the page unpacks together, as in source.js."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(value: object) -> str:
    """Any text as HTML that shows it and does nothing else.

    Control characters, halves of surrogate pairs and characters that turn the direction of text become U+FFFD.
    """
    return html.escape(_CONTROL.sub("\ufffd", str(value)), quote=True)


def page(runs: Sequence[Path], trajectories: int = TRAJECTORIES) -> Iterator[str]:
    """The page about one run, or about several that are compared, piece by piece.

    Args:
        runs: their folders.
        trajectories: at most so many are in the page.

    Raises:
        UserError: a folder holds no run, or a file in it is damaged.
    """
    runs = [run for folder in runs for run in runs_in(folder)]
    views = [_view(run, name) for run, name in zip(runs, names_of(runs), strict=True)]
    overview = overview_of(views, _body_of)
    files = [(number, file) for number, view in enumerate(views) for file in view.files]
    index, chunks, shown = _pack(files, trajectories)
    total, packed = sum(rows for _, rows in shown), sum(rows for rows, _ in shown)
    if packed < total:
        overview["leftOut"] = (
            f"{packed:,} of {total:,} logged trajectories are in this page, evenly spread over all steps; the same "
            "questions of every evaluation. searchr1 report --trajectories N takes more, searchr1 watch shows all."
        )
    overview["files"] = [
        {"key": f"{run}-{file.mode}-{file.step}", "run": run, "mode": file.mode, "step": file.step, "rows": rows}
        for (run, file), (rows, _) in zip(files, shown, strict=True)
    ]
    names = (f"chunk-{number}" for number in range(len(chunks)))
    return page_parts(escape(overview["title"]), overview, index, zip(names, chunks, strict=True))


def runs_in(folder: Path) -> list[Path]:
    """The folder itself if it holds a run, else the folders in it that do: an evaluation's methods, a demo's training.

    Raises:
        UserError: there is none.
    """
    if _holds_run(folder):
        return [folder]
    try:
        found = sorted(inner for inner in folder.iterdir() if inner.is_dir() and _holds_run(inner))
    except OSError:
        found = []
    if not found:
        raise UserError(f"{folder}: no run there ({METRICS_FILE} is missing); give a run's folder")
    return found


def _holds_run(folder: Path) -> bool:
    return (folder / METRICS_FILE).is_file() or bool(logged_files(folder))


def _view(run: Path, name: str) -> RunView:
    path, files = run / METRICS_FILE, logged_files(run)
    metrics = read_metrics(path) if path.is_file() else []
    if not metrics and not files:
        raise UserError(f"{path}: no metrics yet; wait for the first step or evaluation")
    first, last = ([brief(row) for row in read_rows(file.path)] if file else [] for file in ends_of(files))
    return RunView(name, metrics, files, first, last, settings_changes(run))


def _body_of(_run: int, file: LoggedFile, question: str) -> Row | None:
    return next((row for row in read_rows(file.path) if row.get("id") == question), None)


def _pack(files: Sequence[tuple[int, LoggedFile]], most: int) -> tuple[str, list[str], list[tuple[int, int]]]:
    """The index, the chunks of bodies, and (rows in the page, rows) of each file.

    Evaluations may take half of the room, and what training steps leave; training steps all that is left.
    """
    totals = [len(read_lines(file.path)) for _, file in files]
    evals = [total if file.mode == "eval" else 0 for total, (_, file) in zip(totals, files, strict=True)]
    trains = [total - part for total, part in zip(totals, evals, strict=True)]
    for_evals = shares(evals, max(most // 2, most - sum(trains)))
    given = [a + b for a, b in zip(for_evals, shares(trains, most - sum(for_evals)), strict=True)]
    index: list[list[Any]] = []
    chunks: list[str] = []
    waiting: list[Row] = []
    shown = []
    for number, ((_, file), total, room) in enumerate(zip(files, totals, given, strict=True)):
        rows = _rows_of(file.path, room)
        shown.append((len(rows), total))
        for row in rows:
            index.append([number, *brief(row)])
            waiting.append(
                {"turns": row["turns"]} | {key: row[key] for key in ("reward_parts", "policy_tokens") if key in row}
            )
            if len(waiting) == CHUNK:
                chunks.append(packed_json(waiting))
                waiting = []
    if waiting:
        chunks.append(packed_json(waiting))
    return packed_json({"columns": COLUMNS, "rows": index}), chunks, shown


def _rows_of(path: Path, room: int) -> list[Row]:
    rows = [parse_row(path, number, line) for number, line in read_lines(path)]
    return evenly_by_group(rows, room, lambda row: row.get("id"))


def main(argv: list[str]) -> int:
    """Entry point of the sub-command."""
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
    parts = page(args.run_dirs, args.trajectories)
    partial = output.with_name(output.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(parts)
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"--output {output}: not writable ({error.strerror})") from error
    print(f"report -> {output}")
    return 0
