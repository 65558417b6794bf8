"""Counts and measurements agreed over the actor's ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from searchr1.agent.trajectory import Trajectory
from searchr1.algorithms.aggregation import Denominators
from searchr1.algorithms.sums import Sums

Group = dist.ProcessGroup | None
"""A process group; None is the default group, or this process alone if torch.distributed is not initialised."""


def count_denominators(trajectories: Sequence[Trajectory], longest: int = 1) -> Denominators:
    """Policy tokens, and sequences that have any, of this rank's part of a mini-batch; `longest`: see Denominators."""
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
    """Largest over ranks, for example of the number of micro-batches; a collective."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return int(largest)


def all_reduce_sums(sums: Sums, group: Group = None) -> Sums:
    """Totals added and peaks maximised over ranks; a collective. All ranks need the same keys."""
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
