"""Counts and sums agreed between two real processes over gloo."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from searchr1.algorithms.aggregation import Denominators
from searchr1.algorithms.mismatch import mismatch_metrics, mismatch_sums
from searchr1.algorithms.sums import Sums
from searchr1.learner.stats import all_reduce_denominators, all_reduce_max, all_reduce_sums

CPU = torch.device("cpu")
TRAIN = torch.tensor([-1.0, -2.0, -0.5, -3.0, -0.1])
ROLLOUT = torch.tensor([-1.1, -2.0, -0.9, -2.5, -0.1])


def rank_main(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        # Rank 1 has no policy token at all, which must neither hang nor bend the means.
        mask = torch.full((5,), rank == 0)
        sums = all_reduce_sums(mismatch_sums(TRAIN, ROLLOUT, mask.nonzero().squeeze(-1)))
        counts = all_reduce_denominators(Denominators(5 if rank == 0 else 0, 1 - rank), CPU)
        torch.save((mismatch_metrics(sums), counts, all_reduce_max(3 + rank, CPU)), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_ranks_agree(tmp_path: Path) -> None:
    mp.spawn(rank_main, (str(tmp_path),), nprocs=2)
    expected = mismatch_metrics(mismatch_sums(TRAIN, ROLLOUT, torch.arange(5)))
    for rank in range(2):
        metrics, counts, largest = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert metrics == expected
        assert counts == Denominators(tokens=5, sequences=1)
        assert largest == 4


def test_one_process_needs_no_group() -> None:
    sums = Sums({"a": torch.tensor(1.0)}, {})
    assert all_reduce_sums(sums) is sums
    assert all_reduce_denominators(Denominators(4, 2), CPU) == Denominators(4, 2)
    assert all_reduce_max(7, CPU) == 7
