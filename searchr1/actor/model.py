"""The policy as a sharded transformers model."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from searchr1.actor import attention
from searchr1.actor.attention import packed_model_inputs
from searchr1.actor.fused import use_compile, use_liger
from searchr1.actor.loading import build_model, fill
from searchr1.actor.lora import add_adapters
from searchr1.actor.packing import PackedBatch
from searchr1.algorithms.entropy import TokenLogprobs, logprobs_from_logits
from searchr1.config.schema_model import FsdpConfig, LoraConfig
from searchr1.device import Device

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
    """A causal language model from a Hugging Face folder, sharded over the process group with FSDP2.

    Every rank reads only its own rows (loading.py). Weights are held in fp32 (they are the optimizer's master copy) and
    computed with in `precision`. With `lora` of rank 1 or more they are frozen, and adapters are trained instead (lora.py).

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
    return model


def policy_logprobs(model: nn.Module, batch: PackedBatch, temperature: float, with_entropy: bool = False) -> TokenLogprobs:
    """Log-probabilities of the P policy tokens of a packed micro-batch; only their positions reach the output layer.

    Returns:
        [P] values, in the order of `batch.policy_positions_P`.
    """
    positions_P = batch.policy_positions_P
    logits_PV: Tensor = model(**packed_model_inputs(batch), logits_to_keep=positions_P - 1).logits[0]
    return logprobs_from_logits(logits_PV, batch.input_ids_T[positions_P], temperature, with_entropy)
