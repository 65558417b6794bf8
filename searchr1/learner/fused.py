"""Fewer and larger kernels in transformers' decoder layers: norms, rotations and activations are small operations that a GPU
spends as long on as on a third of the matrix products."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AttentionInterface

from searchr1.device import Device, have_liger
from searchr1.errors import UserError
from searchr1.learner.attention import NAME, packed_attention

LIGER_FAMILIES = ("qwen2", "qwen3", "llama")
"""`model_type` of those whose Liger kernels are compared with transformers' own layers (tests/learner/test_fused.py)."""


def use_liger(model: Any, device: Device, asked: bool | None) -> bool:
    """Replace norms, rotations and SwiGLU of a model by Liger's Triton kernels, which compute the same.

    Args:
        model: with the decoder as `model.model`, before it is sharded.
        device: where it will run.
        asked: `actor.fsdp.liger`; None: where it can be done.

    Returns:
        Whether it was done; the first rank prints that, and a reason if it was not done on a GPU.

    Raises:
        UserError: asked for, but impossible.
    """
    obstacle = _liger_obstacle(model.config.model_type, device)
    if asked and obstacle:
        raise UserError(f"actor.fsdp.liger: {obstacle}; leave the key out, or set it to False")
    if asked is not False and (obstacle is None or device.is_cuda):
        _print_once(f"actor: norms, rotations and SwiGLU are {f'not fused: {obstacle}' if obstacle else 'kernels of Liger'}")
    if asked is False or obstacle:
        return False
    apply_liger(model)
    return True


def _liger_obstacle(family: str, device: Device) -> str | None:
    if not device.is_cuda:
        return "Triton's kernels need a GPU"
    if not have_liger():
        return "liger_kernel is not installed"
    if family not in LIGER_FAMILIES:
        return f"model_type {family!r} is not one of {', '.join(LIGER_FAMILIES)}"
    return None


def apply_liger(model: Any) -> None:
    """Put Liger's kernels into a model, but for the loss, which works on policy tokens only.

    The rotation is replaced in transformers' module, so for every model of the family in this process.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    # It tries backends for other hardware as well, and warns of each that is not there.
    logging.getLogger("liger_kernel.backends.registry").setLevel(logging.ERROR)
    MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type](
        rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=model.model
    )


def use_compile(layers: nn.ModuleList, device: Device) -> None:
    """Let torch.compile fuse what is between the attention and the matrix products of each decoder layer.

    FSDP2's hooks and recomputation stay outside of what is compiled, and attention is called as it is: one compilation
    serves all layers and all lengths.

    Raises:
        UserError: on a CPU, or where torch.compile is switched off.
    """
    if not device.is_cuda:
        raise UserError("actor.fsdp.compile: needs a GPU; set it to False")
    if os.environ.get("TORCHDYNAMO_DISABLE", "0") == "1":
        raise UserError("actor.fsdp.compile: torch.compile is switched off; unset TORCHDYNAMO_DISABLE, or set it to False")
    compile_layers(layers)
    _print_once("actor: decoder layers are compiled; the first steps are slow")


def compile_layers(layers: nn.ModuleList, backend: str = "inductor") -> None:
    """Compile each layer's `forward`, before it is sharded."""
    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=True)


def _print_once(line: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(line, flush=True)
