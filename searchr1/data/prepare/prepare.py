"""From files of questions to files of prompts: read, check, compare, draw, fill in, write."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from searchr1.data.prepare.passages import search_passages
from searchr1.data.prepare.rows import Question, arrow_schema, check_row, make_row
from searchr1.data.prepare.sources import Source
from searchr1.data.prepare.stats import (
    Overlap,
    SetStats,
    as_json,
    describe,
    find_overlap,
    question_key,
    split_duplicates,
    start_stats,
)
from searchr1.data.prompts import wants_passages
from searchr1.data.reading import Events, read_records, read_rows
from searchr1.errors import UserError
from searchr1.files.atomic import atomic_file
from searchr1.progress import ProgressBar

BATCH_ROWS = 4096


@contextmanager
def _output(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which takes the place of `path` when the block ends well.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            yield partial
    except OSError as error:
        raise UserError(f"--out {path.parent}: cannot write {path.name} ({error.strerror or error})") from error


def write_rows(path: Path, rows: Iterable[dict[str, Any]], schema: Any) -> None:
    """Write rows as JSON lines or parquet, by the suffix of `path`."""
    with _output(path) as partial:
        if path.suffix == ".parquet":
            _write_parquet(partial, rows, schema)
            return
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]], schema: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, schema) as writer:
        batch: list[dict[str, Any]] = []
        for row in rows:
            batch.append(row)
            if len(batch) == BATCH_ROWS:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch = []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, schema))


def write_json(path: Path, value: Any) -> None:
    """Write one JSON object, indented."""
    with _output(path) as partial:
        partial.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


SHOWN_PROBLEMS = 20
NOTES = ".passages.partial.jsonl"
UNREAD = ("metadata", "context", "paragraphs")
"""Columns that may be most of a parquet file, and that nothing here reads."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What to make of the files."""

    out: Path
    shape: str = "searchr1"
    formats: tuple[str, ...] = ("parquet",)
    template: str | None = "searchr1"
    limit: int | None = None
    seed: int | None = None
    dedup: bool = False
    drop_overlap: bool = False
    against: tuple[Path, ...] = ()
    skip_bad: bool = False
    question_mark: bool = True
    messages: bool = False
    tokenizer: Any = None
    search: tuple[str, ...] = ()
    topk: int = 3


@dataclass(slots=True)
class Outcome:
    """What was done."""

    stats: list[SetStats] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def prepare(sources: dict[str, list[Source]], settings: Settings) -> Outcome:
    """Prepare every split; nothing is written before all rows are checked.

    Raises:
        UserError: bad rows (all of them, the first `SHOWN_PROBLEMS` named), unless they may be skipped; no row left; the
            search or the disk failed.
    """
    outcome = Outcome()
    read = _read_all(sources, settings, outcome)
    splits: dict[str, list[Question]] = {}
    for split, questions in read.items():
        splits[split] = _without_duplicates(split, questions, settings, outcome)
    _compare(splits, settings, outcome)
    for split, questions in splits.items():
        splits[split] = _draw(questions, settings)
        if not splits[split]:
            raise UserError(f"--split {split}: no row is left; leave out --drop-overlap or --skip-bad, or give other files")
    rewards = sum(question.reward is not None for questions in splits.values() for question in questions)
    if rewards and settings.shape == "searchr1":
        outcome.warnings.append(
            f"{rewards:,} rows name a reward of their own, for which searchr1 rows have no place; use --rows plain or rlinf"
        )
    passages = _passages([question for questions in splits.values() for question in questions], settings)
    for split, questions in splits.items():
        by_set = {stats.set_name: stats for stats in outcome.stats if stats.split == split}
        for name, stats in by_set.items():
            describe(stats, [question for question in questions if question.set_name == name])
        outcome.files += _write(split, questions, passages, settings)
    _write_stats(settings.out / "stats.json", as_json(outcome.stats), splits)
    (settings.out / NOTES).unlink(missing_ok=True)
    return outcome


def _read_all(sources: dict[str, list[Source]], settings: Settings, outcome: Outcome) -> dict[str, list[Question]]:
    """Read and check every file, before any complaint: so that all bad rows are named at once."""
    problems: list[str] = []
    events = Events()
    read: dict[str, list[Question]] = {}
    for split, files in sources.items():
        read[split] = []
        for source in files:
            stats = start_stats(source)
            outcome.stats.append(stats)
            with _bar(f"{split} {source.set_name}") as bar:
                for item in _check_file(source, stats, settings, bar.update):
                    if isinstance(item, Question):
                        read[split].append(item)
                        for note in item.notes:
                            events.add(note, f"{item.set_name}/{item.id} of {source.path}")
                    else:
                        problems.append(item)
            if not stats.read:
                raise UserError(f"{source.path}: the file has no rows")
            if source.published_rows not in (None, stats.read):
                outcome.warnings.append(
                    f"{source.origin} has {stats.read:,} rows; as published it has {source.published_rows:,}"
                )
    if problems and not settings.skip_bad:
        shown = "\n  ".join(problems[:SHOWN_PROBLEMS])
        more = f"\n  and {len(problems) - SHOWN_PROBLEMS:,} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise UserError(
            f"{len(problems):,} bad rows:\n  {shown}{more}\nRepair them, or leave them out with --skip-bad; nothing was "
            "written"
        )
    outcome.warnings += events.sentences()
    if problems:
        outcome.warnings.append(f"{len(problems):,} bad rows left out, the first: {problems[0]}")
    return read


def _check_file(
    source: Source, stats: SetStats, settings: Settings, update: Callable[[float], object]
) -> Iterator[Question | str]:
    """Yield each row as a question, or what is wrong with it."""
    lines: dict[str, int] = {}
    for index, record in enumerate(read_records(source.path, update, UNREAD)):
        stats.read += 1
        try:
            if record.row is None:
                raise UserError(record.problem)
            default = f"{source.split}_{index}"
            question = check_row(record.row, source.set_name, index, default, settings.question_mark)
            before = lines.setdefault(question.id, record.line)
            if before != record.line:
                raise UserError(f"the id {question.id!r} is that of line {before} too")
            yield question
        except UserError as error:
            stats.bad += 1
            yield f"{source.path}:{record.line}: {error}"


def _without_duplicates(split: str, questions: list[Question], settings: Settings, outcome: Outcome) -> list[Question]:
    first, repeated = split_duplicates(questions)
    by_set = {stats.set_name: stats for stats in outcome.stats if stats.split == split}
    for question, _ in repeated:
        by_set[question.set_name].duplicates += 1
    if not repeated:
        return questions
    again, before = repeated[0]
    differ = sum(set(question.answers) != set(known.answers) for question, known in repeated)
    what = "left out" if settings.dedup else "kept; --dedup leaves them out"
    outcome.warnings.append(
        f"{split}: {len(repeated):,} questions are asked before, {differ:,} of them with other gold answers ({what}). The "
        f"first: {again.set_name}/{again.id} repeats {before.set_name}/{before.id}, {again.text!r}"
    )
    return first if settings.dedup else questions


def _compare(splits: dict[str, list[Question]], settings: Settings, outcome: Outcome) -> None:
    """Look for training questions in what is evaluated: of this run, of earlier runs beside it, and of --against."""
    train = splits.get("train")
    if train is None:
        _compare_with_earlier_training(splits, settings, outcome)
        return
    asked = [
        (question.set_name, f"{question.set_name}/{question.id}", question.text)
        for split, questions in splits.items()
        if split != "train"
        for question in questions
    ]
    for path in (
        *_earlier_files(settings.out, [split for split in ("test", "dev") if split not in splits]),
        *settings.against,
    ):
        asked += _rows_of(path)
    overlap = find_overlap(train, asked)
    by_set = {stats.set_name: stats for stats in outcome.stats if stats.split == "train"}
    for question in overlap.questions:
        by_set[question.set_name].overlap += 1
    if not overlap.questions:
        return
    outcome.warnings.append(_tell_overlap(overlap, settings.drop_overlap))
    if settings.drop_overlap:
        dropped = {question_key(question.text) for question in overlap.questions}
        splits["train"] = [question for question in train if question_key(question.text) not in dropped]


def _tell_overlap(overlap: Overlap, dropped: bool) -> str:
    pairs = ", ".join(f"{ours} in {theirs} {count:,}" for (ours, theirs), count in overlap.pairs.most_common(5))
    ours, theirs, text = overlap.examples[0]
    what = "left out of train" if dropped else "kept; --drop-overlap leaves them out of train"
    return (
        f"{len(overlap.questions):,} training questions are asked in evaluation too ({pairs}); {what}. For example "
        f"{ours} is {theirs}, {text!r}"
    )


def _compare_with_earlier_training(splits: dict[str, list[Question]], settings: Settings, outcome: Outcome) -> None:
    """Warn where evaluation questions are in training files that an earlier run wrote, which are not changed any more."""
    asked = [row for path in (*_earlier_files(settings.out, ["train"]), *settings.against) for row in _rows_of(path)]
    for split, questions in splits.items():
        overlap = find_overlap(questions, asked)
        if overlap.questions:
            ours, theirs, text = overlap.examples[0]
            outcome.warnings.append(
                f"{len(overlap.questions):,} {split} questions are trained on too; to leave them out of train, prepare it "
                f"again with --drop-overlap. For example {ours} is {theirs}, {text!r}"
            )


def _earlier_files(out: Path, splits: Sequence[str]) -> list[Path]:
    found = []
    for split in splits:
        candidates = [out / f"{split}.{kind}" for kind in ("parquet", "jsonl")]
        found += [path for path in candidates if path.is_file()][:1]
    return found


def _rows_of(path: Path) -> list[tuple[str, str, str]]:
    found = []
    for line, row in read_rows(path):
        try:
            question = check_row(row, str(row.get("data_source") or path.stem), line - 1, str(line - 1), False)
        except UserError as error:
            raise UserError(f"{path}:{line}: {error}") from error
        found.append((question.set_name, f"{question.set_name}/{question.id}", question.text))
    return found


def _draw(questions: list[Question], settings: Settings) -> list[Question]:
    """Return at most `limit` of each set, and the order: the files', or one drawn from the seed."""
    if settings.seed is not None:
        questions = list(questions)
        random.Random(settings.seed).shuffle(questions)
    if settings.limit is None:
        return questions
    kept: dict[str, int] = {}
    drawn = []
    for question in questions:
        kept[question.set_name] = kept.get(question.set_name, 0) + 1
        if kept[question.set_name] <= settings.limit:
            drawn.append(question)
    return drawn


def _passages(questions: list[Question], settings: Settings) -> dict[str, str]:
    """Return what the search found, by question; empty where the rows bring their own passages or need none."""
    if settings.search:
        with _bar("searching") as bar:
            return search_passages(
                [question.text for question in questions], settings.search, settings.topk, settings.out / NOTES, bar.update
            )
    without = next((question for question in questions if question.passages is None), None)
    if wants_passages(settings.template) and without is not None:
        raise UserError(
            f"--template {settings.template}: shows passages, but {without.set_name}/{without.id} has none; name a "
            "retrieval server with --search HOST:PORT, or give rows with the key passages"
        )
    return {}


def _write(split: str, questions: list[Question], passages: dict[str, str], settings: Settings) -> list[Path]:
    files = []
    brought = any(question.passages is not None for question in questions)
    schema = arrow_schema(
        settings.shape,
        passages=bool(passages) or brought,
        messages=settings.messages,
        own_reward=any(question.reward is not None for question in questions),
    )
    for kind in settings.formats:
        path = settings.out / f"{split}.{kind}"
        rows = (
            make_row(
                question, settings.shape, split, settings.template,
                passages.get(question.text, question.passages),
                messages=settings.messages, tokenizer=settings.tokenizer,
            )
            for question in questions
        )  # fmt: skip
        with _bar(f"writing {path.name}") as bar:
            write_rows(path, _counted(rows, len(questions), bar.update), schema)
        files.append(path)
    return files


def _write_stats(path: Path, found: list[dict[str, Any]], splits: Collection[str]) -> None:
    """Keep the statistics of splits that an earlier run prepared in the same folder."""
    earlier: Any = None
    with suppress(OSError, ValueError):  # none, or not ours: it is replaced
        earlier = json.loads(path.read_text(encoding="utf-8"))
    entries = earlier.get("splits", []) if isinstance(earlier, dict) else []
    kept = [entry for entry in entries if isinstance(entry, dict) and entry.get("split") not in splits]
    write_json(path, {"splits": kept + found})


def _counted(rows: Iterator[dict[str, Any]], total: int, update: Callable[[float], object]) -> Iterator[dict[str, Any]]:
    for count, row in enumerate(rows, start=1):
        yield row
        if count % 1000 == 0:
            update(count / total)
    update(1.0)


def _bar(label: str) -> ProgressBar:
    return ProgressBar(label, 1, "%")
