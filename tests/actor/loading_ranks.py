"""What differs between a model of which each rank reads its rows and one that is read whole: for `policy_ranks`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from policy_ranks import make_trajectories
from torch import nn
from torch.distributed.tensor import DTensor

from searchr1.actor.packing import pack
from searchr1.config.schema_model import LoraConfig
from searchr1.device import Device

CPU = Device.detect("cpu")
PIECE_BYTES = 4096


def differences(job: dict[str, Any]) -> list[str]:
    """Names of all tensors and properties that are not the same, bit by bit; none if all is well."""
    from searchr1.actor.model import init_process_group

    init_process_group(CPU)
    models, randoms = [], []
    for load in (load_whole, load_rows):
        torch.manual_seed(7)
        models.append(load(job))
        randoms.append(torch.get_rng_state())
    whole, rows = models
    found = ["random state"] * (not torch.equal(*randoms))
    found += [f"{name} is still empty" for name, tensor in tensors_of(rows) if tensor.is_meta]
    found += compare("", dict(tensors_of(whole)), dict(tensors_of(rows)))
    found += compare("output", run(whole, job), run(rows, job))
    gradients = [{name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in models]
    if not job.get("reference"):
        assert gradients[0]
    return found + compare("gradient", *gradients)


def lora_of(job: dict[str, Any]) -> LoraConfig | None:
    return LoraConfig(**job["lora"]) if "lora" in job else None


def load_rows(job: dict[str, Any]) -> nn.Module:
    """As the actor, the reference model or the critic starts, a few rows at a time.

    Raises:
        AssertionError: more is read of the files than what this rank holds of them, or in larger pieces than it should.
    """
    from searchr1.actor import loading
    from searchr1.actor.lora import is_adapter

    pieces: list[torch.Tensor] = []
    read = loading.StoredWeights.read

    def counted(*args: Any) -> torch.Tensor:
        pieces.append(read(*args))
        return pieces[-1]

    with mock.patch.object(loading.StoredWeights, "read", counted), mock.patch.object(loading, "PIECE_BYTES", PIECE_BYTES):
        model = start(job)
    if "experts" in job["name"]:  # transformers reads them
        assert not pieces
        return model
    names = [name for name, _ in model.named_parameters() if not is_adapter(name) and not name.startswith("value_head")]
    local = sum(model.get_parameter(name).to_local().numel() for name in names)
    copies = [piece.numel() for piece in pieces] if job["name"] != "loading-tied-copy" else None
    assert copies is None or sum(copies) == local, (sum(copies), local)
    assert all(piece.nbytes <= PIECE_BYTES or len(piece) == 1 for piece in pieces[-len(names) :])
    assert len(pieces) > len(names)
    return model


def start(job: dict[str, Any]) -> nn.Module:
    from searchr1.actor.fsdp_value import FsdpValueBackend
    from searchr1.actor.model import load_model

    if job.get("critic"):
        from policy_ranks import critic_config

        from searchr1.config.critic import critic_run

        run = critic_run(critic_config(job["model"]))
        run.actor.seed = 7
        return FsdpValueBackend.start(run, CPU, None).model
    settings = {"precision": job.get("precision", "fp32"), "trainable": not job.get("reference"), "lora": lora_of(job)}
    return load_model(job["model"], CPU, **settings)


def load_whole(job: dict[str, Any]) -> nn.Module:
    """The whole model in host memory, then sharded."""
    from transformers import AutoModel, AutoModelForCausalLM

    from searchr1.actor.fsdp_value import ValueModel
    from searchr1.actor.model import COMPUTE_DTYPES, shard_model

    lora, precision = lora_of(job), job.get("precision", "fp32")
    held = COMPUTE_DTYPES[precision] if lora and lora.base_precision == "compute" else torch.float32
    kind = AutoModel if job.get("critic") else AutoModelForCausalLM
    model = kind.from_pretrained(job["model"], dtype=held, attn_implementation=CPU.attention_implementation)
    if job.get("critic"):
        model = ValueModel(model)
    return shard_model(model, CPU, precision=precision, trainable=not job.get("reference"), lora=lora)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """With both names of a tied one."""
    yield from model.named_parameters(remove_duplicate=False)
    for name, buffer in model.named_buffers():
        persistent = name in model.state_dict()
        yield f"{name} ({'stored' if persistent else 'computed'})", buffer


def run(model: nn.Module, job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Forward and backward of two packed batches."""
    from searchr1.actor.model import policy_logprobs

    found = {}
    for number, batch in enumerate(pack(make_trajectories(1)[0], 200)[:2]):
        with torch.set_grad_enabled(not job.get("reference")):
            values = model(batch) if job.get("critic") else policy_logprobs(model, batch, 0.8).logprobs_M
            if not job.get("reference"):
                values.float().square().sum().backward()
        found[str(number)] = values.detach()
    return found


def compare(kind: str, left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    if list(left) != list(right):
        return [f"{kind} names: {sorted(set(left) ^ set(right))} or their order"]
    return [f"{kind} {name}" for name in left if not same(left[name], right[name])]


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if (left.shape, left.stride(), left.dtype, left.requires_grad) != (
        right.shape, right.stride(), right.dtype, right.requires_grad,
    ):  # fmt: skip
        return False
    if isinstance(left, DTensor) != isinstance(right, DTensor):
        return False
    if isinstance(left, DTensor):
        if left.placements != right.placements:
            return False
        left, right = left.to_local(), right.to_local()
    if left.shape != right.shape or left.device != right.device:
        return False
    as_bytes = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return torch.equal(*as_bytes)
