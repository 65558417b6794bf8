"""Build sharded transformers models without their weights; every rank then reads only its own rows from the files."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from searchr1.algorithms.entropy import TokenLogprobs, logprobs_from_logits
from searchr1.checkpoints.hf_folder import StoredWeights, has_weights, local_folder
from searchr1.checkpoints.lora import base_name
from searchr1.checkpoints.weight_check import check_model_folder, load_pretrained, renames_tensors
from searchr1.config.schema_model import FsdpConfig, LoraConfig
from searchr1.device import Device
from searchr1.learner import attention
from searchr1.learner.attention import packed_model_inputs
from searchr1.learner.fused import use_compile, use_liger
from searchr1.learner.lora import add_adapters
from searchr1.learner.packing import PackedBatch

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
    """Return parameters and buffers; a tied one by its first name."""
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
    row_bytes = math.prod(local.shape[1:]) * stored.specs[name].dtype.itemsize
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    for start in range(0, len(local), step):
        rows = local[start : start + step]
        rows.copy_(stored.read(name, 0, first + start, first + start + len(rows)))


COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.bfloat16}
"""fp16 needs loss scaling, which bf16 does not; recipes that say fp16 compute in bf16 here."""
ENGINE_DTYPES = COMPUTE_DTYPES | {"fp16": torch.float16}
"""An engine needs none: it gets weights that are rounded once, to what it computes in."""


def init_process_group(device: Device, timeout_minutes: float = 30, host_tensors: bool = False) -> None:
    """Take this process's GPU and join the group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, or be alone
    without them.

    Args:
        device: where to compute.
        timeout_minutes: of a collective.
        host_tensors: tensors in host memory take part too (`actor.fsdp.cpu_offload`).

    Raises:
        UserError: there is no GPU for this process.
    """
    from datetime import timedelta

    if dist.is_initialized():
        return
    device.take_gpu()
    timeout = timedelta(minutes=timeout_minutes)
    backend = device.collective_backend
    if host_tensors and device.is_cuda:
        backend = f"cpu:gloo,cuda:{backend}"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.FileStore(os.path.join(tempfile.mkdtemp(prefix="searchr1-"), "store"), 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def load_model(
    path: str,
    device: Device,
    *,
    precision: str = "fp32",
    trainable: bool = True,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
    gradient_checkpointing: bool = False,
    lora: LoraConfig | None = None,
    kernels: FsdpConfig | None = None,
) -> nn.Module:
    """Return a causal language model from a Hugging Face folder, sharded over the process group with FSDP2.

    Every rank reads only its own rows. Weights are held in fp32 (they are the optimizer's master copy) and
    computed with in `precision`. With `lora` of rank 1 or more they are frozen, and adapters are trained instead.

    Raises:
        UserError: no usable model there, or its weights do not fit its config.json.
    """
    from transformers import AutoModelForCausalLM

    in_compute = lora is not None and lora.rank > 0 and lora.base_precision == "compute"
    held = COMPUTE_DTYPES[precision] if in_compute else torch.float32
    model, folder = build_model(AutoModelForCausalLM, path, dtype=held, attention=attention.NAME)
    return shard_model(
        model,
        device,
        folder=folder,
        precision=precision,
        trainable=trainable,
        reshard_after_forward=reshard_after_forward,
        cpu_offload=cpu_offload,
        gradient_checkpointing=gradient_checkpointing,
        lora=lora,
        kernels=kernels,
    )


def shard_model(
    model: Any,
    device: Device,
    *,
    folder: Path | None = None,
    precision: str = "fp32",
    trainable: bool = True,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
    gradient_checkpointing: bool = False,
    lora: LoraConfig | None = None,
    kernels: FsdpConfig | None = None,
) -> nn.Module:
    """Shard a model, one FSDP2 unit per decoder layer and one for the rest, and fill it from `folder` where it is empty.

    `kernels` says what is fused in its layers: `liger` and `compile`.
    """
    model.config.use_cache = False
    model.requires_grad_(trainable)
    if lora is not None and lora.rank > 0:
        add_adapters(model, lora)
    model.train(trainable)
    if gradient_checkpointing and trainable:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if kernels is not None:
        use_liger(model, device, kernels.liger)
        if kernels.compile:
            use_compile(model.model.layers, device)
    mesh = init_device_mesh(device.torch_device().type, (dist.get_world_size(),))
    compute = COMPUTE_DTYPES[precision]
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=device.is_cuda) if cpu_offload else OffloadPolicy()
    shard: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **shard)
    fully_shard(model, reshard_after_forward=False, **shard)
    if folder is not None:
        fill(model, folder, on_host=cpu_offload)
    sharded: nn.Module = model
    return sharded


def policy_logprobs(model: nn.Module, batch: PackedBatch, temperature: float, with_entropy: bool = False) -> TokenLogprobs:
    """Return log-probabilities of the P policy tokens of a packed micro-batch; only their positions reach the output layer.

    Returns:
        [P] values, in the order of `batch.policy_positions_P`.
    """
    positions_P = batch.policy_positions_P
    logits_PV: Tensor = model(**packed_model_inputs(batch), logits_to_keep=positions_P - 1).logits[0]
    return logprobs_from_logits(logits_PV, batch.input_ids_T[positions_P], temperature, with_entropy)
