"""Trajectories packed end to end into micro-batches without padding, and results taken apart again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from searchr1.agent.trajectory import Trajectory
from searchr1.errors import UserError

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """Where one trajectory lies in a packed micro-batch."""

    index: int
    """Position in the list that was packed."""
    offset: int
    """First token in the packed row."""
    prompt_length: int
    response_length: int

    @property
    def length(self) -> int:
        """Number of prompt and response tokens."""
        return self.prompt_length + self.response_length

    @property
    def response(self) -> slice:
        """Where the response tokens are in the packed row."""
        return slice(self.offset + self.prompt_length, self.offset + self.length)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch: T tokens of S sequences in one row.

    What belongs to a token stands at that token: `logprobs_T[t]` is the log-probability of token t, predicted by
    the logits at t - 1. Values at tokens that the policy did not sample are 0.
    """

    input_ids_T: Tensor
    """int64."""
    position_ids_T: Tensor
    """int64, from 0 in every sequence."""
    segment_ids_T: Tensor
    """int64, 0 to S - 1."""
    loss_mask_T: Tensor
    """bool, True where the policy sampled the token; never at a sequence's first token."""
    advantages_T: Tensor
    """float32."""
    rollout_logprobs_T: Tensor
    """float32."""
    old_logprobs_T: Tensor | None
    """float32."""
    ref_logprobs_T: Tensor | None
    """float32."""
    policy_positions_P: Tensor
    """int64, where policy tokens stand. Their logits stand one before."""
    cu_seqlens: Tensor
    """[S + 1] int32 borders."""
    lengths: tuple[int, ...]
    """[S] tokens of each sequence, on the host: the borders that packed attention needs."""
    sequences: tuple[PackedSequence, ...]
    """Empty for a filler batch, which has S = 1 sequence without a trajectory."""
    returns_T: Tensor | None = None
    """float32, what a critic's values should be."""
    old_values_T: Tensor | None = None
    """float32, a critic's values before the step's first update."""

    @property
    def tokens(self) -> int:
        """Number of tokens T."""
        return len(self.input_ids_T)

    def to(self, device: torch.device) -> PackedBatch:
        """Return the batch on another device; the host does not wait for a GPU."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        moved: dict[str, Any] = {name: _moved(value, device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def with_old_logprobs(self, old_logprobs_T: Tensor) -> PackedBatch:
        """Return the batch with old log-probabilities that are already packed."""
        return replace(self, old_logprobs_T=old_logprobs_T)

    def scatter_policy(self, values_P: Tensor) -> Tensor:
        """Return [T] with `values_P` at the policy tokens and 0 elsewhere; gradients flow through."""
        return values_P.new_zeros(self.tokens).index_copy(0, self.policy_positions_P, values_P)


def _moved(value: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


def sequence_length(trajectory: Trajectory) -> int:
    """Return the number of prompt and response tokens."""
    return len(trajectory.sample.prompt_ids) + len(trajectory.response_ids)


def pack(
    trajectories: Sequence[Trajectory],
    max_tokens: int,
    *,
    advantages: Sequence[float | FloatArray] | None = None,
    old_logprobs: Sequence[FloatArray] | None = None,
    returns: Sequence[FloatArray] | None = None,
    old_values: Sequence[FloatArray] | None = None,
    at_least: int = 1,
) -> list[PackedBatch]:
    """Pack trajectories into micro-batches of at most `max_tokens` tokens.

    Args:
        trajectories: in any order; the result depends on nothing but this list and the numbers.
        max_tokens: `runner.max_tokens_per_mbs`.
        advantages: one per trajectory, given to each of its policy tokens, or [N] one per response token; None means 0.
        old_logprobs: response-aligned, one array [N] per trajectory.
        returns: the same, for a critic.
        old_values: the same, for a critic.
        at_least: number of micro-batches to reach (see `plan_micro_batches`); filler batches, which have no policy
            token, make up for missing trajectories so that all ranks run equally often.

    Raises:
        UserError: a trajectory alone is longer than `max_tokens`.
        ValueError: an empty prompt, lists of different lengths, or reference log-probabilities on some only.
    """
    given_lists = {"advantages": advantages, "old_logprobs": old_logprobs, "returns": returns, "old_values": old_values}
    for name, given in given_lists.items():
        if given is not None and len(given) != len(trajectories):
            raise ValueError(f"{len(given)} {name} for {len(trajectories)} trajectories")
    with_ref = sum(trajectory.ref_logprobs is not None for trajectory in trajectories)
    if with_ref not in (0, len(trajectories)):
        raise ValueError(f"{with_ref} of {len(trajectories)} trajectories have reference log-probabilities")
    plan = plan_micro_batches([sequence_length(trajectory) for trajectory in trajectories], max_tokens, at_least)
    aligned = {"old_logprobs_T": old_logprobs, "returns_T": returns, "old_values_T": old_values}
    given_columns = {name: values for name, values in aligned.items() if values is not None}
    return [_pack_one(trajectories, members, advantages, given_columns) for members in plan]


def _pack_one(
    trajectories: Sequence[Trajectory],
    members: list[int],
    advantages: Sequence[float | FloatArray] | None,
    columns: dict[str, Sequence[FloatArray]],
) -> PackedBatch:
    """Pack some trajectories; `columns` are response-aligned values by the batch's name for them."""
    sequences: list[PackedSequence] = []
    offset = 0
    for index in members:
        trajectory = trajectories[index]
        prompt_length = len(trajectory.sample.prompt_ids)
        if prompt_length == 0:
            raise ValueError(f"{trajectory.sample.id}: an empty prompt leaves the first token without a prediction")
        sequences.append(PackedSequence(index, offset, prompt_length, len(trajectory.response_ids)))
        offset += sequences[-1].length
    # A filler batch: two tokens, so that every operation of a real batch also runs on it.
    lengths = tuple(sequence.length for sequence in sequences) or (2,)
    tokens = sum(lengths)
    input_ids_T = np.zeros(tokens, dtype=np.int64)
    loss_mask_T = np.zeros(tokens, dtype=np.bool_)
    advantages_T = np.zeros(tokens, dtype=np.float32)
    rollout_T = np.zeros(tokens, dtype=np.float32)
    columns_T = {name: np.zeros(tokens, dtype=np.float32) for name in columns}
    ref_T = np.zeros(tokens, dtype=np.float32)
    has_ref = any(trajectory.ref_logprobs is not None for trajectory in trajectories)
    for sequence in sequences:
        trajectory, response = trajectories[sequence.index], sequence.response
        mask = trajectory.loss_mask
        input_ids_T[sequence.offset : response.start] = trajectory.sample.prompt_ids
        input_ids_T[response] = trajectory.response_ids
        loss_mask_T[response] = mask
        rollout_T[response] = np.where(mask, trajectory.rollout_logprobs, 0)
        if advantages is not None:
            advantages_T[response] = mask * np.asarray(advantages[sequence.index], dtype=np.float32)
        for name, values in columns.items():
            columns_T[name][response] = np.where(mask, values[sequence.index], 0)
        if trajectory.ref_logprobs is not None:
            ref_T[response] = np.where(mask, trajectory.ref_logprobs, 0)
    packed = {name: torch.from_numpy(values_T) for name, values_T in columns_T.items()}
    return PackedBatch(
        input_ids_T=torch.from_numpy(input_ids_T),
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        segment_ids_T=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        loss_mask_T=torch.from_numpy(loss_mask_T),
        advantages_T=torch.from_numpy(advantages_T),
        rollout_logprobs_T=torch.from_numpy(rollout_T),
        ref_logprobs_T=torch.from_numpy(ref_T) if has_ref else None,
        policy_positions_P=torch.from_numpy(np.flatnonzero(loss_mask_T)),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        lengths=lengths,
        sequences=tuple(sequences),
        old_logprobs_T=packed.get("old_logprobs_T"),
        returns_T=packed.get("returns_T"),
        old_values_T=packed.get("old_values_T"),
    )


def unpack_logprobs(batch: PackedBatch, logprobs_T: Tensor) -> list[FloatArray]:
    """Return the response part of each sequence: one array [N] per entry of `batch.sequences`, in that order.

    Place each at its sequence's `index` to get back to the order that was packed (`unpack_all` does).

    Raises:
        ValueError: `logprobs_T` has not one value per token.
    """
    if logprobs_T.shape != (batch.tokens,):
        raise ValueError(f"{tuple(logprobs_T.shape)} values for {batch.tokens} packed tokens")
    values_T = logprobs_T.detach().to(device="cpu", dtype=torch.float32).numpy()
    return [values_T[sequence.response].copy() for sequence in batch.sequences]


def unpack_all(batches: Sequence[PackedBatch], logprobs: Sequence[Tensor]) -> list[FloatArray]:
    """Return response-aligned arrays of all micro-batches, in the order of the trajectories that were packed."""
    by_index: dict[int, FloatArray] = {}
    for batch, logprobs_T in zip(batches, logprobs, strict=True):
        arrays = unpack_logprobs(batch, logprobs_T)
        by_index.update({sequence.index: array for sequence, array in zip(batch.sequences, arrays, strict=True)})
    return [by_index[index] for index in range(len(by_index))]


def plan_micro_batches(lengths: Sequence[int], max_tokens: int, at_least: int = 1) -> list[list[int]]:
    """Decide which sequences go into which micro-batch.

    First-fit-decreasing counts how many are needed; the sequences are then spread over that many (or `at_least`)
    with token counts as equal as can be. To agree on a count, ranks plan with `at_least=1`, take the maximum of
    their numbers, and plan again with that.

    Args:
        lengths: tokens of each sequence.
        max_tokens: the most tokens a micro-batch may have.
        at_least: the least number of micro-batches; with fewer sequences than that some stay empty.

    Returns:
        Positions in `lengths`, ascending within a micro-batch.

    Raises:
        UserError: a sequence alone is longer than `max_tokens`.
    """
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise UserError(
            f"runner.max_tokens_per_mbs: a sequence of {longest} tokens does not fit into {max_tokens}; raise it to at "
            "least runner.seq_length"
        )
    fitted: list[list[int]] = []
    space: list[int] = []
    for index in _longest_first(lengths):
        chosen = next((number for number, left in enumerate(space) if left >= lengths[index]), len(space))
        if chosen == len(space):
            fitted.append([])
            space.append(max_tokens)
        fitted[chosen].append(index)
        space[chosen] -= lengths[index]
    spread = split_balanced(lengths, max(len(fitted), at_least, 1))
    if all(sum(lengths[index] for index in members) <= max_tokens for members in spread):
        return spread
    # Spreading does not mind the limit. Where it breaks it, the fit stands, with empty micro-batches to make up.
    return [sorted(members) for members in fitted] + [[] for _ in range(len(spread) - len(fitted))]


def split_balanced(lengths: Sequence[int], n_ranks: int) -> list[list[int]]:
    """Spread sequences over ranks with token counts as equal as can be: each, longest first, to the least loaded.

    The largest load is at most 4/3 of the best possible, and far closer with many sequences. Deterministic; every
    position is in exactly one list, ascending within it.
    """
    members: list[list[int]] = [[] for _ in range(n_ranks)]
    load = [0] * n_ranks
    for index in _longest_first(lengths):
        rank = min(range(n_ranks), key=lambda candidate: (load[candidate], candidate))
        members[rank].append(index)
        load[rank] += lengths[index]
    return [sorted(indices) for indices in members]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
