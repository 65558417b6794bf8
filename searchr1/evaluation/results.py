"""What an evaluation leaves in its folder: results.json, eval.json, results.md and results.html."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from searchr1.errors import UserError
from searchr1.evaluation.attempts import Attempt
from searchr1.evaluation.methods import main_method
from searchr1.evaluation.published import LABELS, Published, canonical, nearest
from searchr1.evaluation.summary import CONFIDENCE, RESAMPLES, Summary, flat_metrics, summarise
from searchr1.evaluation.tables import Table, comparison, markdown, method_table, plain
from searchr1.files.atomic import write_text

WRONG_SHOWN, RIGHT_SHOWN = 4, 2
"""Examples kept per set and method."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class MethodResult:
    """One method's numbers, and some of its answers to read."""

    summary: Summary
    examples: list[Row]
    how: str
    """How attempts were drawn."""


@dataclass(frozen=True, slots=True)
class Results:
    """An evaluation of one model."""

    model: str
    billions: float | None
    methods: dict[str, MethodResult]
    settings: dict[str, str] = field(default_factory=dict)
    """What a reader should know of the run."""

    @property
    def summaries(self) -> dict[str, Summary]:
        """By method."""
        return {name: one.summary for name, one in self.methods.items()}

    @property
    def main(self) -> Summary:
        """The method that `eval.json` is about."""
        return self.summaries[main_method(list(self.methods))]

    @property
    def published(self) -> list[Published]:
        """Rows to compare with: none if no set of the papers was evaluated."""
        known = any(one.name in LABELS for summary in self.summaries.values() for one in summary.sets)
        return nearest(self.billions) if known else []

    def tables(self, narrow: bool = False) -> list[Table]:
        """The comparison (where there is something to compare), then a table per method."""
        tables = [method_table(name, one.summary, narrow) for name, one in self.methods.items()]
        if len(self.methods) > 1 or self.published:
            tables.insert(0, comparison(Path(self.model).name or self.model, self.summaries, self.published))
        return tables

    def text(self) -> str:
        """For a terminal: narrower, and what holds for every method is said once."""
        tables = self.tables(narrow=True)
        last = tables[-1].note
        told = [dataclasses.replace(table, note="") if table.note == last else table for table in tables]
        return "\n\n".join([*map(plain, told), last])

    def json(self) -> dict[str, Any]:
        """Everything, structured."""
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


def score_rows(rows: Iterable[Row], wanted: int, where: str, untagged: str = "reject") -> tuple[list[Attempt], list[Row]]:
    """Attempts, and rows to show, of the rows of a ledger; of an attempt that was written twice the last one counts.

    Args:
        rows: in any order.
        wanted: how many attempts there must be.
        where: the file, for messages.
        untagged: `evaluation.untagged`.

    Raises:
        UserError: rows are missing or are none of ours.
    """
    found: dict[tuple[int, int], Attempt] = {}
    shown: dict[tuple[str, bool], dict[int, Row]] = {}
    for row in rows:
        try:
            number = int(row["number"])
            attempt = Attempt.from_row(row, number, untagged)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{where}: a row is not a logged answer ({error!r}); set runner.overwrite=True") from error
        found[number, attempt.rollout_id] = attempt
        if attempt.rollout_id == 0:
            right = attempt.exact_match > 0
            kept = shown.setdefault((canonical(row["data_source"]), right), {})
            kept[number] = row | {"answer": attempt.answer}
            if len(kept) > (RIGHT_SHOWN if right else WRONG_SHOWN):
                del kept[max(kept)]
    if len(found) != wanted:
        raise UserError(f"{where}: {len(found)} attempts are there, {wanted} were asked for; start the evaluation again")
    examples = [kept[number] for _, kept in sorted(shown.items()) for number in sorted(kept)]
    return [found[key] for key in sorted(found)], examples


def method_result(
    rows: Iterable[Row], wanted: int, where: str, how: str, seed: int, untagged: str = "reject"
) -> MethodResult:
    """Scores, intervals and examples of a ledger's rows; see `score_rows`."""
    attempts, examples = score_rows(rows, wanted, where, untagged)
    return MethodResult(summarise(attempts, seed, RESAMPLES, untagged), examples, how)


def write_results(folder: Path, results: Results) -> dict[str, float]:
    """Write all four files. Returns what `eval.json` holds."""
    from searchr1.evaluation.page import page

    metrics = flat_metrics(results.main)
    write_text(folder / "results.json", _json(results.json()))
    write_text(folder / "results.md", _document(results))
    write_text(folder / "results.html", page(results))
    write_text(folder / "eval.json", _json(metrics))
    return metrics


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _document(results: Results) -> str:
    settings = markdown(Table("Settings", ["", ""], [[name, value] for name, value in results.settings.items()]))
    return "\n".join([f"# Evaluation of {Path(results.model).name}", "", *map(markdown, results.tables()), settings])
