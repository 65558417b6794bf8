"""Question files -> samples, as a run's YAML names them. Every row is checked; a bad one is named by file and line."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from searchr1.agent.trajectory import Sample
from searchr1.config.schema import Config
from searchr1.data import model_source
from searchr1.data.golds import column_names, is_missing, no_gold, object_in, read_golds, shown
from searchr1.data.model_settings import template_text
from searchr1.data.paths import EVALUATION, TRAIN, find_files, source_names
from searchr1.data.prompts import has_chat_template, render_prompt, wants_passages
from searchr1.data.questions import bare_question, question_column, question_of_prompt, read_prompt, require_unicode
from searchr1.data.reading import Events, read_rows
from searchr1.errors import UserError
from searchr1.rewards.registry import require_known

Row = dict[str, Any]
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
    warnings: list[str] = field(default_factory=list)
    """What was read, but perhaps not as meant: a sentence for each kind, with a count and the first row."""


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
    splits: Sequence[str] = TRAIN,
    prompts: bool = True,
) -> LoadedData:
    """Read files in RLinf's, Search-R1's, verl's, SkyRL's, FlashRAG's and the like row shapes.

    Args:
        paths: files (see `reading`) or data sets of the hub (see `paths`), read one after the other.
        tokenizer: of the model; its chat template renders prompts that are chat messages.
        max_prompt_length: tokens.
        prompt_key: column of the prompt: a text or chat messages.
        answer_key: column of the gold answers; where a row has none, the usual names are tried (see `golds`).
        template: see `searchr1.data.prompts`.
        filter_by_length: leave longer prompts out and count them; otherwise one is an error.
        data_size: read only the first so many rows of all files together; None or a negative number reads all.
        apply_chat_template: treat a plain prompt as a user message.
        splits: what a hub id without a split means.
        prompts: the prompts are used; otherwise only the questions are, and nothing is reported of prompts.

    Raises:
        UserError: a missing, unreadable or empty file; invalid JSON; a row without prompt or answer, or with an unknown
            reward; (without `filter_by_length`) a prompt that is too long; no row left.
    """
    if not paths:
        raise UserError("no data file is named; give data.train_data_paths or data.val_data_paths")
    limit = data_size if data_size is not None and data_size >= 0 else None
    columns = _Columns(prompt_key, answer_key, template, apply_chat_template, prompts)
    events = Events()
    texts: list[str] = []
    samples: list[Sample] = []
    files = find_files(paths, splits)
    for file, name in zip(files, source_names(files), strict=True):
        for line, row in read_rows(file.path):
            if limit is not None and len(samples) >= limit:
                break
            try:
                text, sample, notes = _sample(row, line, name, tokenizer, columns)
            except UserError as error:
                raise UserError(f"{file.path}:{line}: {error}") from error
            for note in notes:
                events.add(note, f"{file.path}:{line}")
            texts.append(text)
            samples.append(sample)
    samples = _with_own_ids(samples, events)
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
    return LoadedData(kept, LoadStats(len(samples), len(kept), len(samples) - len(kept)), events.sentences())


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where a row's parts are, and how its prompt is made."""

    prompt_key: str
    answer_key: str
    template: str | None
    chat: bool
    prompts: bool


def _sample(row: Row, line: int, file_name: str, tokenizer: Any, columns: _Columns) -> tuple[str, Sample, list[str]]:
    """Return the prompt's text, the sample, still without token ids, and what a user should see of the row."""
    prompt = read_prompt(row.get(columns.prompt_key), columns.prompt_key)
    question = question_column(row)
    passages = row.get("passages") if wants_passages(columns.template) else None
    if passages is not None and not isinstance(passages, str):
        raise UserError(f"the row's passages are a {type(passages).__name__}; expected one text")
    if prompt is None and question is None:
        raise UserError(
            f"the row has no prompt and no question; its columns are {column_names(row)}; name the prompt's in "
            "data.prompt_key"
        )
    text = render_prompt(prompt, question, tokenizer, columns.template, columns.chat, passages)
    golds = read_golds(row, columns.answer_key)
    if golds is None:
        advice = f"give a text or a list of texts under {columns.answer_key!r}, or name their column in data.answer_key"
        raise no_gold(row, columns.answer_key, advice)
    notes = golds.notes()
    templated = template_text(columns.template) is not None
    if columns.prompts and isinstance(prompt, list) and not (templated and question is not None):
        if templated:
            notes.append(
                f"have chat messages and no question; data.prompt_template: {columns.template} is not used for them"
            )
        if not has_chat_template(tokenizer):
            notes.append("have chat messages, but the tokenizer has no chat template; their text alone is the prompt")
    source = _text_of(row, "data_source") or file_name
    reward = _text_of(row, "reward_model") if not isinstance(object_in(row.get("reward_model")), dict) else None
    if reward is not None:
        require_known(reward)  # An unknown one must not wait for the first step to be found.
    number = _number(row)
    sample = Sample(
        id=f"{source}/{line - 1 if number is None else number}",
        index=0,
        prompt_ids=[],
        question=question or question_of_prompt(prompt) or bare_question(text),
        golden_answers=[gold.strip() for gold in golds.texts],
        data_source=source,
        reward_name=reward,
    )
    for part in (text, sample.id, sample.question, *sample.golden_answers):
        require_unicode(part)
    return text, sample, notes


def _text_of(row: Row, column: str) -> str | None:
    value = row.get(column)
    if is_missing(value):
        return None
    if not isinstance(value, str):
        raise UserError(f"{column}: is {shown(value)}; expected a text")
    return value


def _number(row: Row) -> object:
    """Return what identifies the row within its source; None if that is its line."""
    extra = object_in(row.get("extra_info"))
    for column, value in (
        ("extra_info.index", extra.get("index") if isinstance(extra, dict) else None),
        ("id", row.get("id")),
    ):
        if is_missing(value):
            continue
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UserError(f"{column}: is {shown(value)}; expected a text or a number")
        return value
    return None


def _with_own_ids(samples: list[Sample], events: Events) -> list[Sample]:
    """Give a sample with the id of an earlier one a number behind it: `nq/7#2`."""
    seen: Counter[str] = Counter(sample.id for sample in samples)
    if len(seen) == len(samples):
        return samples
    taken: set[str] = set()
    counts: Counter[str] = Counter()
    unique = []
    for sample in samples:
        name = sample.id
        while name in taken or (name != sample.id and name in seen):
            counts[sample.id] += 1
            name = f"{sample.id}#{counts[sample.id] + 1}"
        if name != sample.id:
            events.add("have the id of an earlier row; each gets a number behind it", f"{sample.id}, now {name}")
            sample = replace(sample, id=name)
        taken.add(name)
        unique.append(sample)
    return unique


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


logger = logging.getLogger(__name__)


@dataclass(slots=True)
class RunData:
    """Tokenized questions."""

    train: list[Sample]
    val: list[Sample]
    val_stats: LoadStats | None = None
    """What loading `val` left out; None if there was nothing to load."""


def load_tokenizer(config: Config) -> Any:
    """Return the model's tokenizer.

    Raises:
        UserError: the model's folder has none.
    """
    return model_source.load_tokenizer(config.rollout.model.model_path, "rollout.model.model_path")


def load_data(config: Config, training: bool = True, prompts: bool = True) -> RunData:
    """Read, render and tokenize the questions; an evaluation reads `data.val_data_paths` only.

    Args:
        config: of the run.
        training: read the training questions too.
        prompts: the rows' prompts are used, not only their questions.
    """
    tokenizer = load_tokenizer(config)
    data = config.data
    parts: dict[str, list[Sample]] = {"train": [], "val": []}
    stats: LoadStats | None = None
    for part, paths in (("train", data.train_data_paths), ("val", data.val_data_paths)):
        if not paths or (part == "train" and not training):
            continue
        loaded = load_dataset_files(
            paths,
            tokenizer=tokenizer,
            max_prompt_length=data.max_prompt_length,
            prompt_key=data.prompt_key,
            answer_key=data.answer_key,
            template=data.prompt_template,
            filter_by_length=data.filter_prompt_by_length,
            data_size=data.data_size,
            apply_chat_template=data.apply_chat_template,
            splits=TRAIN if part == "train" else EVALUATION,
            prompts=prompts,
        )
        for warning in loaded.warnings:
            logger.warning("data.%s_data_paths: %s", part, warning)
        logger.info("%s questions: %s", part, loaded.stats)
        parts[part], stats = loaded.samples, loaded.stats
    return RunData(parts["train"], parts["val"], stats if data.val_data_paths else None)
