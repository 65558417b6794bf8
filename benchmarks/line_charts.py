"""Small charts as SVG text: no library, no script, colours from the page's style sheet."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from searchr1.report.curves import Points, compact

WIDTH, HEIGHT = 420.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 10.0, 10.0, 24.0
SMOOTHED_FROM = 80
"""A line with at least so many points is drawn faintly, with its moving mean on top."""
MOST_MARKS = 120
"""Points of one line that show their value under the mouse."""


@dataclass(frozen=True, slots=True)
class Series:
    """A named line: (step, value), steps ascending."""

    name: str
    points: Points


def line_chart(title: str, series: Sequence[Series], note: str = "") -> str:
    """Lines over steps with a legend that tells the last values; "" if there is nothing to draw.

    Args:
        title: heading.
        series: at most six; empty ones are left out.
        note: one sentence below the heading.
    """
    drawn = [(number, line) for number, line in enumerate(series) if line.points]
    if not drawn:
        return ""
    frame = _Frame([point for _, line in drawn for point in line.points])
    parts = [frame.grid()]
    for number, line in drawn:
        points = line.points
        if len(points) >= SMOOTHED_FROM:
            parts.append(f'<polyline class="raw c{number}" points="{frame.path(points)}"/>')
            points = moving_mean(points, len(points) // 20)
        parts.append(f'<polyline class="line c{number}" points="{frame.path(points)}"/>')
        parts.append(_marks(frame, line, number, visible=len(line.points) <= 16))
    legend = [(number, f"{line.name} {compact(line.points[-1][1])}") for number, line in drawn]
    return _figure(title, note, parts, legend)


def moving_mean(points: Points, radius: int) -> Points:
    """Each value replaced by the mean of itself and `radius` (fewer at the ends) neighbours on both sides."""
    smooth = []
    for i, (x, _) in enumerate(points):
        window = points[max(i - radius, 0) : i + radius + 1]
        smooth.append((x, sum(y for _, y in window) / len(window)))
    return smooth


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers, at most `most` + 1 of them, from at or below `low` to at or above `high`."""
    rough = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


class _Frame:
    """Axes: where a point lies on the drawing."""

    def __init__(self, points: Points) -> None:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        self.x_low, self.x_high = min(xs), max(xs)
        if self.x_high == self.x_low:
            self.x_low, self.x_high = self.x_low - 1, self.x_high + 1
        low, high = min(0.0, *ys), max(0.0, *ys)
        # Below this the range is rounding noise (or one value, 0), which must not fill the chart.
        if high - low < 1e-12:
            high = low + 1.0
        self.y_ticks = ticks(low, high, 6)
        self.y_low, self.y_high = self.y_ticks[0], self.y_ticks[-1]

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Points) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def grid(self) -> str:
        parts = []
        for value in self.y_ticks:
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{compact(value)}</text>')
        for value in ticks(self.x_low, self.x_high, 6):
            if value == int(value) and self.x_low <= value <= self.x_high:
                parts.append(f'<text x="{self.x(value):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{value:.0f}</text>')
        return "".join(parts)


def _marks(frame: _Frame, line: Series, number: int, visible: bool) -> str:
    stride = math.ceil(len(line.points) / MOST_MARKS)
    kind = "dot" if visible else "hit"
    name = html.escape(line.name)
    return "".join(
        f'<circle class="{kind} c{number}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{3 if visible else 5}">'
        f"<title>{name}, step {x:.0f}: {compact(y)}</title></circle>"
        for x, y in line.points[::stride]
    )


def _figure(title: str, note: str, parts: list[str], legend: list[tuple[int, str]]) -> str:
    keys = "".join(f'<span class="key k{number}">{html.escape(text)}</span>' for number, text in legend)
    label = html.escape(title)
    below = f"<p>{html.escape(note)}</p>" if note else ""
    return (
        f'<figure><figcaption>{label}</figcaption>{below}<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg><div class="legend">{keys}</div></figure>\n'
    )
