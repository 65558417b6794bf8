"""Measurements that can be added over micro-batches and ranks before they become metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class Sums:
    """Named totals (combined by adding) and peaks (combined by the maximum).

    All values are detached float64 scalars, so the order in which parts are added does not show in the metrics.
    Two `Sums` made by the same function always have the same keys, also when one of them saw no token: ranks may
    therefore all-reduce the stacked values without agreeing on keys first.
    """

    totals: dict[str, Tensor] = field(default_factory=dict)
    peaks: dict[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: Sums) -> Sums:
        """Add both; a key that only one side has is kept."""
        totals, peaks = dict(self.totals), dict(self.peaks)
        for name, value in other.totals.items():
            totals[name] = totals[name] + value if name in totals else value
        for name, value in other.peaks.items():
            peaks[name] = torch.maximum(peaks[name], value) if name in peaks else value
        return Sums(totals, peaks)


def on_host(values: dict[str, Tensor]) -> dict[str, float]:
    """Return totals or peaks as numbers, all in one transfer: the host waits for a GPU once."""
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True)) if values else {}


def total(values: Tensor) -> Tensor:
    """Sum of a tensor of any shape as a detached float64 scalar."""
    return values.detach().sum(dtype=torch.float64)


def peak(values: Tensor) -> Tensor:
    """Return the largest of non-negative values as a detached float64 scalar; 0 if there are none."""
    if values.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=values.device)
    return values.detach().max().to(torch.float64)
