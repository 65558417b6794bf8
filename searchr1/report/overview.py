"""What the page about one or several runs shows at once: everything but the trajectories; pure functions of plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from searchr1.report.curves import charts, compared_charts, comparison_table, evaluation_table, evaluations_of, tiles
from searchr1.report.run_files import COLUMNS, LoggedFile, Row
from searchr1.report.summary import example_of, summarise
from searchr1.tracking.legs import SettingsChange

Briefs = list[list[Any]]


@dataclass(slots=True)
class RunView:
    """One run as it is on disk now."""

    name: str
    metrics: list[Row]
    files: list[LoggedFile]
    first: Briefs = field(default_factory=list)
    """`brief`s of the first evaluation's trajectories."""
    last: Briefs = field(default_factory=list)
    """`brief`s of the last evaluation's trajectories."""
    changes: list[SettingsChange] = field(default_factory=list)
    """Where the settings changed."""


def names_of(runs: Sequence[Path]) -> list[str]:
    """Return the folders' own names, with as much of their parents as makes them distinct."""
    folders = [run.resolve() for run in runs]
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            return names
    return [str(folder) for folder in folders]


def ends_of(files: Sequence[LoggedFile]) -> tuple[LoggedFile | None, LoggedFile | None]:
    """Return the first and the last evaluation's files; the first is None if there is only one."""
    evals = [file for file in files if file.mode == "eval"]
    if not evals:
        return None, None
    return (evals[0] if len(evals) > 1 else None), evals[-1]


def overview_of(views: Sequence[RunView], body_of: Callable[[int, LoggedFile, str], Row | None]) -> dict[str, Any]:
    """Return title, summaries, tiles, table, changes of settings, and charts.

    Args:
        views: the runs; with more than one, they are compared.
        body_of: returns the first trajectory with an id in a run's file.
    """
    views = [replace(view, first=_latest(view.first), last=_latest(view.last)) for view in views]
    one = views[0] if len(views) == 1 else None
    names = [view.name for view in views]
    metrics = [_metrics(view) for view in views]
    return {
        "title": one.name if one else " and ".join(names) if len(names) == 2 else f"{len(names)} runs",
        "subtitle": _extent(metrics[0]) if one else "compared",
        "runs": names,
        "compares": one is None,
        "summaries": [
            _summary(number, view, rows, one is None, body_of)
            for number, (view, rows) in enumerate(zip(views, metrics, strict=True))
        ],
        "tiles": tiles(metrics[0]) if one else [],
        "table": evaluation_table(evaluations_of(metrics[0])) if one else comparison_table(names, metrics),
        "changes": [_change(view.name if one is None else "", change) for view in views for change in view.changes],
        "charts": charts(metrics[0]) if one else compared_charts(names, metrics),
        "leftOut": "",
        "problem": "",
    }


def _change(run: str, change: SettingsChange) -> dict[str, Any]:
    return {"run": run, "step": change.step, "settings": [str(setting) for setting in change.settings]}


def _latest(briefs: Briefs) -> Briefs:
    """Return the last row of each rollout: an evaluation asks questions with failed tool calls again, and keeps all rows."""
    parts = [COLUMNS.index(name) for name in ("id", "question", "replica")]
    return list({tuple(row[part] for part in parts): row for row in briefs}.values())


def _metrics(view: RunView) -> list[Row]:
    """Return the run's metrics; without metrics of its last evaluation, those that its trajectories give."""
    _, file = ends_of(view.files)
    if file is None or not view.last or evaluations_of(view.metrics):
        return view.metrics
    groups: dict[str, Briefs] = {"val": view.last}
    for row_brief in view.last:
        groups.setdefault(f"val/{row_brief[COLUMNS.index('source')]}", []).append(row_brief)
    row: Row = {"step": file.step}
    for prefix, briefs in groups.items():
        row[f"{prefix}/questions"] = len({one[0] for one in briefs})
        row[f"{prefix}/exact_match"] = sum(one[COLUMNS.index("right")] for one in briefs) / len(briefs)
        row[f"{prefix}/searches"] = sum(one[COLUMNS.index("searches")] for one in briefs) / len(briefs)
        row[f"{prefix}/response_length"] = sum(one[COLUMNS.index("length")] for one in briefs) / len(briefs)
    return [*view.metrics, row]


def _extent(rows: Sequence[Row]) -> str:
    steps = max((row["step"] for row in rows), default=0)
    evaluations = len(evaluations_of(rows))
    parts = [f"{steps:,} training step{'' if steps == 1 else 's'}"] if steps else []
    return ", ".join([*parts, f"{evaluations:,} evaluation{'' if evaluations == 1 else 's'}"])


def _summary(
    number: int, view: RunView, rows: Sequence[Row], compares: bool, body_of: Callable[[int, LoggedFile, str], Row | None]
) -> dict[str, Any]:
    summary = summarise(rows, view.first, view.last)
    first, last = ends_of(view.files)
    example = None
    question = example_of(view.first, view.last) if first and last and not compares else None
    if question is not None:
        ends = [(file, body_of(number, file, question)) for file in (first, last) if file]
        briefs = [{brief[0]: brief for brief in end}[question] for end in (view.first, view.last)]
        rollouts = [_rollout(number, f, b, t) for (f, b), t in zip(ends, briefs, strict=True) if b is not None]
        example = {"question": briefs[0][COLUMNS.index("question")], "attempts": rollouts}
    return {
        "run": view.name if compares else "",
        "headline": summary.headline,
        "tone": summary.tone,
        "sentences": summary.sentences,
        "example": example,
    }


def _rollout(run: int, file: LoggedFile, body: Row, brief: list[Any]) -> dict[str, Any]:
    values = dict(zip(COLUMNS, brief, strict=True))
    queries = [query for turn in body["turns"] if turn.get("action") == "search" for query in turn.get("queries") or []]
    return {
        "step": file.step,
        "answer": values["answer"],
        "right": values["right"],
        "queries": [str(query) for query in queries],
        "key": f"{run}/{file.mode}/{file.step}/{values['replica']}/{values['id']}",
    }
