"""Measurements of a training step: counts agreed over the ranks, and model FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from searchr1.agent.trajectory import Trajectory
from searchr1.algorithms.aggregation import Denominators
from searchr1.algorithms.sums import Sums

Group = dist.ProcessGroup | None
"""A process group; None is the default group, or this process alone if torch.distributed is not initialised."""


def count_denominators(trajectories: Sequence[Trajectory], longest: int = 1) -> Denominators:
    """Count policy tokens, and sequences that have any, in this rank's part of a mini-batch; `longest`: see Denominators."""
    counts = [trajectory.policy_length for trajectory in trajectories]
    return Denominators(tokens=sum(counts), sequences=sum(count > 0 for count in counts), longest=longest)


def all_reduce_denominators(local: Denominators, device: torch.device, group: Group = None) -> Denominators:
    """Sum over ranks; a collective."""
    if not dist.is_initialized():
        return local
    counts = torch.tensor([local.tokens, local.sequences], dtype=torch.int64, device=device)
    dist.all_reduce(counts, group=group)
    return Denominators(tokens=int(counts[0]), sequences=int(counts[1]), longest=local.longest)


def all_reduce_max(value: int, device: torch.device, group: Group = None) -> int:
    """Return the largest over ranks, for example of the number of micro-batches; a collective."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return int(largest)


def all_reduce_sums(sums: Sums, group: Group = None) -> Sums:
    """Add totals and maximise peaks over ranks; a collective. All ranks need the same keys."""
    if not dist.is_initialized():
        return sums
    return Sums(
        totals=_all_reduce_named(sums.totals, dist.ReduceOp.SUM, group),
        peaks=_all_reduce_named(sums.peaks, dist.ReduceOp.MAX, group),
    )


def _all_reduce_named(values: dict[str, Tensor], operation: dist.ReduceOp.RedOpType, group: Group) -> dict[str, Tensor]:
    if not values:
        return {}
    names = sorted(values)
    stacked = torch.stack([values[name] for name in names])
    dist.all_reduce(stacked, op=operation, group=group)
    return dict(zip(names, stacked.unbind(), strict=True))


def training_flops(config: Any, lengths: Sequence[int], policy_tokens: int) -> float:
    """Count the floating-point operations of a forward and a backward pass.

    Matrix products only, without what is recomputed: causal attention counts the half that is needed, the output layer
    counts where logits are needed. A multiplication and an addition are two operations; the backward pass is two forwards.

    Args:
        config: the transformers configuration of a dense decoder with gated MLPs.
        lengths: tokens of each sequence.
        policy_tokens: how many of them have logits.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    queries, keys = heads * head_dim, config.num_key_value_heads * head_dim
    per_token = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * config.intermediate_size
    linear = 2 * per_token * sum(lengths)
    attention = sum(2 * 2 * queries * length * (length + 1) / 2 for length in lengths)
    logits = 2 * hidden * config.vocab_size * policy_tokens
    return float(3.0 * (config.num_hidden_layers * (linear + attention) + logits))
