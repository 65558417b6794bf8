"""LoRA (https://arxiv.org/abs/2106.09685): a frozen base model whose linear layers compute W x + scale * B (A x).

W [out, in] is the base's; only A [rank, in] and B [out, rank] are trained, with scale = alpha / rank. Everything outside the
training step sees W + scale * B A under W's Hugging Face name, so that engines and exports need no notion of adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from searchr1.checkpoints.lora import (
    ADAPTER_NAME,
    BASE_LAYER,
    LoraRecord,
    base_name,
    check_base,
    is_adapter,
    merge,
    peft_name,
    peft_settings,
)
from searchr1.config.schema_model import LoraConfig
from searchr1.errors import UserError

_BASE_WEIGHT = f"{BASE_LAYER}weight"


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Freeze a transformers model and put adapters into the layers that `target_modules` names; B starts at 0.

    The adapters are in fp32 whatever the base is in, because they are the optimizer's master copy.

    Raises:
        UserError: a name that no layer has, that is not a linear layer, or that is tied to the embedding.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    _check_targets(model, config.target_modules)
    model.requires_grad_(False)
    with _stand_ins(model):
        inject_adapter_in_model(PeftConfig(**peft_settings(config.rank, config.alpha, config.target_modules)), model)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()


@contextmanager
def _stand_ins(model: nn.Module) -> Iterator[None]:
    """Put parameters without memory into the host's for a while, still without memory.

    peft draws adapters in host memory and moves them to the device of their base; on the meta device they would be lost.
    """
    waiting = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    ]
    for module, name, parameter in waiting:
        single = torch.zeros((), dtype=parameter.dtype)
        setattr(module, name, nn.Parameter(single.expand(parameter.shape), requires_grad=False))
    try:
        yield
    finally:
        for module, name, parameter in waiting:
            setattr(module, name, parameter)


def _check_targets(model: Any, targets: list[str]) -> None:
    key = "actor.lora.target_modules"
    output = model.get_output_embeddings()
    for target in targets:
        named = [module for name, module in model.named_modules() if name == target or name.endswith(f".{target}")]
        if not named:
            raise UserError(f"{key}: {type(model).__name__} has no layer named {target}")
        if not all(isinstance(module, nn.Linear) for module in named):
            raise UserError(f"{key}: {target} is not a linear layer; name the projections, for example q_proj")
        if output in named and output.weight is model.get_input_embeddings().weight:
            raise UserError(
                f"{key}: {target} shares its weights with the embedding in this model, and merging an adapter into it would "
                "change both; leave it out"
            )


@torch.no_grad()
def full_weights(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield full tensors under their Hugging Face names, adapters merged; a collective, one tensor at a time.

    A tied output layer is left out. What no adapter changes may share memory with the model.

    Args:
        model: sharded or not, with adapters or without.
        dtype: of the tensors; shards are cast before they travel. None keeps the precision of what no adapter changes.
    """
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        if name.endswith(_BASE_WEIGHT):
            layer: Any = model.get_submodule(name.removesuffix(_BASE_WEIGHT))
            a, b = _full(layer.lora_A[ADAPTER_NAME].weight), _full(layer.lora_B[ADAPTER_NAME].weight)
            merged = merge(_full(parameter), a, b, layer.scaling[ADAPTER_NAME])
            yield base_name(name), merged if dtype is None else merged.to(dtype)
        else:
            yield base_name(name), _full(parameter if dtype is None else parameter.to(dtype))


@torch.no_grad()
def full_adapters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all A and B under peft's names, in fp32; a collective, one tensor at a time."""
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            yield peft_name(name), _full(parameter)


def _full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def check_resume(folder: Path, base_model: str, config: LoraConfig) -> None:
    """Reject a checkpoint whose adapters do not fit this run; where the base model lies does not matter, its weights do.

    Raises:
        UserError: names what differs.
    """
    record = LoraRecord.read(folder)
    if record is None and config.rank == 0:
        return
    if record is None:
        raise UserError(f"{folder} holds a whole model, not adapters: set actor.lora.rank to 0, or start a new run")
    if config.rank == 0:
        raise UserError(f"{folder} holds LoRA adapters: set actor.lora.rank to {record.rank}, or start a new run")
    ours = LoraRecord.of(base_model, config)
    for name in ("rank", "alpha", "target_modules"):
        stored, wanted = getattr(record, name), getattr(ours, name)
        if stored != wanted:
            raise UserError(f"actor.lora.{name}: {wanted} here, but {stored} in {folder}; use the checkpoint's")
    check_base(record, base_model, "actor.model.path")
