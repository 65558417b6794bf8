"""report.html: one page of a summary, curves and trajectories about a run, or about several that are compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from searchr1.errors import UserError
from searchr1.files.atomic import write_text
from searchr1.report.overview import RunView, ends_of, names_of, overview_of
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
    runs_in,
    shares,
)
from searchr1.tracking.legs import settings_changes
from searchr1.tracking.loggers import METRICS_FILE, read_metrics
from searchr1.ui.page import Page, embedded_json, escape, packed_json

REPORT = Page(
    "report.html",
    ("base.css", "blocks.css", "report.css"),
    (
        "dom.js",
        "tip.js",
        "source.js",
        "charts.js",
        "overview.js",
        "search.js",
        "list.js",
        "blocks.js",
        "detail.js",
        "main.js",
    ),
)
TRAJECTORIES = 10_000
"""Trajectories in the page, unless another limit is given."""
CHUNK = 50
"""Trajectories that the page unpacks together, as in source.js."""


def render(overview: dict[str, Any], index: str = "", packed: Iterable[tuple[str, str]] = ()) -> Iterator[str]:
    """Yield the page, piece by piece. The script comes before what is only needed when a trajectory is opened.

    Args:
        overview: what the page shows at once, JSON without NaN.
        index: `packed_json` of what the list shows.
        packed: (id of a script element, its `packed_json`); the ids come from this program.
    """
    data = f'<script type="application/json" id="overview">{embedded_json(overview)}</script>\n'
    data += f'<script type="text/plain" id="index">{index}</script>\n'
    policy = REPORT.policy(connect=bool(overview.get("live")))
    before, after = REPORT.parts({"title": escape(overview["title"]), "policy": policy, "data": data})
    yield before
    for name, text in packed:
        yield f'<script type="text/plain" id="{name}">{text}</script>\n'
    yield after


def report_page(runs: Sequence[Path], trajectories: int = TRAJECTORIES) -> Iterator[str]:
    """Return the page about one run, or about several that are compared, piece by piece.

    Args:
        runs: their folders.
        trajectories: the most trajectories in the page.

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
    return render(overview, index, zip(names, chunks, strict=True))


def write_report(runs: Sequence[Path], output: Path, trajectories: int = TRAJECTORIES) -> None:
    """Write the page of `report_page` into a file, which appears whole or not at all.

    Raises:
        UserError: a folder holds no run, a file in it is damaged, or `output` cannot be written.
    """
    parts = report_page(runs, trajectories)
    try:
        write_text(output, parts)
    except OSError as error:
        raise UserError(f"--output {output}: not writable ({error.strerror})") from error


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
    """Return the index, the chunks of bodies, and (rows in the page, rows) of each file.

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
