"""LoRA adapters in files: their names, their record, and their merge into the base model's weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from searchr1.checkpoints.hf_folder import StoredWeights
from searchr1.checkpoints.hf_writer import config_folder
from searchr1.checkpoints.locate import Carry, new_folder
from searchr1.checkpoints.mapping import SliceReader
from searchr1.checkpoints.model_folder import hash_base_model, write_model_sums
from searchr1.checkpoints.safetensors import SafetensorsWriter, TensorSpec
from searchr1.checkpoints.torch_dist import TorchDistFolder
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


_PREFIX = "model."
_NAMED = ".default.weight"


class LoraSource:
    """The merged model's tensors; one at a time is in memory."""

    def __init__(
        self,
        folder: TorchDistFolder,
        record: LoraRecord,
        base: StoredWeights,
        expected: dict[str, tuple[int, ...]],
        dtype: torch.dtype | None,
    ) -> None:
        """Compare names and shapes.

        Args:
            folder: the checkpoint.
            record: the one beside it.
            base: the base model's weights.
            expected: names and shapes of the architecture's parameters.
            dtype: of the output; None is the base model's.

        Raises:
            UserError: the base model or the adapters do not fit the architecture, by name.
        """
        self._folder, self._record, self._base, self._dtype = folder, record, base, dtype
        base.check_shapes(expected, tied="lm_head.weight" not in expected)
        self._names = [name for name in base.specs if name in expected]
        self._adapters = adapter_keys(folder)
        for target in {base_name(key.removeprefix(_PREFIX)) for key in self._adapters}:
            if target not in expected:
                raise UserError(
                    f"{folder.folder}: has an adapter for {target}, which the model lacks; it is of another model"
                )

    def specs(self) -> list[TensorSpec]:
        """Return what the folder will have, in the base model's precision unless another is asked for."""
        stored = [self._base.specs[name] for name in self._names]
        return [TensorSpec(spec.name, spec.shape, self._dtype or spec.dtype) for spec in stored]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors, in the order of `specs`; merged in fp32 and rounded once."""
        for name in self._names:
            yield name, self._tensor(name, check=False)

    def pairs(self, read: SliceReader) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (name, from here, from a Hugging Face folder)."""
        for name in self._names:
            source = self._tensor(name, check=True)
            yield name, source, read(name, 0, 0, len(source))

    def _tensor(self, name: str, check: bool) -> Tensor:
        base = self._base.tensor(name)
        stem = _PREFIX + name.removesuffix(".weight")
        a, b = (f"{stem}.lora_{which}{_NAMED}" for which in "AB")
        if a not in self._folder.tensors:
            return base if self._dtype is None else base.to(self._dtype)
        merged = merge(base, self._folder.read(a, check=check), self._folder.read(b, check=check), self._record.scale)
        return merged.to(self._dtype or base.dtype)


def adapter_keys(folder: TorchDistFolder) -> list[str]:
    """Return the checkpoint's names of all A and B, without their moments.

    Raises:
        UserError: there are none.
    """
    keys = [key for key in folder.tensors if key.startswith(_PREFIX) and is_adapter(key)]
    if not keys:
        raise UserError(f"{folder.folder} has no adapters, though its lora.json speaks of some; use another checkpoint")
    return keys


def write_adapter(
    folder: TorchDistFolder, record: LoraRecord, output: Path, hf_model: Path | None, carry: Carry | None = None
) -> list[str]:
    """Write a folder that `peft.PeftModel.from_pretrained` loads, with the tokenizer. Return what was done.

    Args:
        folder: the checkpoint.
        record: the one beside it.
        output: must not exist, or be empty.
        hf_model: whose tokenizer to take, and the base model's place that the folder names; None: as in the checkpoint.
        carry: called with the checkpoint and the new folder.

    Raises:
        UserError: damaged checkpoint, or an output that is in use. Nothing is left behind.
    """
    from peft import LoraConfig
    from transformers import AutoTokenizer

    keys = {peft_name(key.removeprefix(_PREFIX)): key for key in adapter_keys(folder)}
    specs = [TensorSpec(name, folder.shape(key), folder.dtype(key)) for name, key in keys.items()]
    tokenizer = config_folder(hf_model, folder.folder)
    with new_folder(output, sum(spec.nbytes for spec in specs)) as target:
        with SafetensorsWriter(target / "adapter_model.safetensors", specs) as writer:
            for name, key in keys.items():
                writer.write(name, folder.read(key, check=True))
        base = str(hf_model) if hf_model else record.base_model
        settings = peft_settings(record.rank, record.alpha, record.target_modules)
        config = LoraConfig(**settings, task_type="CAUSAL_LM", base_model_name_or_path=base, inference_mode=True)
        config.save_pretrained(str(target))
        if (tokenizer / "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).save_pretrained(target)
        carried = [carry(folder.folder, target)] if carry is not None else []
        write_model_sums(target)
    return [f"{len(specs)} adapter matrices of rank {record.rank} for {base} -> {output}", *carried]
