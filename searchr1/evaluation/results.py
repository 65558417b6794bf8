"""The results of an evaluation: each method's numbers, tables, and some answers to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from searchr1.errors import UserError
from searchr1.evaluation.methods import main_method
from searchr1.evaluation.published import LABELS, Published, canonical, nearest
from searchr1.evaluation.rollouts import ScoredRollout
from searchr1.evaluation.summary import CONFIDENCE, RESAMPLES, Summary, summarise
from searchr1.evaluation.tables import Table, comparison, method_table, plain

WRONG_SHOWN, RIGHT_SHOWN = 4, 2
"""Examples kept per set and method."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class MethodResult:
    """One method's numbers, and some of its answers to read."""

    summary: Summary
    examples: list[Row]
    how: str
    """How rollouts were drawn."""


@dataclass(frozen=True, slots=True)
class Results:
    """An evaluation of one model."""

    model: str
    billions: float | None
    methods: dict[str, MethodResult]
    settings: dict[str, str] = field(default_factory=dict)
    """Facts about the run, for readers of the tables."""

    @property
    def summaries(self) -> dict[str, Summary]:
        """By method."""
        return {name: one.summary for name, one in self.methods.items()}

    @property
    def main(self) -> Summary:
        """The summary of the method that `eval.json` holds."""
        return self.summaries[main_method(list(self.methods))]

    @property
    def published(self) -> list[Published]:
        """Rows to compare with: none if no set of the papers was evaluated."""
        known = any(one.name in LABELS for summary in self.summaries.values() for one in summary.sets)
        return nearest(self.billions) if known else []

    def tables(self, narrow: bool = False) -> list[Table]:
        """Return the comparison (where there is something to compare), then a table per method."""
        tables = [method_table(name, one.summary, narrow) for name, one in self.methods.items()]
        if len(self.methods) > 1 or self.published:
            tables.insert(0, comparison(Path(self.model).name or self.model, self.summaries, self.published))
        return tables

    def text(self) -> str:
        """Return the tables for a terminal: narrower, and with notes that hold for every method once."""
        tables = self.tables(narrow=True)
        last = tables[-1].note
        shown = [dataclasses.replace(table, note="") if table.note == last else table for table in tables]
        return "\n\n".join([*map(plain, shown), last])

    def json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "model": self.model,
            "parameters_in_billions": self.billions,
            "settings": self.settings,
            "interval": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "over": "questions"},
            "methods": {
                name: {
                    "how": one.how,
                    "untagged": one.summary.untagged,
                    "attempts_per_question": one.summary.group_size,
                    "sets": {found.name: dataclasses.asdict(found) for found in one.summary.sets},
                    "macro": {score: dataclasses.asdict(value) for score, value in one.summary.macro.items()},
                    "all": dataclasses.asdict(one.summary.overall),
                }
                for name, one in self.methods.items()
            },
            "published": [
                dataclasses.asdict(row) | {"values": dict(zip(LABELS, row.values, strict=False))} for row in self.published
            ],
        }


def score_rows(
    rows: Iterable[Row], wanted: int, where: str, untagged: str = "reject"
) -> tuple[list[ScoredRollout], list[Row]]:
    """Return the scored rollouts of a ledger's rows, and rows to show; of a rollout written twice the last row counts.

    Args:
        rows: in any order.
        wanted: number of rollouts that must be there.
        where: the file, for messages.
        untagged: `evaluation.untagged`.

    Raises:
        UserError: rows are missing, or are not rows of a ledger.
    """
    rollouts: dict[tuple[int, int], ScoredRollout] = {}
    shown: dict[tuple[str, bool], dict[int, Row]] = {}
    for row in rows:
        try:
            number = int(row["number"])
            rollout = ScoredRollout.from_row(row, number, untagged)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{where}: a row is not a logged answer ({error!r}); set runner.overwrite=True") from error
        rollouts[number, rollout.rollout_id] = rollout
        if rollout.rollout_id == 0:
            right = rollout.exact_match > 0
            kept = shown.setdefault((canonical(row["data_source"]), right), {})
            kept[number] = row | {"answer": rollout.answer}
            if len(kept) > (RIGHT_SHOWN if right else WRONG_SHOWN):
                del kept[max(kept)]
    if len(rollouts) != wanted:
        raise UserError(f"{where}: {len(rollouts)} rollouts are there, {wanted} were asked for; start the evaluation again")
    examples = [kept[number] for _, kept in sorted(shown.items()) for number in sorted(kept)]
    return [rollouts[key] for key in sorted(rollouts)], examples


def method_result(
    rows: Iterable[Row], wanted: int, where: str, how: str, seed: int, untagged: str = "reject"
) -> MethodResult:
    """Return scores, intervals and examples of a ledger's rows; see `score_rows`."""
    rollouts, examples = score_rows(rows, wanted, where, untagged)
    return MethodResult(summarise(rollouts, seed, RESAMPLES, untagged), examples, how)
