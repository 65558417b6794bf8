"""Build transformers models without their weights; once they are sharded, every rank reads only its own rows from the files.

A model's parameters stay on torch's "meta" device (a shape without memory) until FSDP2 has cut them up. So a rank needs room
for its shards and for one piece of a file, however large the model is.
"""

from __future__ import annotations

import logging
import math
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from searchr1.actor.lora import base_name
from searchr1.actor.megatron.hf_folder import local_folder
from searchr1.actor.weight_check import StoredWeights, check_model_folder, has_weights, load_pretrained, renames_tensors

logger = logging.getLogger(__name__)

PIECE_BYTES = 64 << 20
"""How much of a file is in host memory at a time while a rank copies its rows."""


def build_model(
    kind: Any, path: str, *, dtype: torch.dtype, attention: str, decoder_only: bool = False
) -> tuple[Any, Path | None]:
    """Build a transformers model as `from_pretrained` does, but leave its parameters on the meta device.

    Args:
        kind: the transformers class, AutoModelForCausalLM or AutoModel.
        path: a folder or hub name.
        dtype: precision that parameters are held in.
        attention: transformers' name of the attention.
        decoder_only: heads in the files are not used.

    Returns:
        The model, and the folder that `fill` reads its weights from; None if the weights are in it already, because
        transformers itself must read them.

    Raises:
        UserError: no usable model there, or its weights do not fit its config.json.
    """
    from transformers import AutoConfig

    folder = local_folder(path)
    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if folder != Path(path) and not has_weights(folder):
        return _load_whole(kind, path, "it has no safetensors files", decoder_only, settings), None
    check_model_folder(folder, decoder_only=decoder_only)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = kind.from_config(config, trust_remote_code=False, **settings)
    if renames_tensors(model):
        why = f"transformers renames or fuses the tensors of a {model.config.model_type} while it reads them"
        return _load_whole(kind, str(folder), why, decoder_only, settings), None
    if model._get_dtype_plan(dtype):
        why = f"transformers holds parts of a {model.config.model_type} in fp32"
        return _load_whole(kind, str(folder), why, decoder_only, settings), None
    _compute_buffers(model)
    return model.eval(), folder


def _load_whole(kind: Any, path: str, why: str, decoder_only: bool, settings: dict[str, Any]) -> Any:
    model = load_pretrained(kind, path, decoder_only=decoder_only, **settings)
    size = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    logger.warning("%s: every rank loads the whole model, %.1f GiB of host memory, because %s", path, size / 2**30, why)
    return model


def _compute_buffers(model: Any) -> None:
    """Compute the buffers that no file has (rotary frequencies and the like), as `from_pretrained` does after reading."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, torch.empty_like(buffer, device="cpu"))
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # transformers' mark of a tensor that comes from a file
    model.initialize_weights()


@torch.no_grad()
def fill(model: nn.Module, folder: Path, *, on_host: bool) -> None:
    """Give a sharded model's parameters memory, and read this rank's rows into it; what has memory already stays as it is.

    Args:
        model: sharded with FSDP2; names are those of the files, but for adapters.
        folder: of the weights, checked.
        on_host: parameters belong into host memory, wherever the model computes (`actor.fsdp.cpu_offload`).
    """
    waiting = {name for name, tensor in _tensors(model).items() if tensor.is_meta}
    device = next(p.device_mesh.device_type for p in model.parameters() if isinstance(p, DTensor))

    def with_memory(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        return torch.empty_like(tensor, device="cpu" if on_host and isinstance(tensor, DTensor) else device)

    model._apply(with_memory)  # which FSDP2 extends: it pads uneven shards, and pins those in host memory
    with StoredWeights.open(folder) as stored:
        for name, tensor in _tensors(model).items():
            if name in waiting:
                _read_rows(tensor, stored, base_name(name))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers; a tied one by its first name."""
    return dict(chain(model.named_parameters(), model.named_buffers()))


def _read_rows(tensor: Tensor, stored: StoredWeights, name: str) -> None:
    first, local = 0, tensor
    if isinstance(tensor, DTensor):
        local = tensor.to_local()
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        # FSDP2 cuts along the first dimension unless it is asked otherwise.
        assert tuple(shape) == tuple(local.shape), (name, shape, local.shape)
        assert local.shape[1:] == tensor.shape[1:], (name, local.shape, tensor.shape)
        first = offset[0]
    if local.ndim == 0:
        local = local.reshape(1)
    row_bytes = math.prod(local.shape[1:]) * stored.dtypes[name].itemsize
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    for start in range(0, len(local), step):
        rows = local[start : start + step]
        rows.copy_(stored.read(name, 0, first + start, first + start + len(rows)))
