"""Rows for supervised fine-tuning: three shapes, tokenized with a mask of what is trained on, in batches without end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from searchr1.actor.packing import sequence_length
from searchr1.agent.trajectory import Sample, Trajectory
from searchr1.data.dataset import read_rows
from searchr1.errors import UserError


@dataclass(frozen=True, slots=True)
class Segment:
    """Text that is trained on, or only read."""

    text: str
    train: bool


def segments_of(row: dict[str, Any], tokenizer: Any) -> list[Segment]:
    """A row in any of the three shapes.

    Raises:
        UserError: none of them, or nothing to train on.
    """
    if isinstance(row.get("segments"), list):
        segments = [Segment(str(part["text"]), bool(part["train"])) for part in row["segments"]]
    elif isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        eos = tokenizer.eos_token or ""
        segments = [Segment(row["prompt"], False), Segment(row["response"] + eos, True)]
    elif isinstance(row.get("messages"), list):
        segments = _chat_segments(row["messages"], tokenizer)
    else:
        raise UserError("expected messages, prompt and response, or segments")
    if not any(segment.train and segment.text for segment in segments):
        raise UserError("nothing to train on: no assistant message, empty response, or no segment with train: true")
    return [segment for segment in segments if segment.text]


def _chat_segments(messages: list[dict[str, Any]], tokenizer: Any) -> list[Segment]:
    """The rendered conversation, cut where an assistant's message begins and ends."""
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; use prompt and response, or segments")
    segments, done = [], ""
    for number, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        if not before.startswith(done) or not after.startswith(before):
            raise UserError("the chat template rewrites earlier messages; train on prompt and response instead")
        segments += [Segment(before[len(done) :], False), Segment(after[len(before) :], True)]
        done = after
    return segments


def load_rows(paths: Sequence[Path], tokenizer: Any, max_length: int) -> tuple[list[Trajectory], int]:
    """Tokenized rows, and how many were left out because they are longer than `max_length`."""
    rows: list[Trajectory] = []
    too_long = 0
    for path in paths:
        for line, row in read_rows(path):
            try:
                segments = segments_of(row, tokenizer)
            except (UserError, KeyError, TypeError) as error:
                raise UserError(f"{path}:{line}: {error}") from error
            encoded = tokenizer([segment.text for segment in segments], add_special_tokens=False)["input_ids"]
            ids = np.concatenate([np.asarray(part, dtype=np.int32) for part in encoded])
            mask = np.repeat([segment.train for segment in segments], [len(part) for part in encoded])
            if not 1 < len(ids) <= max_length:
                too_long += 1
                continue
            # The first token is never predicted, so it serves as the prompt.
            rows.append(
                Trajectory(
                    sample=Sample(f"{path.name}/{line}", len(rows), [int(ids[0])], "", []),
                    replica=0,
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
    """At least `tokens` tokens each, in a new order every epoch, without end; a batch may reach into the next epoch."""
    batch: list[Trajectory] = []
    size = 0
    for epoch in itertools.count():
        for index in np.random.default_rng([seed, epoch]).permutation(len(rows)):
            batch.append(rows[int(index)])
            size += sequence_length(batch[-1])
            if size >= tokens:
                yield batch
                batch, size = [], 0
