"""Exact match of several methods with intervals, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from searchr1.evaluation.page_style import escape
from searchr1.evaluation.published import LABELS, Published, label
from searchr1.evaluation.summary import Summary, Value
from searchr1.evaluation.tables import score

WIDTH, LEFT, RIGHT = 760.0, 130.0, 740.0
ROW, GAP = 15.0, 12.0


@dataclass(frozen=True, slots=True)
class _Line:
    """One question set, or the average."""

    name: str
    values: list[Value]
    """A value per method."""
    best: float | None
    """The best published number."""


def interval_chart(summaries: Sequence[Summary], published: Sequence[Published]) -> str:
    """A block per question set with a line per method (classes c0, c1, …); a ring is the best published number."""
    lines = _lines(summaries, published)
    highest = max(value.mean if value.high is None else value.high for line in lines for value in line.values)
    top = max(0.2, 0.2 * math.ceil(max([highest, *(line.best or 0.0 for line in lines)]) / 0.2 - 1e-9))

    def x(share: float) -> str:
        return f"{LEFT + share / top * (RIGHT - LEFT):.1f}"

    parts, y = [], GAP
    for line in lines:
        middle = y + ROW * len(line.values) / 2
        name = escape(line.name[:20])
        parts.append(f'<text class="name" x="{LEFT - 10}" y="{middle + 4:.1f}" text-anchor="end">{name}</text>')
        for number, value in enumerate(line.values):
            low, high = (value.mean if bound is None else bound for bound in (value.low, value.high))
            at = f"{y + ROW * (number + 0.5):.1f}"
            parts.append(
                f'<line class="span c{number}" x1="{x(low)}" x2="{x(high)}" y1="{at}" y2="{at}"/>'
                f'<circle class="dot c{number}" cx="{x(value.mean)}" cy="{at}" r="3.5">'
                f"<title>{score(value.mean)} [{score(low)}, {score(high)}]</title></circle>"
            )
        if line.best is not None:
            title = f"<title>best published: {score(line.best)}</title>"
            parts.append(f'<circle class="published" cx="{x(line.best)}" cy="{middle:.1f}" r="5">{title}</circle>')
        y += ROW * len(line.values) + GAP
    grid = "".join(
        f'<line class="grid" x1="{x(tick / 10)}" x2="{x(tick / 10)}" y1="0" y2="{y:.1f}"/>'
        f'<text x="{x(tick / 10)}" y="{y + 14:.1f}" text-anchor="middle">{tick / 10:g}</text>'
        for tick in range(0, round(top * 10) + 1, 1 if top < 0.5 else 2)
    )
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {y + 20:.0f}" role="img" aria-label="Exact match by question set">'
        f"{grid}{''.join(parts)}</svg>"
    )


def _lines(summaries: Sequence[Summary], published: Sequence[Published]) -> list[_Line]:
    names = [found.name for found in summaries[0].sets]
    lines = []
    for place, name in enumerate(names):
        numbers = [value for row in published if (value := row.value(name)) is not None]
        values = [summary.sets[place].scores["exact_match"] for summary in summaries]
        lines.append(_Line(label(name), values, max(numbers, default=None)))
    if len(lines) > 1:
        known = [name for name in names if name in LABELS]
        averages = [value for row in published if (value := row.average_over(known)) is not None]
        best = max(averages, default=None) if len(known) == len(names) else None
        lines.append(_Line("average", [summary.macro["exact_match"] for summary in summaries], best))
    return lines
