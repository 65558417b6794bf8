"""results.html: the tables, a chart of intervals and some answers to read, in one file that loads and runs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from searchr1.evaluation.methods import METHODS
from searchr1.evaluation.published import LABELS, canonical, label
from searchr1.evaluation.results import Results
from searchr1.evaluation.summary import Value
from searchr1.evaluation.tables import Table, score
from searchr1.rewards.answers import exact_match
from searchr1.ui import parts
from searchr1.ui.page import Page, escape
from searchr1.ui.parts import Group, Interval, interval_chart

RESULTS = Page("results.html", ("base.css", "blocks.css", "results.css"))
LONGEST = 600
"""Most characters shown of a question or an answer."""


def page(results: Results) -> str:
    """Return the whole page. Everything that a model, a data file or a path contains is escaped."""
    name = escape(Path(results.model).name or results.model)
    sections = [
        f"<h1>{name}</h1><p>Evaluation of {escape(results.model)}</p>",
        _tiles(results),
        _chart(results),
        *map(_table, results.tables()),
        *_examples(results),
        "<h2>Settings</h2>" + parts.table((), list(map(list, results.settings.items())), kind="settings"),
    ]
    return RESULTS.render({"title": name, "policy": RESULTS.policy(), "body": "\n".join(sections)})


def _tiles(results: Results) -> str:
    boxes = []
    for name, summary in results.summaries.items():
        value = summary.macro["exact_match"]
        span = "" if value.low is None or value.high is None else f" ±{score((value.high - value.low) / 2)}"
        what = "exact match, average of sets" if len(summary.sets) > 1 else "exact match"
        boxes.append((f"{METHODS[name].title}: {what}", f"{score(value.mean)}{span}"))
    questions = next(iter(results.summaries.values())).overall.questions
    return parts.tiles([*boxes, ("questions", f"{questions:,}")])


def _chart(results: Results) -> str:
    drawn = interval_chart("Exact match by question set", _groups(results), "best published", score)
    rings = "○ best published number of a model of about this size" if results.published else ""
    legend = parts.legend([METHODS[name].title for name in results.summaries], rings)
    return f'<h2>Exact match with 95 % intervals</h2><div class="table intervals">{drawn}{legend}</div>'


def _groups(results: Results) -> list[Group]:
    """Return a group per question set, and one for their average, with an interval per method."""
    summaries, published = list(results.summaries.values()), results.published
    names = [one.name for one in summaries[0].sets]
    groups = []
    for place, name in enumerate(names):
        numbers = [value for row in published if (value := row.value(name)) is not None]
        intervals = [_interval(summary.sets[place].scores["exact_match"]) for summary in summaries]
        groups.append(Group(label(name), intervals, max(numbers, default=None)))
    if len(groups) > 1:
        known = [name for name in names if name in LABELS]
        averages = [value for row in published if (value := row.average_over(known)) is not None]
        best = max(averages, default=None) if len(known) == len(names) else None
        groups.append(Group("average", [_interval(summary.macro["exact_match"]) for summary in summaries], best))
    return groups


def _interval(value: Value) -> Interval:
    low, high = (value.mean if bound is None else bound for bound in (value.low, value.high))
    return Interval(value.mean, low, high)


def _table(table: Table) -> str:
    marked = table.ours if len(table.ours) < len(table.rows) else set()
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    warning = f'<p class="note"><b class="bad">{escape(table.warning)}</b></p>' if table.warning else ""
    return f"<h2>{escape(table.title)}</h2>{parts.table(table.head, table.rows, marked)}{warning}{note}"


def _examples(results: Results) -> list[str]:
    sections = []
    for name, one in results.methods.items():
        cards = "".join(_card(row) for row in one.examples)
        sections.append(f"<h2>Some answers, {escape(METHODS[name].title)}</h2>{cards}")
    return sections


def _card(row: dict[str, Any]) -> str:
    answer = row["answer"]
    right = exact_match(answer, row["golden_answers"]) > 0
    facts = [
        f"gold: {_cut(' | '.join(map(str, row['golden_answers'])))}",
        f"answer: {'none' if answer is None else _cut(answer)}",
        f"{row['searches']} searches, {len(row['turns'])} turns, {row['response_length']} tokens, ended by {row['stop']}",
    ]
    turns = "".join(_turn(turn) for turn in row["turns"])
    return (
        f'<details class="card"><summary>{parts.verdict(right)} {escape(_cut(row["question"]))} '
        f"<small>{escape(label(canonical(row['data_source'])))}</small></summary>"
        f'<div class="inside"><p class="meta">{escape(" · ".join(facts))}</p>{turns}</div></details>\n'
    )


def _turn(turn: dict[str, Any]) -> str:
    blocks = parts.policy_blocks(_cut(turn["policy_text"], 4 * LONGEST))
    if turn["tool_error"]:
        blocks += f'<p class="meta"><b class="bad">{escape(turn["tool_error"])}</b></p>'
    if turn["tool_text"]:
        kind = "information" if turn["queries"] else "message"
        blocks += parts.block(kind, _cut(turn["tool_text"], 4 * LONGEST).strip())
    return blocks


def _cut(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
