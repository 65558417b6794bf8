"""The trajectory files of a run, and what lists, filters and summaries need of each row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from searchr1.errors import UserError
from searchr1.tracking.json_lines import finite_number, parse_json
from searchr1.tracking.loggers import METRICS_FILE
from searchr1.tracking.trajectory_log import eval_file, logged_steps, train_file

Row = dict[str, Any]
Mode = Literal["train", "eval"]
T = TypeVar("T")

COLUMNS = (
    "id", "replica", "source", "question", "golds", "answer", "reward", "right", "stop", "forced", "searches", "invalid",
    "failures", "length", "surprise",
)  # fmt: skip
"""The values of a `brief`, in this order."""


@dataclass(frozen=True, slots=True)
class LoggedFile:
    """The trajectories of one training step, or of the evaluation after it."""

    mode: Mode
    step: int
    path: Path


def logged_files(run: Path) -> list[LoggedFile]:
    """Return all files of a run: evaluations, then training steps, each by ascending step."""
    evals = [LoggedFile("eval", step, eval_file(run, step)) for step in logged_steps(run, "eval_step_")]
    return evals + [LoggedFile("train", step, train_file(run, step)) for step in logged_steps(run, "step_")]


def runs_in(folder: Path) -> list[Path]:
    """Return the folder itself if it holds a run, else those in it that do: an evaluation's methods, a demo's training.

    Raises:
        UserError: there is none.
    """
    if _holds_run(folder):
        return [folder]
    try:
        runs = sorted(inner for inner in folder.iterdir() if inner.is_dir() and _holds_run(inner))
    except OSError:
        runs = []
    if not runs:
        raise UserError(f"{folder}: no run there ({METRICS_FILE} is missing); give a run's folder")
    return runs


def _holds_run(folder: Path) -> bool:
    return (folder / METRICS_FILE).is_file() or bool(logged_files(folder))


def read_lines(path: Path) -> list[tuple[int, bytes]]:
    """Return the lines of a file that are not blank, with their numbers, without a last one that a kill cut short.

    Raises:
        UserError: not readable.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from error
    return [(number, line) for number, line in enumerate(content.split(b"\n")[:-1], start=1) if line.strip()]


def parse_row(path: Path, number: int, line: bytes) -> Row:
    """Return one line as a trajectory.

    Raises:
        UserError: the line is not a logged trajectory.
    """
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{path}:{number}: not valid JSON ({error}); remove the file or the line") from error
    if (
        not isinstance(row, dict)
        or not isinstance(row.get("turns"), list)
        or not all(isinstance(turn, dict) for turn in row["turns"])
    ):
        raise UserError(f"{path}:{number}: not a logged trajectory; remove the file or the line")
    return row


def read_rows(path: Path) -> Iterator[Row]:
    """Yield all trajectories of a file.

    Raises:
        UserError: a line is not a logged trajectory.
    """
    for number, line in read_lines(path):
        yield parse_row(path, number, line)


def brief(row: Row) -> list[Any]:
    """Return a row's `COLUMNS`. Right is an exact match, or a reward above 0 where the reward has no exact match."""
    turns = row["turns"]
    parts = row.get("reward_parts")
    match = parts.get("exact_match", row.get("reward")) if isinstance(parts, dict) else row.get("reward")
    values = [finite_number(value) for turn in turns for value in _list(turn.get("token_surprise"))]
    surprises = [value for value in values if value is not None]
    return [
        _text(row.get("id")),
        _whole(row.get("replica")),
        _text(row.get("data_source")),
        _text(row.get("question")),
        [_text(gold) for gold in _list(row.get("golden_answers"))],
        None if row.get("answer") is None else _text(row["answer"]),
        finite_number(row.get("reward")),
        (finite_number(match) or 0.0) > 0,
        _text(row.get("stop")),
        bool(row.get("forced_final")),
        _whole(row.get("searches")),
        sum(turn.get("action") == "invalid" for turn in turns),
        sum(turn.get("tool_error") is not None for turn in turns),
        _whole(row.get("response_length")),
        round(math.fsum(value / len(surprises) for value in surprises)) if surprises else None,
    ]


def evenly(items: Sequence[T], count: int) -> list[T]:
    """Return at most `count` of `items`, evenly spread."""
    return list(items) if len(items) <= count else [items[i * len(items) // count] for i in range(count)]


def evenly_by_group(items: Sequence[T], count: int, group_of: Callable[[T], object]) -> list[T]:
    """Return at most `count` of `items`, as whole groups that are evenly spread; single items if not one group fits."""
    if len(items) <= count:
        return list(items)
    groups: dict[object, list[T]] = {}
    for item in items:
        groups.setdefault(group_of(item), []).append(item)
    largest = max(len(group) for group in groups.values())
    if largest > count:
        return evenly(items, count)
    return [item for group in evenly(list(groups.values()), count // largest) for item in group]


def shares(totals: Sequence[int], budget: int) -> list[int]:
    """Return how many rows of each file are shown: all if they fit, else equally many of each and all of smaller files."""
    left, given = budget, [0] * len(totals)
    order = sorted(range(len(totals)), key=lambda i: totals[i])
    for rank, i in enumerate(order):
        given[i] = min(totals[i], left // (len(totals) - rank))
        left -= given[i]
    return given


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _whole(value: object) -> int:
    return int(finite_number(value) or 0)
