"""Rows for supervised fine-tuning: four shapes, tokenized with a mask of what is trained on, and the prompts they show."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from searchr1.agent.trajectory import Sample, Trajectory
from searchr1.data.golds import column_names, object_in, shown
from searchr1.data.messages import Message, read_messages, require_rendered
from searchr1.data.model_settings import TEMPLATE, ModelSettings
from searchr1.data.paths import TRAIN, find_files, source_names
from searchr1.data.prompts import apply_template, fill_template, has_chat_template, render_prompt, wants_passages
from searchr1.data.questions import require_unicode
from searchr1.data.reading import read_rows
from searchr1.data.templates import TEMPLATES
from searchr1.errors import UserError
from searchr1.learner.packing import sequence_length

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Segment:
    """Text that is trained on, or only read."""

    text: str
    train: bool


def segments_of(row: Row, tokenizer: Any) -> list[Segment]:
    """Read a row in any of the shapes.

    Raises:
        UserError: none of them, several of them, or nothing to train on.
    """
    shapes = [shape for shape, columns in SHAPES.items() if all(row.get(column) is not None for column in columns)]
    if not shapes:
        raise UserError(
            f"expected messages (or conversations), prompt and response, or segments; the row's columns are "
            f"{column_names(row)}"
        )
    if len(shapes) > 1:
        raise UserError(f"the row has {' and '.join(shapes)}; keep the one that is meant")
    segments = READERS[shapes[0]](row, tokenizer)
    for segment in segments:
        require_unicode(segment.text)
    if not any(segment.train and segment.text for segment in segments):
        raise UserError("nothing to train on: no assistant message, empty response, or no segment with train: true")
    return [segment for segment in segments if segment.text]


def _text_segments(row: Row, tokenizer: Any) -> list[Segment]:
    for column in ("prompt", "response"):
        if not isinstance(row[column], str):
            raise UserError(f"{column}: is {shown(row[column])}; expected a text (chat messages belong into messages)")
    if not row["response"].strip():
        raise UserError("response: is empty; nothing to train on")
    return [Segment(row["prompt"], False), Segment(row["response"] + (tokenizer.eos_token or ""), True)]


def _marked_segments(row: Row, tokenizer: Any) -> list[Segment]:
    if not isinstance(row["segments"], list):
        raise UserError(f'segments: is {shown(row["segments"])}; expected a list of {{"text": "…", "train": true}}')
    segments = []
    for number, part in enumerate(row["segments"]):
        text, train = (part.get("text"), part.get("train")) if isinstance(part, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(train, bool):
            raise UserError(f'segments[{number}]: is {shown(part)}; expected {{"text": "…", "train": true or false}}')
        segments.append(Segment(text, train))
    return segments


def _chat_segments(row: Row, tokenizer: Any) -> list[Segment]:
    """Render the conversation, cut where an assistant's message begins and ends."""
    if not has_chat_template(tokenizer):
        raise UserError("the tokenizer has no chat template; use prompt and response, or segments")
    column = "messages" if row.get("messages") is not None else "conversations"
    messages = read_messages(object_in(row[column]), column)
    tools = object_in(row.get("tools"))
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"tools: is {shown(tools)}; expected a list of objects")
    segments: list[Segment] = []
    done, start = "", 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = apply_template(tokenizer, messages[:number], tools=tools, add_generation_prompt=True)
        after = apply_template(tokenizer, messages[: number + 1], tools=tools)
        if not before.startswith(done) or not after.startswith(before):
            raise UserError("the chat template rewrites earlier messages; train on prompt and response instead")
        require_rendered(messages[start:number], before[len(done) :])
        require_rendered([message], after[len(before) :])
        segments += [
            Segment(before[len(done) :], False),
            Segment(after[len(before) :], _weight(message, f"{column}[{number}]")),
        ]
        done, start = after, number + 1
    return segments


def _weight(message: Message, name: str) -> bool:
    """Return whether an assistant's message is trained on: OpenAI's `weight` of 0 leaves it out."""
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise UserError(f"{name}.weight: is {shown(weight)}; expected 0 or 1")
    return bool(weight)


SHAPES = {
    "segments": ("segments",),
    "prompt and response": ("prompt", "response"),
    "messages": ("messages",),
    "conversations": ("conversations",),
}
"""The columns of each shape."""
READERS: dict[str, Callable[[Row, Any], list[Segment]]] = {
    "segments": _marked_segments,
    "prompt and response": _text_segments,
    "messages": _chat_segments,
    "conversations": _chat_segments,
}


def load_rows(paths: Sequence[str | Path], tokenizer: Any, max_length: int) -> tuple[list[Trajectory], int]:
    """Return tokenized rows, and how many were left out because they are longer than `max_length`.

    Args:
        paths: files, or data sets of the hub.
        tokenizer: of the model.
        max_length: tokens.

    Raises:
        UserError: a row that is in no known shape, by its file and line; no row left.
    """
    rows: list[Trajectory] = []
    too_long = 0
    files = find_files(paths, TRAIN)
    for file, name in zip(files, source_names(files), strict=True):
        for line, row in read_rows(file.path):
            try:
                segments = segments_of(row, tokenizer)
            except UserError as error:
                raise UserError(f"{file.path}:{line}: {error}") from error
            encoded = tokenizer([segment.text for segment in segments], add_special_tokens=False)["input_ids"]
            ids = np.concatenate([np.asarray(part, dtype=np.int32) for part in encoded])
            mask = np.repeat([segment.train for segment in segments], [len(part) for part in encoded])
            if len(ids) < 2:
                raise UserError(f"{file.path}:{line}: has {len(ids)} tokens; there is nothing to predict")
            if len(ids) > max_length:
                too_long += 1
                continue
            # The first token is never predicted, so it serves as the prompt.
            rows.append(
                Trajectory(
                    sample=Sample(f"{name}/{line}", len(rows), [int(ids[0])], "", []),
                    rollout_id=0,
                    response_ids=ids[1:],
                    loss_mask=mask[1:],
                    rollout_logprobs=np.zeros(len(ids) - 1, dtype=np.float32),
                    turns=[],
                    stop="eos",
                )
            )
    if not rows:
        raise UserError(f"{', '.join(map(str, paths))}: no row of at most {max_length} tokens")
    return rows, too_long


def batches(rows: Sequence[Trajectory], tokens: int, seed: int) -> Iterator[list[Trajectory]]:
    """Yield batches of at least `tokens` tokens, without end, each epoch in a new order; a batch may span two epochs."""
    batch: list[Trajectory] = []
    size = 0
    for epoch in itertools.count():
        for index in np.random.default_rng([seed, epoch]).permutation(len(rows)):
            batch.append(rows[int(index)])
            size += sequence_length(batch[-1])
            if size >= tokens:
                yield batch
                batch, size = [], 0


_QUESTION = "QUESTION"
CHAT = "data.apply_chat_template"


def rows_settings(rows: Sequence[Trajectory], tokenizer: Any, before: ModelSettings | None) -> ModelSettings:
    """Build the settings of the trained model: the template that all rows' prompts show, the rest as it was before.

    A template that no row shows is no longer known: the model was trained away from it.

    Args:
        rows: at least one; what stands before the first trained token is the prompt.
        tokenizer: of the model.
        before: the settings of the model that training started from.
    """
    before = before or ModelSettings({})
    known = {key: value for key, value in before.values.items() if key not in (TEMPLATE, CHAT)}
    frames = list(_frames(tokenizer, before))
    for row in rows:
        prompt = _prompt(row, tokenizer)
        frames = [frame for frame in frames if _fits(prompt, *frame[2:])]
        if not frames:
            return replace(before, values=known, text=None)
    template, chat, _, _ = frames[0]
    text = before.text if template == before.values.get(TEMPLATE) else None
    return replace(before, values=known | {TEMPLATE: template, CHAT: chat}, text=text)


def _frames(tokenizer: Any, before: ModelSettings) -> list[tuple[str, bool, str, str]]:
    """Return every template, plain and as a chat message, with what stands before and after its question."""
    own = before.values.get(TEMPLATE) if before.text is not None else None
    texts = {name: fill_template(name, _QUESTION) for name, text in TEMPLATES.items() if text and not wants_passages(name)}
    if own is not None and before.text is not None and "{passages}" not in before.text:
        texts[own] = before.text.replace("{question}", _QUESTION)
    frames = []
    for chat in (False, True):
        for name, text in texts.items():
            try:
                rendered = render_prompt(text, None, tokenizer, None, chat)
            except UserError:  # no chat template
                continue
            head, mark, tail = rendered.rpartition(_QUESTION)
            if mark:
                frames.append((name, chat, head, tail))
    return frames


def _fits(prompt: str, head: str, tail: str) -> bool:
    return len(prompt) > len(head) + len(tail) and prompt.startswith(head) and prompt.endswith(tail)


def _prompt(row: Trajectory, tokenizer: Any) -> str:
    """Return what the model reads of a row before it writes."""
    length = int(row.loss_mask.argmax())
    ids = [*row.sample.prompt_ids, *map(int, row.response_ids[:length])]
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
