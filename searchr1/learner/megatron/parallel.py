"""Megatron's process groups, and what travels over them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from searchr1.algorithms.sums import Sums
from searchr1.config.layout import Layout
from searchr1.learner.backend import T
from searchr1.learner.stats import all_reduce_sums


def start_megatron(layout: Layout, seed: int) -> Any:
    """Import Megatron (through the shim on a CPU), make its process groups, seed it. Return its `parallel_state`.

    The default process group must exist.
    """
    from searchr1.learner.megatron import cpu_shim

    cpu_shim.prepare()
    # Imported here so that the shim reaches them all.
    import megatron.core.dist_checkpointing
    import megatron.core.distributed
    import megatron.core.models.gpt
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel  # noqa: F401
    from megatron.core import parallel_state, tensor_parallel

    cpu_shim.adapt()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor_parallel,
            pipeline_model_parallel_size=layout.pipeline_parallel,
            create_gloo_process_groups=True,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    assert dist.get_world_size() == layout.world
    return parallel_state


class Parallel:
    """One process's place among the ranks that share a model."""

    def __init__(self, layout: Layout, seed: int, device: torch.device) -> None:
        """Make the process groups; a collective."""
        self._state = start_megatron(layout, seed)
        self._device = device
        self.layout = layout
        self.data_group: dist.ProcessGroup = self._state.get_data_parallel_group()
        self.tensor_group: dist.ProcessGroup = self._state.get_tensor_model_parallel_group()
        self.is_last_stage: bool = self._state.is_pipeline_last_stage()

    def broadcast_from_dp_leader(self, value: T | None) -> T:
        """Return the leader's value on all processes of the data-parallel rank; a collective."""
        box = [value]
        group = self._state.get_model_parallel_group()
        if group.size() > 1:
            dist.broadcast_object_list(box, dist.get_global_rank(group, 0), group, device=self._device)
        assert box[0] is not None
        return box[0]

    def broadcast_from_last_stage(self, values: Tensor) -> None:
        """Fill `values` on every stage with the last one's; a collective."""
        if self.layout.pipeline_parallel > 1:
            dist.broadcast(values, self._last_stage_rank, self._pipeline_group)

    def share(self, sums: Sums) -> Sums:
        """Return sums over all data on every stage; a collective."""
        if self.is_last_stage:
            sums = all_reduce_sums(sums, self.data_group)
        if self.layout.pipeline_parallel == 1:
            return sums
        names = [[sorted(sums.totals), sorted(sums.peaks)]]
        dist.broadcast_object_list(names, self._last_stage_rank, self._pipeline_group, device=self._device)
        totals, peaks = names[0]
        count = len(totals) + len(peaks)
        values = torch.empty(count, dtype=torch.float64, device=self._device)
        if self.is_last_stage:
            values = torch.stack([*(sums.totals[name] for name in totals), *(sums.peaks[name] for name in peaks)])
        self.broadcast_from_last_stage(values)
        each = values.unbind()
        return Sums(dict(zip(totals, each[: len(totals)], strict=True)), dict(zip(peaks, each[len(totals) :], strict=True)))

    @property
    def _pipeline_group(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup = self._state.get_pipeline_model_parallel_group()
        return group

    @property
    def _last_stage_rank(self) -> int:
        rank: int = self._state.get_pipeline_model_parallel_last_rank()
        return rank
