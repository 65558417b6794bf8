"""LoRA (https://arxiv.org/abs/2106.09685): a frozen base model whose linear layers compute W x + scale * B (A x).

W [out, in] is the base's; only A [rank, in] and B [out, rank] are trained, with scale = alpha / rank. Everything outside the
training step sees W + scale * B A under W's Hugging Face name, so that engines and exports need no notion of adapters.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from searchr1.config.schema_model import LoraConfig
from searchr1.errors import UserError

RECORD = "lora.json"
"""In a checkpoint's `actor` folder: what the adapters belong to."""
_ADAPTER = "default"  # the name that peft gives an adapter unless told otherwise
_BASE = ".base_layer."
_MARKS = (".lora_A.", ".lora_B.")


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Freeze a transformers model and put adapters into the layers that `target_modules` names; B starts at 0.

    The adapters are in fp32 whatever the base is in, because they are the optimizer's master copy.

    Raises:
        UserError: a name that no layer has, that is no linear layer, or that is tied to the embedding.
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


def peft_settings(rank: int, alpha: float, target_modules: list[str]) -> dict[str, Any]:
    """The same adapters in peft's words."""
    return {"r": rank, "lora_alpha": alpha, "target_modules": list(target_modules), "lora_dropout": 0.0, "bias": "none"}


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


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an A or a B."""
    return any(mark in name for mark in _MARKS)


def base_name(name: str) -> str:
    """The Hugging Face name of a base model's parameter, or of the weight that an adapter's A or B changes."""
    for mark in _MARKS:
        if mark in name:
            return name.partition(mark)[0] + ".weight"
    return name.replace(_BASE, ".")


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale * B A, a new fp32 tensor [out, in].

    Args:
        weight: W [out, in], of any precision.
        a: A [rank, in], fp32.
        b: B [out, rank], fp32.
        scale: alpha / rank.
    """
    return weight.float() + (b @ a) * scale


@torch.no_grad()
def full_weights(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Full tensors under their Hugging Face names, adapters merged; a collective, one tensor at a time.

    A tied output layer is left out. What no adapter changes may share memory with the model.

    Args:
        model: sharded or not, with adapters or without.
        dtype: of the tensors; shards are cast before they travel. None keeps the precision of what no adapter changes.
    """
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        if name.endswith(f"{_BASE}weight"):
            layer: Any = model.get_submodule(name.removesuffix(f"{_BASE}weight"))
            a, b = _full(layer.lora_A[_ADAPTER].weight), _full(layer.lora_B[_ADAPTER].weight)
            merged = merge(_full(parameter), a, b, layer.scaling[_ADAPTER])
            yield base_name(name), merged if dtype is None else merged.to(dtype)
        else:
            yield base_name(name), _full(parameter if dtype is None else parameter.to(dtype))


@torch.no_grad()
def full_adapters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All A and B under peft's names, in fp32; a collective, one tensor at a time."""
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            yield peft_name(name), _full(parameter)


def peft_name(name: str) -> str:
    """What an A or a B is called in the files that peft writes."""
    return "base_model.model." + name.replace(f".{_ADAPTER}.weight", ".weight")


def _full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


@dataclass(frozen=True, slots=True)
class LoraRecord:
    """What the adapters of a checkpoint belong to."""

    base_model: str
    """Folder or hub name of the base model."""
    base_sha256: str
    """Of its weights, see `hash_weights`."""
    rank: int
    alpha: float
    target_modules: list[str]

    @classmethod
    def of(cls, base_model: str, config: LoraConfig) -> LoraRecord:
        """Of a run's base model and adapters; reads the base model's files once per process."""
        return cls(base_model, hash_weights(base_model), config.rank, config.alpha, sorted(config.target_modules))

    @classmethod
    def read(cls, folder: Path) -> LoraRecord | None:
        """Of a checkpoint's `actor` folder; None if it holds a whole model.

        Raises:
            UserError: the record is damaged.
        """
        path = folder / RECORD
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}); use another checkpoint") from error

    def write(self, folder: Path) -> None:
        """Beside the adapters."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


def check_resume(folder: Path, base_model: str, config: LoraConfig) -> None:
    """Refuse a checkpoint whose adapters do not fit this run; where the base model lies does not matter, its weights do.

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
        found, wanted = getattr(record, name), getattr(ours, name)
        if found != wanted:
            raise UserError(f"actor.lora.{name}: {wanted} here, but {found} in {folder}; use the checkpoint's")
    check_base(record, base_model, "actor.model.path")


def check_base(record: LoraRecord, base_model: str, key: str) -> None:
    """Refuse another base model than the adapters were trained on.

    Args:
        record: of the adapters.
        base_model: a folder or hub name.
        key: the setting or flag that names it.

    Raises:
        UserError: there is no model, or its weights differ.
    """
    try:
        found = hash_weights(base_model)
    except UserError as error:
        raise UserError(f"{error}; give the base model's folder as {key}") from error
    if found != record.base_sha256:
        raise UserError(
            f"{base_model} is not the base model that these adapters were trained on, which was {record.base_model}: the "
            f"weights have another hash. Give that one's folder as {key}"
        )


def weight_folder(base_model: str) -> Path:
    """The local folder of a model, downloaded if it is a hub name.

    Raises:
        UserError: there is no such model.
    """
    from searchr1.checkpoints.hf_folder import local_folder

    return local_folder(base_model)


@functools.cache
def hash_weights(base_model: str) -> str:
    """SHA-256 over names and contents of the folder's safetensors files.

    Raises:
        UserError: there are none.
    """
    folder = weight_folder(base_model)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: LoRA needs the base model's weights in safetensors files, and finds none there")
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
