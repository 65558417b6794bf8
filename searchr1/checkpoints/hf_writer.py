"""A Hugging Face folder: weights in one file or several with an index, configuration, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from searchr1.checkpoints.hf_folder import INDEX, SINGLE
from searchr1.checkpoints.manifest import HF_FOLDER
from searchr1.checkpoints.model_folder import MODEL_SUMS, check_files
from searchr1.checkpoints.safetensors import SafetensorsWriter, TensorSpec
from searchr1.errors import UserError

SHARD_BYTES = 4 << 30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def plan_shards(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Return consecutive tensors in files of at most `shard_bytes`; a larger tensor has a file of its own."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def stream_weights(specs: Sequence[TensorSpec], named: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> None:
    """Write tensors as they come, in the order of `specs` and in their precision; one is in memory at a time.

    Raises:
        UserError: a value does not fit the precision.
        OSError: the disk.
    """
    shards = plan_shards(specs, shard_bytes)
    names = [_file_name(number, len(shards)) for number in range(len(shards))]
    tensors = iter(named)
    for file, shard in zip(names, shards, strict=True):
        with SafetensorsWriter(folder / file, shard) as writer:
            for spec in shard:
                name, tensor = next(tensors)
                assert name == spec.name, (name, spec.name)
                writer.write(name, tensor)
                del tensor
    assert next(tensors, None) is None
    if len(shards) > 1:
        _write_index(folder, {spec.name: file for file, shard in zip(names, shards, strict=True) for spec in shard}, specs)


def write_weights(named: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Write tensors whose shapes are not known before they come; a file's worth is in memory. Returns their number."""
    shards: list[list[TensorSpec]] = []
    for number, group in enumerate(_groups(named, shard_bytes)):
        specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in group.items()]
        shards.append(specs)
        with SafetensorsWriter(folder / f"shard-{number}", specs) as writer:
            for name, tensor in group.items():
                writer.write(name, tensor)
    weight_map: dict[str, str] = {}
    for number, specs in enumerate(shards):
        file = _file_name(number, len(shards))
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= {spec.name: file for spec in specs}
    if len(shards) > 1:
        _write_index(folder, weight_map, [spec for specs in shards for spec in specs])
    return len(weight_map)


def _groups(named: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    current: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named:
        if current and size + tensor.nbytes > shard_bytes:
            yield current
            current, size = {}, 0
        current[name] = tensor
        size += tensor.nbytes
    yield current


def _file_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_index(folder: Path, weight_map: dict[str, str], specs: Sequence[TensorSpec]) -> None:
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_hf_files(source: Path, output: Path, dtype: torch.dtype | None) -> None:
    """Copy configuration, generation configuration, tokenizer and chat template; write the precision into the configuration.

    Raises:
        UserError: config.json is damaged.
    """
    for path in sorted(source.iterdir()):
        if path.name == MODEL_SUMS:
            continue
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and "safetensors" not in path.name:
            shutil.copyfile(path, output / path.name)
    if dtype is not None:
        try:
            config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source / 'config.json'} is damaged: {error}") from error
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def config_folder(given: Path | None, checkpoint: Path) -> Path:
    """Return where the configuration and tokenizer come from: the folder given, else the checkpoint's own.

    Raises:
        UserError: it has no config.json, or a file that no library should open.
    """
    if given is not None:
        if not (given / "config.json").is_file():
            raise UserError(f"--hf-model {given}: has no config.json; give the folder of the base model")
        check_files(given)
        return given
    for folder in (checkpoint, *checkpoint.absolute().parents[:2]):  # verl keeps it beside the weights' folder
        for name in (HF_FOLDER, "huggingface"):
            if (folder / name / "config.json").is_file():
                check_files(folder / name)
                return folder / name
    raise UserError(f"{checkpoint}: keeps no {HF_FOLDER}/config.json; give the base model's folder as --hf-model")
