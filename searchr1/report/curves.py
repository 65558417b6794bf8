"""A run's metrics as tiles, a table and charts: plain data, which the page draws."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from searchr1.tracking.metrics import data_sources

Row = dict[str, Any]
Points = list[tuple[float, float]]
"""(step, value), steps ascending."""

MOST_POINTS = 2000
"""Points of a line in the page; of longer runs every n-th step is drawn."""
MOST_LINES = 6
"""Lines of one chart of data sources; more are drawn in further charts."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart of a run."""

    title: str
    note: str
    lines: tuple[tuple[str, str], ...]
    """(name, metric)."""
    compared: int = 0
    """Which of the lines is drawn of every run where several are compared."""


CHARTS = (
    Chart(
        "Reward", "mean and standard deviation over a step's trajectories", (("mean", "reward/mean"), ("std", "reward/std"))
    ),
    Chart("Exact match", "share of right answers", (("training", "reward/exact_match"), ("held-out", "val/exact_match")), 1),
    Chart(
        "Searches per question",
        "queries sent, mean",
        (("training", "rollout/searches"), ("held-out", "val/searches")),
        1,
    ),
    Chart(
        "Response length",
        "tokens, mean",
        (("with retrieved text", "rollout/response_length"), ("policy alone", "rollout/policy_tokens")),
    ),
    Chart(
        "Entropy", "nats per policy token", (("of the policy", "actor/entropy"), ("of sampled tokens", "rollout/entropy"))
    ),
    Chart("KL to the reference model", "nats per policy token", (("KL", "actor/kl"),)),
    Chart(
        "Mismatch of engine and actor",
        "absolute difference of log-probabilities",
        (("mean", "mismatch/logprob_gap"), ("largest", "mismatch/logprob_gap_max")),
    ),
    Chart("Gradient norm", "before clipping", (("norm", "actor/grad_norm"),)),
    Chart(
        "How trajectories go",
        "shares",
        (
            ("invalid turns", "rollout/invalid_rate"),
            ("out of tokens", "rollout/truncated"),
            ("forced last turn", "rollout/forced_final"),
            ("groups of equal rewards", "rollout/uniform_groups"),
            ("failed tool calls", "tool/failure_rate"),
        ),
    ),
    Chart("Tool calls", "seconds", (("median", "tool/seconds_p50"), ("99th percentile", "tool/seconds_p99"))),
)
PHASES = (
    ("rollout", "time/rollout"),
    ("reward", "time/reward"),
    ("reference", "time/reference"),
    ("log-probabilities", "time/logprob"),
    ("training", "time/train"),
    ("weight update", "time/weight_update"),
)
CHANGES = (
    ("Held-out exact match", "val/exact_match"),
    ("Searches per held-out question", "val/searches"),
    ("Training reward", "reward/mean"),
    ("Response tokens", "rollout/response_length"),
)
MEDIANS = (("Seconds a step, median", "time/step"), ("Rollout tokens/s, median", "rollout/tokens_per_second"))


def points_of(rows: Sequence[Row], name: str) -> Points:
    """Return (step, value) wherever the metric was logged; of a step that was logged twice the last value."""
    values = {float(row["step"]): row[name] for row in rows if isinstance(row.get(name), int | float)}
    return sorted((step, float(value)) for step, value in values.items() if math.isfinite(value))


def compact(value: float) -> str:
    """Return a number in at most four digits."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:.1e}"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.4g}" if size >= 100 else f"{value:.3g}"


def evaluations_of(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that hold an evaluation, one per step, by step."""
    by_step = {row["step"]: row for row in rows if isinstance(row.get("val/exact_match"), int | float)}
    return [by_step[step] for step in sorted(by_step)]


def tiles(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return the run in a few numbers: (label, first → last) or (label, median)."""
    shown = []
    for label, name in CHANGES:
        points = points_of(rows, name)
        if points:
            first, last = compact(points[0][1]), compact(points[-1][1])
            shown.append((label, f"{first} → {last}" if len(points) > 1 else last))
    for label, name in MEDIANS:
        points = points_of(rows, name)
        if points:
            shown.append((label, compact(statistics.median(value for _, value in points))))
    return shown


def evaluation_table(evaluations: Sequence[Row]) -> list[list[str]]:
    """Return the first and last evaluation: a head, a row per data source, and one for all; empty without an evaluation."""
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    both = [first, last] if first["step"] != last["step"] else [last]
    columns = (
        ("exact match", "exact_match", "{:.3f}"),
        ("F1", "f1", "{:.3f}"),
        ("searches", "searches", "{:.2f}"),
        ("tokens", "response_length", "{:,.0f}"),
    )
    table = [["data source", "questions", *(f"{label}, step\u00a0{row['step']}" for label, _, _ in columns for row in both)]]
    for label, prefix in _prefixes(last).items():
        values = [_cell(row.get(f"{prefix}/{name}"), form) for _, name, form in columns for row in both]
        table.append([label, _cell(last.get(f"{prefix}/questions"), "{:,.0f}"), *values])
    return table


def comparison_table(names: Sequence[str], runs: Sequence[Sequence[Row]]) -> list[list[str]]:
    """Return a row per run: first and last values of the main metrics, and the last evaluation of every data source."""
    lasts = [evaluations[-1] if (evaluations := evaluations_of(rows)) else {} for rows in runs]
    sources = sorted({source for last in lasts for source in data_sources(last)})
    table = [["run", "steps", *(label for label, _ in CHANGES), *sources]]
    for name, rows, last in zip(names, runs, lasts, strict=True):
        values = dict(tiles(rows))
        steps = f"{max((row['step'] for row in rows), default=0):,}"
        matches = [_cell(last.get(f"val/{source}/exact_match"), "{:.3f}") for source in sources]
        table.append([name, steps, *(values.get(label, "") for label, _ in CHANGES), *matches])
    return table


def charts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return all curves of one run for which there are values: `{title, note, kind, lines: [{name, points}]}`."""
    drawn = [_chart(c.title, c.note, [(name, points_of(rows, key)) for name, key in c.lines]) for c in CHARTS]
    evaluations = evaluations_of(rows)
    if evaluations:
        sources = data_sources(evaluations[-1])
        for start in reversed(range(0, len(sources), MOST_LINES)):
            part = sources[start : start + MOST_LINES]
            lines = [(source, points_of(rows, f"val/{source}/exact_match")) for source in part]
            drawn.insert(2, _chart("Held-out exact match by data source", "share of right answers", lines))
    phases = [(name, points_of(rows, key)) for name, key in PHASES]
    spent: Counter[float] = Counter()
    for _, points in phases:
        spent.update(dict(points))
    rest = [(step, max(total - spent[step], 0.0)) for step, total in points_of(rows, "time/step")]
    stacked = [(name, points) for name, points in [*phases, ("other", rest)] if any(value > 0 for _, value in points)]
    drawn.append(_chart("Where a step's time goes", "seconds, stacked", stacked, "stack"))
    return [chart for chart in drawn if chart["lines"]]


def compared_charts(names: Sequence[str], runs: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """Return the curves of several runs, one line a run."""
    drawn = []
    for chart in CHARTS:
        wanted = chart.lines[chart.compared]
        for line, metric in (wanted, *chart.lines):
            lines = [(name, points_of(rows, metric)) for name, rows in zip(names, runs, strict=True)]
            if any(points for _, points in lines):
                title = f"{chart.title}: {line}" if len(chart.lines) > 1 else chart.title
                drawn.append(_chart(title, chart.note, lines))
                break
    lines = [(name, points_of(rows, "time/step")) for name, rows in zip(names, runs, strict=True)]
    drawn.append(_chart("Time of a step", "seconds", lines))
    return [chart for chart in drawn if chart["lines"]]


def _chart(title: str, note: str, lines: Sequence[tuple[str, Points]], kind: str = "lines") -> dict[str, Any]:
    shown = [
        {"name": name, "colour": number, "points": _thinned(points)} for number, (name, points) in enumerate(lines) if points
    ]
    return {"title": title, "note": note, "kind": kind, "lines": shown}


def _thinned(points: Points) -> Points:
    stride = math.ceil(len(points) / MOST_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def _prefixes(evaluation: Row) -> dict[str, str]:
    return {source: f"val/{source}" for source in data_sources(evaluation)} | {"all": "val"}


def _cell(value: object, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) and math.isfinite(value) else ""
