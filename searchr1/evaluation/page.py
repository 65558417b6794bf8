"""results.html: the tables, a chart of intervals and some answers to read, in one file that loads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from searchr1.evaluation.chart import interval_chart
from searchr1.evaluation.methods import METHODS
from searchr1.evaluation.page_style import STYLE, escape
from searchr1.evaluation.published import canonical, label
from searchr1.evaluation.results import Results
from searchr1.evaluation.tables import Table, score
from searchr1.rewards.answers import exact_match

LONGEST = 600
"""Characters shown of a question or an answer."""


def page(results: Results) -> str:
    """The whole page. All that a model, a data file or a path says is escaped."""
    name = escape(Path(results.model).name or results.model)
    sections = [
        f"<h1>{name}</h1><p>Evaluation of {escape(results.model)}</p>",
        _tiles(results),
        _chart(results),
        *map(_table, results.tables()),
        *_examples(results),
        _settings(results),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{name}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def _tiles(results: Results) -> str:
    boxes = []
    for name, summary in results.summaries.items():
        value = summary.macro["exact_match"]
        span = "" if value.low is None or value.high is None else f" ±{score((value.high - value.low) / 2)}"
        what = "exact match, average of sets" if len(summary.sets) > 1 else "exact match"
        boxes.append(
            f'<div class="tile"><span>{escape(METHODS[name].title)}: {what}</span><b>{score(value.mean)}{span}</b></div>'
        )
    questions = next(iter(results.summaries.values())).overall.questions
    boxes.append(f'<div class="tile"><span>questions</span><b>{questions:,}</b></div>')
    return f'<div class="tiles">{"".join(boxes)}</div>'


def _chart(results: Results) -> str:
    names = results.summaries
    keys = "".join(f'<span class="key c{n}">{escape(METHODS[name].title)}</span>' for n, name in enumerate(names))
    rings = "<span>○ best published number of a model of about this size</span>" if results.published else ""
    drawn = interval_chart(list(names.values()), results.published)
    legend = f'<div class="legend">{keys}{rings}</div>'
    return f'<h2>Exact match with 95 % intervals</h2><div class="table bars">{drawn}{legend}</div>'


def _table(table: Table) -> str:
    head = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in table.head)}</tr>"
    marked = table.ours if len(table.ours) < len(table.rows) else set()
    rows = "".join(
        ('<tr class="ours">' if number in marked else "<tr>") + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for number, row in enumerate(table.rows)
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    warning = f'<p class="note"><b class="bad">{escape(table.warning)}</b></p>' if table.warning else ""
    return f'<h2>{escape(table.title)}</h2><div class="table"><table>{head}{rows}</table></div>{warning}{note}'


def _settings(results: Results) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in results.settings.items())
    return f'<h2>Settings</h2><div class="table settings"><table>{rows}</table></div>'


def _examples(results: Results) -> list[str]:
    sections = []
    for name, one in results.methods.items():
        cards = "".join(_card(row) for row in one.examples)
        sections.append(f"<h2>Some answers, {escape(METHODS[name].title)}</h2>{cards}")
    return sections


def _card(row: dict[str, Any]) -> str:
    answer = row["answer"]
    right = exact_match(answer, row["golden_answers"]) > 0
    verdict = '<b class="good">✓</b>' if right else '<b class="bad">✗</b>'
    facts = [
        f"gold: {_cut(' | '.join(map(str, row['golden_answers'])))}",
        f"answer: {'none' if answer is None else _cut(answer)}",
        f"{row['searches']} searches, {len(row['turns'])} turns, {row['response_length']} tokens, ended by {row['stop']}",
    ]
    turns = "".join(_turn(turn) for turn in row["turns"])
    return (
        f'<details class="card"><summary>{verdict} {escape(_cut(row["question"]))} '
        f"<small>{escape(label(canonical(row['data_source'])))}</small></summary>"
        f'<div class="inside"><p class="meta">{escape(" · ".join(facts))}</p>{turns}</div></details>\n'
    )


def _turn(turn: dict[str, Any]) -> str:
    parts = [f'<pre class="policy">{escape(_cut(turn["policy_text"], 4 * LONGEST)).strip()}</pre>']
    if turn["tool_error"]:
        parts.append(f'<p class="meta"><b class="bad">{escape(turn["tool_error"])}</b></p>')
    if turn["tool_text"]:
        parts.append(f'<pre class="tool">{escape(_cut(turn["tool_text"], 4 * LONGEST)).strip()}</pre>')
    return "".join(parts)


def _cut(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
