"""What differs between a model of which each rank reads its rows and one that is read whole: for `policy_ranks`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from searchr1.config.schema_model import LoraConfig
from searchr1.device import Device
from searchr1.learner.packing import pack
from support.trajectories import random_trajectories

PIECE_BYTES = 4096


def differences(job: dict[str, Any]) -> list[str]:
    """Names of all tensors and properties that are not the same, bit by bit; none if all is well."""
    from searchr1.learner.model import init_process_group

    if job["name"] == "loading-small":
        return small_differences(Path(job["model"]))
    init_process_group(device_of(job), host_tensors=job.get("cpu_offload", False))
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
    if job.get("device"):  # sums on a GPU have no fixed order
        return found
    gradients = [{name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in models]
    if not job.get("reference"):
        assert gradients[0]
    return found + compare("gradient", *gradients)


class Small(nn.Module):
    """Fewer rows than ranks, and buffers that are stored."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three = nn.Linear(5, 1), nn.Linear(5, 3)
        self.register_buffer("scalar", torch.tensor(1.5))
        self.register_buffer("vector", torch.arange(3, dtype=torch.int32))


def small_differences(folder: Path) -> list[str]:
    """Of a module of our own, filled from the file in `folder`."""
    from torch.distributed.fsdp import fully_shard

    from searchr1.learner.model import fill, init_process_group

    init_process_group(Device.detect("cpu"))
    with torch.device("meta"):
        model = Small()
    fully_shard(model)
    fill(model, folder, on_host=False)
    expected = load_file(folder / "model.safetensors")
    found = {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in model.state_dict().items()
    }
    return compare("", expected, {name: found[name] for name in expected}) + sorted(set(found) ^ set(expected))


def device_of(job: dict[str, Any]) -> Device:
    return Device.detect(job.get("device", "cpu"))


def lora_of(job: dict[str, Any]) -> LoraConfig | None:
    return LoraConfig(**job["lora"]) if "lora" in job else None


def load_rows(job: dict[str, Any]) -> nn.Module:
    """As the actor, the reference model or the critic starts, a few rows at a time.

    Raises:
        AssertionError: more is read of the files than what this rank holds of them, or in larger pieces than it should.
    """
    from searchr1.checkpoints.lora import is_adapter
    from searchr1.learner import model as loading

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
    from searchr1.learner.fsdp import FsdpValueBackend
    from searchr1.learner.model import load_model

    if job.get("critic"):
        from searchr1.learner.trainer_config import TrainerConfig
        from support.policy_ranks import critic_config

        config = critic_config(job["model"])
        config.actor.seed, config.actor.fsdp.liger = 7, False
        return FsdpValueBackend.start(TrainerConfig.for_critic(config), device_of(job)).model
    return load_model(job["model"], device_of(job), **settings_of(job))


def settings_of(job: dict[str, Any]) -> dict[str, Any]:
    return {
        "precision": job.get("precision", "fp32"),
        "trainable": not job.get("reference"),
        "lora": lora_of(job),
        "cpu_offload": job.get("cpu_offload", False),
    }


def load_whole(job: dict[str, Any]) -> nn.Module:
    """The whole model in host memory, then sharded."""
    from transformers import AutoModel, AutoModelForCausalLM

    from searchr1.learner.fsdp import ValueModel
    from searchr1.learner.model import COMPUTE_DTYPES, shard_model

    lora, precision = lora_of(job), job.get("precision", "fp32")
    held = COMPUTE_DTYPES[precision] if lora and lora.base_precision == "compute" else torch.float32
    kind = AutoModel if job.get("critic") else AutoModelForCausalLM
    device = device_of(job)
    model = kind.from_pretrained(job["model"], dtype=held, attn_implementation="searchr1_packed")
    if job.get("critic"):
        model = ValueModel(model)
    return shard_model(model, device, **settings_of(job))


def tensors_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """With both names of a tied one."""
    yield from model.named_parameters(remove_duplicate=False)
    for name, buffer in model.named_buffers():
        persistent = name in model.state_dict()
        yield f"{name} ({'stored' if persistent else 'computed'})", buffer


def run(model: nn.Module, job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Forward and backward of two packed batches."""
    from searchr1.learner.model import policy_logprobs

    found = {}
    for number, batch in enumerate(pack(random_trajectories(1)[0], 200)[:2]):
        batch = batch.to(device_of(job).torch_device())
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
    if (left.shape, left.device, left.is_pinned()) != (right.shape, right.device, right.is_pinned()):
        return False
    as_bytes = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return torch.equal(*as_bytes)
