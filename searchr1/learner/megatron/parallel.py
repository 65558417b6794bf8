"""Megatron's process groups."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from searchr1.config.layout import Layout


def start_megatron(layout: Layout, seed: int) -> Any:
    """Import Megatron (through the shim on a CPU), make its process groups, seed it. Returns its `parallel_state`.

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
