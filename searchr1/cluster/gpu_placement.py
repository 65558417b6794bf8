"""Which GPUs RLinf gives to worker processes.

RLinf counts all GPUs of a machine, whatever `CUDA_VISIBLE_DEVICES` says, and sets that variable for every worker that it
places on some. So workers are placed by the numbers of the GPUs that this process was given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rlinf.scheduler import FlexiblePlacementStrategy

from searchr1.errors import UserError


class OrderedPlacement(FlexiblePlacementStrategy):
    """Processes on GPUs of one machine, both in the order in which they are given; RLinf's own strategy sorts them."""

    def __init__(self, gpus_of_ranks: Sequence[Sequence[int]]) -> None:
        super().__init__([list(gpus) for gpus in gpus_of_ranks])
        self._given = [list(gpus) for gpus in gpus_of_ranks]

    def get_placement(self, cluster: Any, isolate_accelerator: bool = True) -> list[Any]:
        """RLinf's placements, of which rank r has the GPUs given at r."""
        placements = {frozenset(p.local_hardware_ranks): p for p in super().get_placement(cluster, isolate_accelerator)}
        ordered = [placements[frozenset(gpus)] for gpus in self._given]
        for rank, (placement, gpus) in enumerate(zip(ordered, self._given, strict=True)):
            placement.rank = placement.local_rank = rank
            placement.local_hardware_ranks = list(gpus)
            placement.local_accelerator_rank = gpus[0]
            placement.visible_accelerators = [str(gpu) for gpu in gpus]
        return ordered


def gpu_placement(cluster: Any, ranks: Sequence[Sequence[int]], gpus: Sequence[int]) -> OrderedPlacement:
    """Place each rank on the GPUs of its slots.

    Args:
        cluster: RLinf's.
        ranks: slots of each.
        gpus: the machine's number of the GPU of each slot (`visible_gpus`).

    Raises:
        UserError: RLinf does not see these GPUs.
    """
    seen = cluster.get_node_info(0).num_accelerators
    if max(gpus) >= seen:
        raise UserError(
            f"cluster.device: torch uses GPU {max(gpus)}, but the driver's management library lists {seen} GPUs; check that "
            "nvidia-smi works here and lists them all"
        )
    return OrderedPlacement([[gpus[slot] for slot in slots] for slots in ranks])


@contextmanager
def without_gpus(cluster: Any) -> Iterator[None]:
    """Launch workers as on a machine without GPUs.

    On one with GPUs RLinf sets `CUDA_VISIBLE_DEVICES` to all of them for workers that are placed on none, and opens NCCL
    (of which a torch for CPUs has none) beside gloo between any two workers, although only host memory is sent. Two
    workers of which one was launched in here speak gloo.
    """
    nodes = [cluster.get_node_info(rank) for rank in range(cluster.num_nodes)]
    hardware = [node.hardware_resources for node in nodes]
    for node in nodes:
        node.hardware_resources = []
    try:
        yield
    finally:
        for node, resources in zip(nodes, hardware, strict=True):
            node.hardware_resources = resources
