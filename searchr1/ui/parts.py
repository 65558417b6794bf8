"""Parts of pages that need no script, as escaped HTML: tiles, tables, legends, blocks of a trajectory."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from searchr1.ui.page import escape

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
