"""Parts of pages that need no script: tiles, tables, legends, blocks of a trajectory, charts with intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
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


BLOCK_TITLES = {
    "think": "think",
    "search": "search",
    "access": "open page",
    "answer": "answer",
    "loose": "text outside tags",
    "information": "information",
    "forged": "information that the model made up",
    "message": "message to the model",
}
"""The kinds of blocks and their titles, as in dom.js."""
_TAGGED = re.compile(r"<(think|search|access|answer|information)>.*?(?:</\1>|\Z)", re.DOTALL)


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """Return tiles of (label, value)."""
    boxes = (f'<div class="tile"><span>{escape(label)}</span><b>{escape(value)}</b></div>' for label, value in values)
    return f'<div class="tiles">{"".join(boxes)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], marked: Collection[int] = (), kind: str = "") -> str:
    """Return a table.

    Args:
        head: cells of the first line; empty for a table without one.
        rows: cells; the first one names the row.
        marked: numbers of the rows that stand out.
        kind: a further class of the table's box.
    """
    first = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    lines = "".join(
        ('<tr class="ours">' if number in marked else "<tr>") + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="{" ".join(["table", *kind.split()])}"><table>{first}{lines}</table></div>'


def legend(names: Sequence[str], note: str = "") -> str:
    """Return a legend of series, coloured as c0, c1, …, and a note."""
    keys = "".join(f'<span class="key c{number}">{escape(name)}</span>' for number, name in enumerate(names))
    return f'<div class="legend">{keys}{f"<span>{escape(note)}</span>" if note else ""}</div>'


def verdict(right: bool) -> str:
    """Return the mark of a right or a wrong answer."""
    return '<b class="good">✓</b>' if right else '<b class="bad">✗</b>'


def block(kind: str, text: str) -> str:
    """Return a block of a trajectory; `kind` is one of `BLOCK_TITLES`."""
    return f'<div class="block {kind}"><h4>{escape(BLOCK_TITLES[kind])}</h4><div class="text">{escape(text)}</div></div>'


def policy_blocks(text: str) -> str:
    """Return the policy's text of one turn as blocks, cut at its tags, which stay in the text."""
    pieces, at = [], 0
    for match in _TAGGED.finditer(text):
        pieces += [("loose", text[at : match.start()]), ("forged" if match[1] == "information" else match[1], match[0])]
        at = match.end()
    pieces.append(("loose", text[at:]))
    return "".join(block(kind, piece.strip()) for kind, piece in pieces if piece.strip())
