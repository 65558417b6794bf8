"""Charts for the documentation: several line charts on one SVG that stands alone."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from line_charts import HEIGHT, WIDTH, Series, line_chart

GAP, HEAD, LEGEND_LINE, LEGEND_COLUMN = 24.0, 24.0, 15.0, 205.0
LONG_NAME = 34
"""Characters of a legend's text that take a line of their own."""
STYLE = """
svg { --paper: #ffffff; --ink: #1c2430; --soft: #5d6b7e; --rule: #e1e6ed; --c0: #2f6fde; --c1: #e0752d; --c2: #24945b;
  --c3: #8e4ec6; --c4: #c2417f; --c5: #7a8798; }
@media (prefers-color-scheme: dark) { svg { --paper: #1a2029; --ink: #dfe6ef; --soft: #93a1b4; --rule: #2b3441;
  --c0: #6ba1ff; --c1: #f79a5a; --c2: #4cc38a; --c3: #bf8af0; --c4: #f07fb4; --c5: #9aa7b8; } }
.paper { fill: var(--paper); } text { font: 10.5px system-ui, sans-serif; fill: var(--soft); }
.title { font-size: 14px; font-weight: 600; fill: var(--ink); } .grid { stroke: var(--rule); }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; } .dot { fill: var(--c); }
.hit { fill: none; } .key { fill: var(--c); }
""" + "".join(f".c{number} {{ --c: var(--c{number}); }}" for number in range(6))


@dataclass(frozen=True, slots=True)
class Chart:
    """One panel."""

    title: str
    series: Sequence[Series]
    """At most six."""


def drawing(charts: Sequence[Chart], columns: int) -> str:
    """A whole SVG document, `columns` charts beside each other, each with its legend below."""
    beside = 1 if any(len(line.name) > LONG_NAME for chart in charts for line in chart.series) else 2
    legend_lines = max(math.ceil(len(chart.series) / beside) for chart in charts)
    cell_width, cell_height = WIDTH + GAP, HEAD + HEIGHT + LEGEND_LINE * legend_lines + GAP
    width, height = columns * cell_width + GAP, math.ceil(len(charts) / columns) * cell_height + GAP
    parts = []
    for number, chart in enumerate(charts):
        left, top = GAP + number % columns * cell_width, GAP + number // columns * cell_height
        parts.append(f'<text class="title" x="{left}" y="{top + 12}">{html.escape(chart.title)}</text>')
        figure = line_chart(chart.title, chart.series)
        plot = figure[figure.index("<svg ") + 5 : figure.index("</svg>")]
        parts.append(f'<svg x="{left}" y="{top + HEAD}" width="{WIDTH}" height="{HEIGHT}" overflow="visible" {plot}</svg>')
        for index, line in enumerate(chart.series):
            x = left + index % beside * LEGEND_COLUMN + 8
            y = top + HEAD + HEIGHT + index // beside * LEGEND_LINE + 8
            parts.append(f'<rect class="key c{index}" x="{x}" y="{y - 8}" width="9" height="9" rx="2"/>')
            parts.append(f'<text x="{x + 15}" y="{y}">{html.escape(line.name)}</text>')
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    paper = '<rect class="paper" width="100%" height="100%"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{paper}{"".join(parts)}</svg>\n'
