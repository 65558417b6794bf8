"""LoRA's adapters in files: their names, the record beside them, and how they are merged into their base model's weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from searchr1.checkpoints.weight_hash import hash_base_model
from searchr1.config.schema_model import LoraConfig
from searchr1.errors import UserError

RECORD = "lora.json"
"""In a checkpoint's `actor` folder: what the adapters belong to."""
ADAPTER_NAME = "default"
"""The name that peft gives an adapter by default."""
BASE_LAYER = ".base_layer."
"""What peft inserts into the name of a weight that has an adapter."""
_MARKS = (".lora_A.", ".lora_B.")


def is_adapter(name: str) -> bool:
    """Return whether a parameter of this name is an A or a B."""
    return any(mark in name for mark in _MARKS)


def base_name(name: str) -> str:
    """Return the Hugging Face name of a base model's parameter, or of the weight that an adapter's A or B changes."""
    for mark in _MARKS:
        if mark in name:
            return name.partition(mark)[0] + ".weight"
    return name.replace(BASE_LAYER, ".")


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return W + scale * B A, a new fp32 tensor [out, in].

    Args:
        weight: W [out, in], of any precision.
        a: A [rank, in], fp32.
        b: B [out, rank], fp32.
        scale: alpha / rank.
    """
    return weight.float() + (b @ a) * scale


def peft_name(name: str) -> str:
    """Return the name of an A or a B in the files that peft writes."""
    return "base_model.model." + name.replace(f".{ADAPTER_NAME}.weight", ".weight")


def peft_settings(rank: int, alpha: float, target_modules: list[str]) -> dict[str, Any]:
    """Return the settings of the adapters under peft's names."""
    return {"r": rank, "lora_alpha": alpha, "target_modules": list(target_modules), "lora_dropout": 0.0, "bias": "none"}


@dataclass(frozen=True, slots=True)
class LoraRecord:
    """What the adapters of a checkpoint belong to."""

    base_model: str
    """Folder or hub name of the base model."""
    base_sha256: str
    """The hash of its weights, see `hash_base_model`."""
    rank: int
    alpha: float
    target_modules: list[str]

    @classmethod
    def of(cls, base_model: str, config: LoraConfig) -> LoraRecord:
        """Describe a run's base model and adapters; read the base model's files once per process."""
        return cls(base_model, hash_base_model(base_model), config.rank, config.alpha, sorted(config.target_modules))

    @classmethod
    def read(cls, folder: Path) -> LoraRecord | None:
        """Read the record of a checkpoint's `actor` folder; None if it holds a whole model.

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
        """Write the record beside the adapters."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


def check_base(record: LoraRecord, base_model: str, key: str) -> None:
    """Reject another base model than the adapters were trained on.

    Args:
        record: of the adapters.
        base_model: a folder or hub name.
        key: the setting or flag that names it.

    Raises:
        UserError: there is no model, or its weights differ.
    """
    try:
        found = hash_base_model(base_model)
    except UserError as error:
        raise UserError(f"{error}; give the base model's folder as {key}") from error
    if found != record.base_sha256:
        raise UserError(
            f"{base_model} is not the base model that these adapters were trained on, which was {record.base_model}: the "
            f"weights have another hash. Give that one's folder as {key}"
        )
