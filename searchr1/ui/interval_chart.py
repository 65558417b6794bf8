"""Values with intervals as an SVG without a script: a block per group, a line per series, a ring to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from searchr1.ui.page import escape

WIDTH, LEFT, RIGHT = 760.0, 130.0, 740.0
ROW, GAP = 15.0, 12.0


@dataclass(frozen=True, slots=True)
class Interval:
    """A value from 0 to 1 and its interval; without one, both bounds are the value."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Group:
    """One block of the chart."""

    name: str
    intervals: Sequence[Interval]
    """An interval per series, in the series' order."""
    ring: float | None = None
    """A value to compare with."""


def interval_chart(title: str, groups: Sequence[Group], ring_title: str, text_of: Callable[[float], str]) -> str:
    """Return the drawing; series are coloured by the classes c0, c1, ….

    Args:
        title: what a screen reader reads.
        groups: at least one.
        ring_title: what a ring is, in its tooltip.
        text_of: how a value is written.
    """
    highest = max(max(interval.high for interval in group.intervals) for group in groups)
    top = max(0.2, 0.2 * math.ceil(max([highest, *(group.ring or 0.0 for group in groups)]) / 0.2 - 1e-9))

    def x(share: float) -> str:
        return f"{LEFT + share / top * (RIGHT - LEFT):.1f}"

    parts, y = [], GAP
    for group in groups:
        middle = y + ROW * len(group.intervals) / 2
        name = escape(group.name[:20])
        parts.append(f'<text class="name" x="{LEFT - 10}" y="{middle + 4:.1f}" text-anchor="end">{name}</text>')
        for number, interval in enumerate(group.intervals):
            at = f"{y + ROW * (number + 0.5):.1f}"
            bounds = f"{text_of(interval.value)} [{text_of(interval.low)}, {text_of(interval.high)}]"
            parts.append(
                f'<line class="span c{number}" x1="{x(interval.low)}" x2="{x(interval.high)}" y1="{at}" y2="{at}"/>'
                f'<circle class="dot c{number}" cx="{x(interval.value)}" cy="{at}" r="3.5">'
                f"<title>{escape(bounds)}</title></circle>"
            )
        if group.ring is not None:
            tip = f"<title>{escape(ring_title)}: {escape(text_of(group.ring))}</title>"
            parts.append(f'<circle class="ring" cx="{x(group.ring)}" cy="{middle:.1f}" r="5">{tip}</circle>')
        y += ROW * len(group.intervals) + GAP
    grid = "".join(
        f'<line class="grid" x1="{x(tick / 10)}" x2="{x(tick / 10)}" y1="0" y2="{y:.1f}"/>'
        f'<text x="{x(tick / 10)}" y="{y + 14:.1f}" text-anchor="middle">{tick / 10:g}</text>'
        for tick in range(0, round(top * 10) + 1, 1 if top < 0.5 else 2)
    )
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {y + 20:.0f}" role="img" aria-label="{escape(title)}">{grid}{"".join(parts)}</svg>'
    )
