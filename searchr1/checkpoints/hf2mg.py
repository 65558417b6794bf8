"""`searchr1 convert hf2mg`: a Hugging Face folder -> a Megatron `torch_dist` checkpoint for any layout."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.filesize import decimal
from torch import Tensor

from searchr1.checkpoints.compare import SMALL_BYTES, compare, compare_logits
from searchr1.checkpoints.hf_folder import StoredWeights
from searchr1.checkpoints.hf_writer import copy_hf_files
from searchr1.checkpoints.locate import check_unused, new_folder
from searchr1.checkpoints.manifest import HF_FOLDER
from searchr1.checkpoints.mapping import Entry, entries
from searchr1.checkpoints.megatron_source import MegatronSource
from searchr1.checkpoints.model_folder import verify_weights, write_model_sums
from searchr1.checkpoints.model_shape import ModelShape, read_megatron_shape
from searchr1.checkpoints.safetensors import pieces
from searchr1.checkpoints.torch_dist import FILE_BYTES, TorchDistFolder, TorchDistWriter
from searchr1.checkpoints.weight_check import check_model_folder
from searchr1.errors import UserError
from searchr1.progress import ProgressBar

_LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.(.+)")
_STATEFUL = (
    "self_attention.linear_qkv", "self_attention.core_attention", "self_attention.linear_proj", "mlp.linear_fc1",
    "mlp.linear_fc2",
)  # fmt: skip
_STATEFUL_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")


@dataclass(frozen=True, slots=True)
class MegatronOptions:
    """Options of a conversion into a Megatron checkpoint."""

    dtype: torch.dtype | None = None
    """Precision of the output; None keeps the folder's."""
    layers: Literal["stacked", "separate"] = "stacked"
    """Megatron's default: one tensor for all layers. `separate` is what `non_homogeneous_layers` loads."""
    file_bytes: int = FILE_BYTES
    verify: bool = False
    verify_logits: bool = False


def hf2mg(hf_model: Path, output: Path, options: MegatronOptions | None = None) -> list[str]:
    """Write `output`. Return what was done, line by line.

    Args:
        hf_model: a local folder with config.json and safetensors files.
        output: must not exist, or be empty.
        options: precision, naming, comparisons.

    Raises:
        UserError: a damaged folder, one of a model without a mapping, or an output that is in use. Nothing is left behind.
    """
    options = options or MegatronOptions()
    check_unused(output)
    if not (hf_model / "config.json").is_file():
        raise UserError(f"--hf-model {hf_model}: has no config.json; give a local model folder")
    verify_weights(hf_model)
    check_model_folder(hf_model)
    arch, _ = read_megatron_shape(hf_model)
    with StoredWeights.open(hf_model, pickles=False) as reader:
        reader.check(arch)
        total = sum(_nbytes(entry, reader, options.dtype) for entry in entries(arch))
        with new_folder(output, total) as folder:
            _write(reader, arch, folder, options, total)
            (folder / HF_FOLDER).mkdir()
            copy_hf_files(hf_model, folder / HF_FOLDER, options.dtype or reader.dtype())
            lines = _verify(reader, arch, folder, options, total)
            write_model_sums(folder)
    return [f"{len(entries(arch))} tensors, {decimal(total)} -> {output}", *lines]


def _write(reader: StoredWeights, arch: ModelShape, folder: Path, options: MegatronOptions, total: int) -> None:
    with closing(TorchDistWriter(folder, options.file_bytes)) as writer, ProgressBar("converting", total) as bar:
        for entry in entries(arch):
            tensor = _cast(entry.read(reader.read, 0, 1), options.dtype, entry.name)
            layer = _LAYER.fullmatch(entry.name)
            if layer is None or options.layers == "separate":
                writer.add(entry.name, tensor)
            else:
                writer.add_layer(layer.group(1) + layer.group(3), tensor, int(layer.group(2)), arch.num_hidden_layers)
            bar.advance(tensor.nbytes)
            del tensor
        _write_extra_states(writer, arch, options.layers)
        writer.finish()


def _write_extra_states(writer: TorchDistWriter, arch: ModelShape, layers: str) -> None:
    modules = _STATEFUL + (_STATEFUL_NORMS if arch.qk_norm else ())
    for module in modules:
        for layer in range(arch.num_hidden_layers):
            if layers == "separate":
                writer.add_empty_object(f"decoder.layers.{layer}.{module}")
            else:
                writer.add_empty_object(f"decoder.layers.{module}", layer, arch.num_hidden_layers)
    writer.add_empty_object("decoder.final_layernorm")


def _verify(reader: StoredWeights, arch: ModelShape, folder: Path, options: MegatronOptions, total: int) -> list[str]:
    if not (options.verify or options.verify_logits):
        return []
    lines = []
    with closing(TorchDistFolder(folder)) as written:
        source = MegatronSource(written, arch)
        if options.verify:
            lines.append(compare(_pairs(reader, source), total, options.dtype))
        if options.verify_logits or total <= SMALL_BYTES:
            lines.append(compare_logits(source, reader.folder, reader.folder, options.dtype))
    return lines


def _pairs(reader: StoredWeights, source: MegatronSource) -> Iterator[tuple[str, Tensor, Tensor]]:
    for entry in source.entries:
        for name, tensor in entry.to_hugging_face([source.read(entry, check=True)]):
            yield name, reader.tensor(name), tensor


def _cast(tensor: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    if dtype is None or dtype == tensor.dtype:
        return tensor
    return torch.cat(list(pieces(tensor, dtype, name))).view(tensor.shape)


def _nbytes(entry: Entry, reader: StoredWeights, dtype: torch.dtype | None) -> int:
    return torch.Size(entry.global_shape).numel() * (dtype or reader.specs[entry.sources[0]].dtype).itemsize
