"""A run in plain sentences, computed from its numbers: what a reader needs to know without any code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from searchr1.report.curves import evaluations_of, points_of
from searchr1.report.run_files import COLUMNS, Row
from searchr1.tracking.metrics import data_sources

Tone = Literal["good", "bad", "plain"]

MOST_SOURCES = 7
"""Data sources that get a clause of their own; of more only the extremes do."""
NOTABLE = 0.05
"""Shares (of invalid turns, …) from which on they are mentioned."""
SURE = 1.96
"""Standard errors beyond which a difference is called one."""
ENDS = 5
"""Steps at the beginning and at the end of a training whose rewards are compared."""

_ID, _QUESTION, _ANSWER, _RIGHT, _SEARCHES = (
    COLUMNS.index(name) for name in ("id", "question", "answer", "right", "searches")
)


@dataclass(slots=True)
class Summary:
    """The top of the page."""

    headline: str
    tone: Tone
    sentences: list[str] = field(default_factory=list)


def summarise(rows: Sequence[Row], first: Sequence[list[Any]], last: Sequence[list[Any]]) -> Summary:
    """Return the summary of one run.

    Args:
        rows: of metrics.jsonl.
        first: `brief`s of the first evaluation's trajectories; empty if unknown.
        last: those of the last evaluation.
    """
    steps = max((row["step"] for row in rows), default=0)
    evaluations = evaluations_of(rows)
    if not evaluations:
        summary = _training_alone(rows, steps)
    elif len(evaluations) == 1:
        summary = _one_evaluation(evaluations[0], last)
    else:
        summary = _before_and_after(evaluations, first, last)
    summary.sentences += _caveats(rows)
    return summary


def example_of(first: Sequence[list[Any]], last: Sequence[list[Any]]) -> str | None:
    """Return the id of a question that shows what was learned: wrong first, right last, most searches gained."""
    before = {brief[_ID]: brief for brief in first if not brief[_RIGHT]}
    learned = [brief for brief in last if brief[_RIGHT] and brief[_ID] in before]
    if not learned:
        return None
    best = max(learned, key=lambda b: (b[_SEARCHES] - before[b[_ID]][_SEARCHES], before[b[_ID]][_ANSWER] is not None))
    return str(best[_ID])


def difference_is_sure(before: float, after: float, questions: float) -> bool:
    """Return whether two shares of `questions` differ by more than chance (95%, both taken as independent)."""
    deviation = math.sqrt((before * (1 - before) + after * (1 - after)) / max(questions, 1.0))
    return abs(after - before) > max(SURE * deviation, 1e-9)


def _before_and_after(evaluations: Sequence[Row], first: Sequence[list[Any]], last: Sequence[list[Any]]) -> Summary:
    start, end = evaluations[0], evaluations[-1]
    before, after = float(start["val/exact_match"]), float(end["val/exact_match"])
    questions = _value(end, "val/questions") or 0.0
    sure = difference_is_sure(before, after, questions)
    searches = [_value(start, "val/searches"), _value(end, "val/searches")]
    more = None not in searches and searches[1] > 1.15 * searches[0] + 0.05  # type: ignore[operator]
    if not sure:
        headline, tone = "The model's answers to held-out questions did not clearly change.", "plain"
    elif after < before:
        headline, tone = "The model got worse at the held-out questions.", "bad"
    elif more:
        headline, tone = "The model learned to search.", "good"
    else:
        headline, tone = "The model got better at the held-out questions.", "good"
    verb = "hardly changed: from" if not sure else "rose from" if after > before else "fell from"
    noise = ", a difference that chance alone can make" if not sure else ""
    sentences = [
        f"Held-out exact match, the share of {questions:,.0f} validation questions that it answers exactly right, {verb} "
        f"{_percent(before)} to {_percent(after)} between step {start['step']:,} and step {end['step']:,}{noise}."
    ]
    if None not in searches:
        sentences.append(
            f"It searches {searches[1]:.2f} times a question, {searches[0]:.2f} times before." + _use(first, last)
        )
    sentences += _by_source(start, end)
    best = max(evaluations, key=lambda row: float(row["val/exact_match"]))
    peak = float(best["val/exact_match"])
    if difference_is_sure(after, peak, questions):
        sentences.append(f"It was better on the way: {_percent(peak)} at step {best['step']:,}.")
    return Summary(headline, tone, sentences)  # type: ignore[arg-type]


def _use(first: Sequence[list[Any]], last: Sequence[list[Any]]) -> str:
    """Return a clause about how many questions it searches for at all, and how many of those it answers right."""
    if not last:
        return ""
    searched = [brief for brief in last if brief[_SEARCHES]]
    text = f" {_percent(len(searched) / len(last))} of the questions make it search at least once"
    if first:
        text += f" ({_percent(sum(brief[_SEARCHES] > 0 for brief in first) / len(first))} before)"
    right = sum(brief[_RIGHT] for brief in last)
    if right:
        text += f"; {_percent(sum(brief[_RIGHT] for brief in searched) / right)} of its right answers come after a search"
    return text + "."


def _by_source(start: Row, end: Row) -> list[str]:
    sources = data_sources(end)
    changes = []
    for source in sources:
        before, after = (_value(row, f"val/{source}/exact_match") for row in (start, end))
        searches = _value(end, f"val/{source}/searches")
        if after is not None:
            was = "" if before is None else f"{_percent(before)} → "
            often = "" if searches is None else f" with {searches:.2f} searches"
            changes.append((after - (before or 0.0), f"{source} {was}{_percent(after)}{often}"))
    if len(changes) < 2:
        return []
    if len(changes) <= MOST_SOURCES:
        return [f"By data source: {', '.join(text for _, text in changes)}."]
    ordered = sorted(changes)
    if not start:
        return [f"Of {len(changes)} data sources, {ordered[-1][1]} is the best, {ordered[0][1]} the worst."]
    return [f"Of {len(changes)} data sources, {ordered[-1][1]} gained most, {ordered[0][1]} least."]


def _one_evaluation(row: Row, last: Sequence[list[Any]]) -> Summary:
    questions = _value(row, "val/questions") or 0.0
    headline = f"{_percent(float(row['val/exact_match']))} of {questions:,.0f} questions are answered exactly right."
    searches = _value(row, "val/searches")
    sentences = [] if searches is None else [f"The model searches {searches:.2f} times a question." + _use([], last)]
    return Summary(headline, "plain", sentences + _by_source({}, row))


def _training_alone(rows: Sequence[Row], steps: int) -> Summary:
    rewards = [value for _, value in points_of(rows, "reward/mean")]
    if not rewards:
        return Summary("No training step and no evaluation has been logged yet.", "plain")
    if len(rewards) < 2:
        return Summary(f"One step so far, with a mean reward of {rewards[0]:.3f}.", "plain")
    ends = min(ENDS, len(rewards) // 2)
    before, after = sum(rewards[:ends]) / ends, sum(rewards[-ends:]) / ends
    verb = "rose" if after > before else "fell" if after < before else "stayed"
    return Summary(
        f"The mean training reward {verb} from {before:.3f} to {after:.3f} over {steps:,} steps.",
        "plain",
        [
            f"These are means of the first and the last {ends} steps. No held-out question was evaluated "
            "(runner.val_check_interval), so whether the model learned something that carries over is open."
        ],
    )


def _caveats(rows: Sequence[Row]) -> list[str]:
    """Return what a reader should know before believing the numbers, at the last logged step."""
    caveats = []
    for name, text in (
        ("rollout/invalid_rate", "of the turns neither searched nor answered"),
        ("rollout/truncated", "of the trajectories ran out of tokens"),
        ("rollout/failed", "of the trajectories ended with an error"),
        ("tool/failure_rate", "of the tool calls failed"),
    ):
        points = points_of(rows, name)
        if points and points[-1][1] >= NOTABLE:
            caveats.append(f"{_percent(points[-1][1])} {text}")
    return [f"At the last training step {', '.join(caveats)}."] if caveats else []


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + "%"


def _value(row: Row, name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
