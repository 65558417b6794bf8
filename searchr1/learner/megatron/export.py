"""Weights out of any TP x PP layout under their Hugging Face names, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from searchr1.checkpoints.mapping import Entry, entries
from searchr1.checkpoints.model_shape import ModelShape
from searchr1.config.layout import Layout
from searchr1.learner.megatron.model import LocalParameter


def gather_hugging_face(
    parameters: list[LocalParameter], arch: ModelShape, layout: Layout, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield full tensors on rank 0, empty shells on the others, which must run along. A tied output layer is left out.

    Tensor-parallel parts are joined by the stage that has them and sent on to rank 0, by the first data-parallel rank alone.
    At no time does a rank hold more than one full tensor that is not its own.
    """
    from megatron.core import parallel_state

    rank = dist.get_rank()
    group = parallel_state.get_tensor_model_parallel_group()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    mine = {item.entry.name: item.parameter for item in parameters}
    layers_per_stage = arch.num_hidden_layers // layout.pipeline_parallel
    dtype = parameters[0].parameter.dtype
    for entry in entries(arch):
        owner = _stage_of(entry.name, layers_per_stage, layout.pipeline_parallel)
        whole: dict[str, Tensor] = {}
        if stage == owner and layout.dp_rank(rank) == 0:
            whole = dict(entry.to_hugging_face(_tensor_parallel_parts(entry, mine[entry.name].detach(), group)))
        for name, shape in zip(entry.sources, entry.shapes, strict=True):
            if rank == 0 and stage != owner:
                whole[name] = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(whole[name], owner * layout.tensor_parallel * layout.data_parallel)
            elif whole and stage != 0 and group.rank() == 0:
                dist.send(whole[name].contiguous(), 0)
            yield name, whole[name] if rank == 0 else torch.empty(shape, dtype=dtype, device="meta")


def _tensor_parallel_parts(entry: Entry, part: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if entry.kind == "copy" or group.size() == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts


def _stage_of(name: str, layers_per_stage: int, stages: int) -> int:
    if name.startswith("decoder.layers."):
        return int(name.split(".")[2]) // layers_per_stage
    return 0 if name.startswith("embedding.") else stages - 1
