"""Which rank does what: the arithmetic of a layout, and Megatron's process groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from searchr1.errors import UserError


@dataclass(frozen=True, slots=True)
class Layout:
    """How `world` ranks share one model: consecutive ranks are tensor-parallel, the pipeline's stages come last."""

    world: int
    tensor_parallel: int
    pipeline_parallel: int

    @classmethod
    def of(cls, world: int, tensor_parallel: int, pipeline_parallel: int) -> Layout:
        """The layout.

        Raises:
            UserError: the sizes do not divide the ranks.
        """
        if world % (tensor_parallel * pipeline_parallel):
            raise UserError(
                f"actor.model.tensor_model_parallel_size x pipeline_model_parallel_size = {tensor_parallel} x "
                f"{pipeline_parallel} does not divide the actor's {world} ranks (cluster.component_placement)"
            )
        return cls(world, tensor_parallel, pipeline_parallel)

    @property
    def data_parallel(self) -> int:
        """Replicas, each of which trains on a share of the data."""
        return self.world // (self.tensor_parallel * self.pipeline_parallel)

    def data_rank(self, rank: int) -> int:
        """Which replica a rank belongs to."""
        return rank // self.tensor_parallel % self.data_parallel

    def leads(self, rank: int) -> bool:
        """Whether a rank is its replica's first: the one that takes its share of the data from the channel."""
        return rank % self.tensor_parallel == 0 and rank < self.tensor_parallel * self.data_parallel


def start_megatron(layout: Layout, seed: int) -> Any:
    """Import Megatron (through the shim on a CPU), make its process groups, seed it. Returns its `parallel_state`.

    The default process group must exist.
    """
    from searchr1.actor.megatron import cpu_shim

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
