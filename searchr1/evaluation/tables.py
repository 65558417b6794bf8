"""Tables of an evaluation, and how they are written for a terminal and in Markdown."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from searchr1.evaluation.methods import METHODS
from searchr1.evaluation.published import LABELS, Published, label
from searchr1.evaluation.summary import SetSummary, Summary, Value

SCORE_TITLES = {"exact_match": "exact match", "f1": "F1", "substring_match": "substring", "judge": "judge"}
FACT_TITLES = {
    "searches": "searches",
    "turns": "turns",
    "response_length": "tokens",
    "invalid_rate": "invalid",
    "untagged": "untagged",
    "truncated": "truncated",
    "failed": "failed",
    "tool_failure_rate": "tool failures",
}
SHARES = ("invalid_rate", "untagged", "truncated", "failed", "tool_failure_rate")

UNTAGGED_WARNED = 0.01
"""Share of rollouts without a tag from which on a table warns of them."""


@dataclass(frozen=True, slots=True)
class Table:
    """Text cells; the first column names the row."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    warning: str = ""
    """What a reader must know before believing the numbers."""
    ours: set[int] = field(default_factory=set)
    """Rows to be marked."""


def method_table(name: str, summary: Summary, narrow: bool = False) -> Table:
    """Return one method: a row per question set, one for their average, one for all questions together.

    Args:
        name: of the method.
        summary: its numbers.
        narrow: give exact match alone its interval.
    """

    def cell(score_name: str, value: Value) -> str:
        return score(value.mean) if narrow and score_name != "exact_match" else _with_interval(value)

    def row(title: str, one_set: SetSummary) -> list[str]:
        scores = (cell(name, value) for name, value in one_set.scores.items())
        facts = (percent(one_set.facts[fact]) if fact in SHARES else _number(one_set.facts[fact]) for fact in FACT_TITLES)
        return [title, f"{one_set.questions:,}", *scores, *facts]

    scores = list(summary.overall.scores)
    head = ["set", "questions", *(SCORE_TITLES.get(score, score) for score in scores), *FACT_TITLES.values()]
    rows = [row(label(one.name), one) for one in summary.sets]
    if len(summary.sets) > 1:
        average = [cell(name, summary.macro[name]) for name in scores]
        rows.append(["average of sets", "", *average, *("" for _ in FACT_TITLES)])
        rows.append(row("all questions", summary.overall))
    title = METHODS[name].title
    rollouts = f"means over {summary.group_size} rollouts of each question; " if summary.group_size > 1 else ""
    note = (
        f"{rollouts}95 % intervals by bootstrap over questions. Searches, turns and tokens (retrieved ones included) are "
        "per rollout; invalid is a share of turns; untagged (no tag of an action at all), truncated and failed are shares "
        "of rollouts, tool failures one of calls."
    )
    failed = summary.overall.facts["tool_failure_rate"]
    warnings = (
        [f"{percent(failed)} of the tool calls failed. The same command asks those questions again."] if failed else []
    )
    warnings += untagged_warning(summary)
    return Table(title[0].upper() + title[1:], head, rows, note, " ".join(warnings))


def untagged_warning(summary: Summary) -> list[str]:
    """Return a warning about rollouts without tags, if it is needed: how many there are, and how they are scored."""
    facts = summary.overall.facts
    if facts["by_text"]:
        return [
            f"{percent(facts['by_text'])} of the rollouts gave no answer tag and were scored by the whole text of their "
            "last turn (evaluation.untagged: text); exact match then needs a text that is nothing but the answer."
        ]
    if facts["untagged"] < UNTAGGED_WARNED:
        return []
    return [
        f"{percent(facts['untagged'])} of the rollouts ({percent(facts['untagged_turns'])} of the turns) have no <search>, "
        "<access> or <answer> tag at all and count as wrong. Either the prompt is not the one that the model was trained "
        "with (data.prompt_template, data.apply_chat_template), or the model answers in another format: "
        "evaluation.untagged=text scores its text."
    ]


def comparison(model: str, summaries: Mapping[str, Summary], published: Sequence[Published]) -> Table:
    """Return exact match in the layout of the paper: a row per method, then what was published; a column per set."""
    names = [one.name for one in next(iter(summaries.values())).sets]
    rows = []
    for method, summary in summaries.items():
        by_set = {one.name: one.scores["exact_match"] for one in summary.sets}
        cells = [score(by_set[name].mean) if name in by_set else "–" for name in names]
        rows.append([f"{model}, {METHODS[method].title}", *cells, _with_interval(summary.macro["exact_match"])])
    ours = set(range(len(rows)))
    known = [name for name in names if name in LABELS]
    note = ""
    if known:
        for row in published:
            values = [row.value(name) for name in names]
            average = row.average_over(known)
            if average is not None:
                cells = ["–" if value is None else score(value) for value in values]
                rows.append([f"{row.system} ({row.model})", *cells, score(average)])
        if len(rows) > len(ours):
            sources = dict.fromkeys(row.source for row in published)
            which = "the seven sets" if len(known) == len(LABELS) else "those of the seven sets that were evaluated"
            note = f"Published averages are over {which}. Sources: {'; '.join(sources)}."
    return Table("Exact match", ["", *(label(name) for name in names), "average"], rows, note, ours=ours)


def score(value: float) -> str:
    """Return a share with three digits: .412."""
    return f"{value:.3f}".removeprefix("0") if value < 1 else f"{value:.3f}"


def percent(value: float) -> str:
    """Return a share in percent, for things that should be rare."""
    return f"{value:.1%}"


def _with_interval(value: Value) -> str:
    if value.low is None or value.high is None:
        return score(value.mean)
    return f"{score(value.mean)} [{score(value.low)}, {score(value.high)}]"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def plain(table: Table) -> str:
    """Return a table for a terminal."""
    widths = [max(len(line[i]) for line in (table.head, *table.rows)) for i in range(len(table.head))]
    lines = [table.title]
    for line in (table.head, *table.rows):
        lines.append("  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]))
    warning = [f"WARNING: {table.warning}"] if table.warning else []
    return "\n".join([*(line.rstrip() for line in lines), *warning, *([table.note] if table.note else [])])


def markdown(table: Table) -> str:
    """Return a table as a section of Markdown."""
    lines = [f"## {_cell(table.title)}", ""]
    lines.append("| " + " | ".join(map(_cell, table.head)) + " |")
    lines.append("| --- |" + " ---: |" * (len(table.head) - 1))
    for number, row in enumerate(table.rows):
        cells = [f"**{_cell(row[0])}**" if number in table.ours else _cell(row[0]), *map(_cell, row[1:])]
        lines.append("| " + " | ".join(cells) + " |")
    warning = [f"**{_cell(table.warning)}**", ""] if table.warning else []
    return "\n".join([*lines, "", *warning, *([_cell(table.note), ""] if table.note else [])])


def _cell(text: str) -> str:
    """Return text that stays plain text in any renderer of Markdown."""
    safe = html.escape(" ".join(text.split()), quote=False)
    for letter in "\\`*_[]|":
        safe = safe.replace(letter, "\\" + letter)
    return safe
