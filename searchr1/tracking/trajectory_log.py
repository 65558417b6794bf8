"""Trajectories on disk, one JSON object a line, for people and for the report."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from searchr1.agent.trajectory import Trajectory
from searchr1.files.atomic import write_text
from searchr1.rewards.answers import answer_of
from searchr1.tracking.token_text import TokenText

FOLDER = "trajectories"
MOST_SURPRISE = 99_999
"""Thousandths of a nat that are written for a token of probability 0."""


def train_file(run: Path, step: int) -> Path:
    """Return the trajectories that step `step` trained on."""
    return run / FOLDER / f"step_{step}.jsonl"


def eval_file(run: Path, step: int) -> Path:
    """Return the trajectories of the evaluation after step `step`."""
    return run / FOLDER / f"eval_step_{step}.jsonl"


def logged_steps(run: Path, prefix: str) -> list[int]:
    """Return steps with a file `{prefix}{step}.jsonl`, ascending; the prefix is "step_" or "eval_step_"."""
    names = (path.stem.removeprefix(prefix) for path in (run / FOLDER).glob(f"{prefix}*.jsonl"))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def remove_later(run: Path, first_step: int) -> None:
    """Make the folder, without the files of steps that a run from `first_step` on (0: a fresh one) will write again."""
    (run / FOLDER).mkdir(exist_ok=True)
    for prefix, file in (("step_", train_file), ("eval_step_", eval_file)):
        for step in logged_steps(run, prefix):
            if step > first_step or not first_step:
                file(run, step).unlink(missing_ok=True)


def trajectory_row(trajectory: Trajectory, token_text: TokenText | None = None) -> dict[str, Any]:
    """Return a trajectory's row: the question, every turn in plain text, and how it was scored.

    With `token_text` a turn has two more lists, with an entry per sampled token: `token_chars`, the characters of
    `policy_text` that it stands for, and `token_surprise`, its negative log-probability in thousandths of a nat. Both are
    missing where tokens and text do not fit together, as after a loop of the user's own that edits what was sampled.
    """
    sample = trajectory.sample
    return {
        "id": sample.id,
        "data_source": sample.data_source,
        "replica": trajectory.rollout_id,
        "question": sample.question,
        "golden_answers": sample.golden_answers,
        "answer": answer_of(trajectory.policy_text),
        "reward": _number(trajectory.reward),
        "reward_parts": {name: _number(value) for name, value in trajectory.reward_parts.items()},
        "stop": trajectory.stop,
        "forced_final": trajectory.forced_final,
        "searches": trajectory.searches,
        "response_length": trajectory.response_length,
        "policy_tokens": trajectory.policy_length,
        "weight_version": trajectory.weight_version,
        "turns": _turn_rows(trajectory, token_text),
    }


def _turn_rows(trajectory: Trajectory, token_text: TokenText | None) -> list[dict[str, Any]]:
    rows = [dataclasses.asdict(turn) for turn in trajectory.turns]
    if token_text is None:
        return rows
    start = 0
    for turn, row in zip(trajectory.turns, rows, strict=True):
        part = slice(start, start + turn.policy_tokens)
        start = part.stop + turn.tool_tokens
        lengths = token_text.lengths(trajectory.response_ids[part].tolist(), turn.policy_text)
        if lengths is None or len(lengths) != turn.policy_tokens or not trajectory.loss_mask[part].all():
            continue
        surprise = np.nan_to_num(-1000.0 * trajectory.rollout_logprobs[part], posinf=MOST_SURPRISE).clip(0, MOST_SURPRISE)
        row["token_chars"], row["token_surprise"] = lengths, surprise.round().astype(int).tolist()
    return rows


def whole_groups(trajectories: Sequence[Trajectory], most: int | None) -> list[Trajectory]:
    """Return at most `most` (None: all) of a step's trajectories: whole groups, evenly over the step's questions.

    If not even one group fits, the first rollouts of one.
    """
    groups: dict[int, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.sample.index, []).append(trajectory)
    if most is None or len(trajectories) <= most or not groups:
        return list(trajectories)
    count = most // max(len(group) for group in groups.values())
    if not count:
        return next(iter(groups.values()))[:most]
    members = list(groups.values())
    return [t for i in range(count) for t in members[i * len(members) // count]]


def write_trajectories(path: Path, trajectories: Sequence[Trajectory], token_text: TokenText | None = None) -> None:
    """Write trajectories, one JSON object a line."""
    rows = (trajectory_row(trajectory, token_text) for trajectory in trajectories)
    write_text(path, (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows))


def _number(value: float) -> float | None:
    """Return a number that JSON has, None for NaN and infinity."""
    return float(value) if math.isfinite(value) else None
