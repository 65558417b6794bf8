"""Question files -> samples. Every row is checked; a bad one is named by file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchr1.agent.trajectory import Sample
from searchr1.data.prompts import render_prompt
from searchr1.errors import UserError

Row = dict[str, Any]
ANSWER_KEYS = ("solutions", "golden_answers", "answers", "answer", "target")
QUESTION_KEYS = ("question", "query")
TOKENIZE_ROWS = 4096


@dataclass(frozen=True, slots=True)
class LoadStats:
    """What loading did."""

    rows: int
    kept: int
    too_long: int
    """Prompts longer than `max_prompt_length`, left out."""

    def __str__(self) -> str:
        dropped = f", {self.too_long} left out for their prompt's length" if self.too_long else ""
        return f"{self.kept} of {self.rows} rows{dropped}"


@dataclass(frozen=True, slots=True)
class LoadedData:
    """Samples of all files, in order."""

    samples: list[Sample]
    stats: LoadStats


def load_dataset_files(
    paths: Sequence[str | Path],
    *,
    tokenizer: Any,
    max_prompt_length: int,
    prompt_key: str = "prompt",
    answer_key: str = "solutions",
    template: str | None = None,
    filter_by_length: bool = True,
    data_size: int | None = None,
    apply_chat_template: bool = False,
) -> LoadedData:
    """Read jsonl and parquet files in RLinf's, Search-R1's and FlashRAG's row shapes.

    Raises:
        UserError: a missing or empty file, invalid JSON, a row without prompt or answer, or (without
            `filter_by_length`) a prompt that is too long.
    """
    limit = data_size if data_size is not None and data_size >= 0 else None
    texts: list[str] = []
    samples: list[Sample] = []
    for path in map(Path, paths):
        for line, row in read_rows(path):
            if limit is not None and len(samples) >= limit:
                break
            try:
                text, sample = _sample(row, line, path, tokenizer, prompt_key, answer_key, template, apply_chat_template)
            except UserError as error:
                raise UserError(f"{path}:{line}: {error}") from error
            texts.append(text)
            samples.append(sample)
    for start in range(0, len(texts), TOKENIZE_ROWS):
        encoded = tokenizer(texts[start : start + TOKENIZE_ROWS], add_special_tokens=False)["input_ids"]
        for sample, ids in zip(samples[start : start + TOKENIZE_ROWS], encoded, strict=True):
            sample.prompt_ids = ids
    kept = [sample for sample in samples if len(sample.prompt_ids) <= max_prompt_length]
    if len(kept) < len(samples) and not filter_by_length:
        worst = max(samples, key=lambda sample: len(sample.prompt_ids))
        raise UserError(
            f"data.max_prompt_length: {len(samples) - len(kept)} prompts are longer than {max_prompt_length} tokens "
            f"(the longest, {worst.id}, has {len(worst.prompt_ids)}); raise it or set data.filter_prompt_by_length=True"
        )
    if not kept:
        raise UserError(
            f"{', '.join(map(str, paths))}: no row is left; all {len(samples)} prompts are longer than "
            f"data.max_prompt_length = {max_prompt_length}"
        )
    return LoadedData(kept, LoadStats(len(samples), len(kept), len(samples) - len(kept)))


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Line (or row) numbers from 1, and rows.

    Raises:
        UserError: missing, empty or unreadable file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    count = 0
    for line, row in _parquet(path) if path.suffix == ".parquet" else _jsonl(path):
        count += 1
        yield line, row
    if not count:
        raise UserError(f"{path}: the file has no rows")


def _jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise UserError(f"{path}:{line}: not valid JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{line}: expected an object with keys, found {type(row).__name__}")
            yield line, row


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        line = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                line += 1
                yield line, row
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as parquet ({error})") from error


def _sample(
    row: Row, line: int, path: Path, tokenizer: Any, prompt_key: str, answer_key: str, template: str | None, chat: bool
) -> tuple[str, Sample]:
    """The prompt's text and the sample, still without token ids."""
    prompt = row.get(prompt_key)
    question = next((row[key] for key in QUESTION_KEYS if isinstance(row.get(key), str)), None)
    text = render_prompt(prompt, question, tokenizer, template, chat)
    source = row.get("data_source")
    source = source if isinstance(source, str) and source else path.stem
    extra = row.get("extra_info")
    number = extra.get("index") if isinstance(extra, dict) else row.get("id")
    reward = row.get("reward_model")
    sample = Sample(
        id=f"{source}/{line - 1 if number is None else number}",
        index=0,
        prompt_ids=[],
        question=question or _question_of(prompt, text),
        golden_answers=_answers(row, answer_key),
        data_source=source,
        reward_name=reward if isinstance(reward, str) and reward else None,
    )
    return text, sample


def _question_of(prompt: object, text: str) -> str:
    """For logs: the user's last message, or what follows the last "Question:"."""
    if isinstance(prompt, list) and prompt:
        text = str(prompt[-1].get("content", text))
    return text.rpartition("Question:")[2].strip()


def _answers(row: Row, answer_key: str) -> list[str]:
    reward = row.get("reward_model")
    truth = reward.get("ground_truth") if isinstance(reward, dict) else None
    candidates = [row.get(answer_key), truth, *(row.get(key) for key in ANSWER_KEYS)]
    for value in candidates:
        if isinstance(value, dict):
            value = value.get("target")
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            value = [value]
        if isinstance(value, list):
            answers = [str(answer) for answer in value if str(answer).strip()]
            if answers:
                return answers
    raise UserError(f"the row has no answer; give a text or a list of texts under {answer_key!r}")
