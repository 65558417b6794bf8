"""Question files -> samples. Every row is checked; a bad one is named by file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchr1.agent.trajectory import Sample
from searchr1.data.prompts import render_prompt, wants_passages
from searchr1.errors import UserError
from searchr1.rewards.registry import require_known

Row = dict[str, Any]
ANSWER_KEYS = ("solutions", "golden_answers", "answers", "answer", "target")
QUESTION_KEYS = ("question", "query")
TOKENIZE_ROWS = 4096
"""Rows handed to the tokenizer at once; it spreads them over the cores."""


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

    Args:
        paths: files, read one after the other.
        tokenizer: of the model; its chat template renders prompts that are chat messages.
        max_prompt_length: tokens.
        prompt_key: column of the prompt: a text or chat messages.
        answer_key: column of the gold answers; where a row has none, the usual names (`ANSWER_KEYS`) are tried.
        template: see `searchr1.data.prompts`.
        filter_by_length: leave longer prompts out and count them; otherwise one is an error.
        data_size: read only the first so many rows of all files together; None or a negative number reads all.
        apply_chat_template: treat a plain prompt as a user message.

    Raises:
        UserError: a missing, unreadable or empty file; invalid JSON; a row without prompt or answer, or with an unknown
            reward; (without `filter_by_length`) a prompt that is too long; no row left.
    """
    if not paths:
        raise UserError("no data file is named; give data.train_data_paths or data.val_data_paths")
    limit = data_size if data_size is not None and data_size >= 0 else None
    columns = _Columns(prompt_key, answer_key, template, apply_chat_template)
    texts: list[str] = []
    samples: list[Sample] = []
    for path in map(Path, paths):
        for line, row in read_rows(path):
            if limit is not None and len(samples) >= limit:
                break
            try:
                text, sample = _sample(row, line, path, tokenizer, columns)
            except UserError as error:
                raise UserError(f"{path}:{line}: {error}") from error
            texts.append(text)
            samples.append(sample)
    _tokenize(samples, texts, tokenizer)
    kept = [sample for sample in samples if len(sample.prompt_ids) <= max_prompt_length]
    if len(kept) < len(samples) and not filter_by_length:
        worst = max(samples, key=lambda sample: len(sample.prompt_ids))
        raise UserError(
            f"data.max_prompt_length: {len(samples) - len(kept)} prompts are longer than {max_prompt_length} tokens "
            f"(the longest, {worst.id}, has {len(worst.prompt_ids)}); raise it or set data.filter_prompt_by_length=True"
        )
    if not kept:
        names = ", ".join(map(str, paths))
        if not samples:
            raise UserError(f"data.data_size: {data_size} leaves no row of {names}")
        raise UserError(
            f"{names}: no row is left; all {len(samples)} prompts are longer than data.max_prompt_length = "
            f"{max_prompt_length} tokens; raise it"
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
    try:
        for line, row in _parquet(path) if path.suffix == ".parquet" else _jsonl(path):
            count += 1
            yield line, row
    except OSError as error:
        raise UserError(f"{path}: not readable ({error})") from error
    if not count:
        raise UserError(f"{path}: the file has no rows")


def _jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    # Bytes, and the text of one line at a time: so that a line that is not UTF-8 can be named.
    with path.open("rb") as file:
        for line, data in enumerate(file, start=1):
            if not data.strip():
                continue
            try:
                row = parse_line(data, first=line == 1)
            except UserError as error:
                raise UserError(f"{path}:{line}: {error}") from error
            yield line, row


def parse_line(data: bytes, first: bool = False) -> Row:
    """The object on one line of a jsonl file; `first`: a byte order mark may stand before it.

    Raises:
        UserError: not UTF-8, not JSON, or no object.
    """
    try:
        row = json.loads(data.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"expected an object with keys, found {type(row).__name__}")
    return row


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        line = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=TOKENIZE_ROWS):
                for row in batch.to_pylist():
                    line += 1
                    yield line, row
    except pa.ArrowException as error:
        raise UserError(f"{path}: not readable as parquet ({error})") from error


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where a row's parts are, and how its prompt is made."""

    prompt_key: str
    answer_key: str
    template: str | None
    chat: bool


def _sample(row: Row, line: int, path: Path, tokenizer: Any, columns: _Columns) -> tuple[str, Sample]:
    """The prompt's text and the sample, still without token ids."""
    prompt = row.get(columns.prompt_key)
    question = next((row[key] for key in QUESTION_KEYS if isinstance(row.get(key), str)), None)
    passages = row.get("passages") if wants_passages(columns.template) else None
    if passages is not None and not isinstance(passages, str):
        raise UserError(f"the row's passages are a {type(passages).__name__}; expected one text")
    text = render_prompt(prompt, question, tokenizer, columns.template, columns.chat, passages)
    source = row.get("data_source")
    source = source if isinstance(source, str) and source else path.stem
    extra = row.get("extra_info")
    number = extra.get("index") if isinstance(extra, dict) else None
    number = row.get("id") if number is None else number
    reward = row.get("reward_model")
    reward = reward if isinstance(reward, str) and reward else None
    if reward is not None:
        require_known(reward)  # An unknown one must not wait for the first step to be found.
    sample = Sample(
        id=f"{source}/{line - 1 if number is None else number}",
        index=0,
        prompt_ids=[],
        question=question or question_in(prompt, text),
        golden_answers=_answers(row, columns.answer_key),
        data_source=source,
        reward_name=reward,
    )
    for part in (text, sample.id, sample.question, *sample.golden_answers):
        require_unicode(part)
    return text, sample


def require_unicode(text: str) -> None:
    """Refuse half of a surrogate pair, which no tokenizer takes.

    Raises:
        UserError: the text has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"half of a surrogate pair at character {error.start} of {text[:40]!r}; repair it") from error


def question_in(prompt: object, text: str) -> str:
    """The question of a prompt: of its last message, or of `text`, what follows the last "Question:"."""
    if isinstance(prompt, list):
        text = prompt[-1]["content"]
    elif isinstance(prompt, str):
        text = prompt
    return text.rpartition("Question:")[2].strip()


def _answers(row: Row, answer_key: str) -> list[str]:
    """The first column that holds an answer, as texts."""
    reward = row.get("reward_model")
    truth = reward.get("ground_truth") if isinstance(reward, dict) else None
    for value in (row.get(answer_key), truth, *(row.get(key) for key in ANSWER_KEYS)):
        if isinstance(value, dict):
            value = value.get("target")
        values = value if isinstance(value, list) else [value]
        scalars = [item for item in values if isinstance(item, str | int | float)]
        answers = [str(item).strip() for item in scalars if str(item).strip()]
        if answers:
            return answers
    raise UserError(f"the row has no answer; give a text or a list of texts under {answer_key!r} (data.answer_key)")


def _tokenize(samples: list[Sample], texts: list[str], tokenizer: Any) -> None:
    """Fill in `prompt_ids`. No special tokens are added: a template that wants them writes them."""
    # One int object per distinct id: with a new one per token the 170k prompts of Search-R1 would hold 1 GB more.
    shared: dict[int, int] = {}
    for start in range(0, len(texts), TOKENIZE_ROWS):
        chunk = samples[start : start + TOKENIZE_ROWS]
        encoded = tokenizer(texts[start : start + TOKENIZE_ROWS], add_special_tokens=False)["input_ids"]
        for sample, ids in zip(chunk, encoded, strict=True):
            if not ids:
                raise UserError(
                    f"the prompt of {sample.id} has no tokens: {sample.question[:60]!r}; is the tokenizer the model's own?"
                )
            sample.prompt_ids = [shared.setdefault(token, token) for token in ids]
