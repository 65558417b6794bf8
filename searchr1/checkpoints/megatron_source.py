"""A Megatron checkpoint's tensors, whichever of the ways of naming them it was saved with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from searchr1.checkpoints.hf_folder import check_names
from searchr1.checkpoints.mapping import Entry, SliceReader, entries
from searchr1.checkpoints.model_shape import ModelShape, read_megatron_shape
from searchr1.checkpoints.safetensors import TensorSpec
from searchr1.checkpoints.torch_dist import TensorFolder, TorchDistFolder
from searchr1.errors import UserError

MAX_PADDING = 8192
"""Rows. Megatron pads the vocabulary to a multiple of 128 times the tensor-parallel size; more than this is not padding."""

_PREFIX = "model."
_LAYERS = "decoder.layers."
_STACKED = re.compile(r"decoder\.layers\.(?!\d+\.)(.+)")
_HALVES = ("_w", "_v")
"""With `singleton_local_shards`, fc1's gate and up halves have keys of their own."""


@dataclass(frozen=True, slots=True)
class Place:
    """The place of one layer's tensor: a key, and an index into a stacked tensor."""

    key: str
    layer: int | None


def is_megatron(folder: TensorFolder) -> bool:
    """Return whether the keys are Megatron's."""
    return any(name.removeprefix(_PREFIX).startswith((_LAYERS, "embedding.")) for name in folder.tensors)


class MegatronSource:
    """The tensors of `mapping.entries`, whole, out of a Megatron checkpoint."""

    def __init__(self, folder: TensorFolder, arch: ModelShape) -> None:
        """Find every tensor.

        Raises:
            UserError: FSDP's checkpoint; missing, unexpected or misshapen tensors, by name.
        """
        if not is_megatron(folder):
            kind = "an FSDP checkpoint: use searchr1 convert fsdp2hf" if _is_fsdp(folder) else "not a Megatron checkpoint"
            raise UserError(f"{folder.folder} is {kind}")
        self.folder = folder
        self.entries = entries(arch)
        self._arch = arch
        self._places = _find_places(folder)
        self._check(folder.folder)

    def _check(self, where: Path) -> None:
        found = {name: self._shape(name) for name in self._places}
        expected = {entry.name: entry.global_shape for entry in self.entries}
        vocab, padded = self._arch.vocab_size, self._arch.padded_vocab
        for entry in self.entries:
            if entry.kind == "vocab" and entry.name in found:
                rows, *rest = found[entry.name]
                if not vocab <= rows < vocab + MAX_PADDING:
                    raise UserError(
                        f"{where}: {entry.name} has {rows} rows, but config.json says vocab_size={vocab}: "
                        "they belong to different models"
                    )
                found[entry.name] = (padded, *rest)
        check_names(found, expected, str(where))

    def _shape(self, name: str) -> tuple[int, ...]:
        places = self._places[name]
        rows, *rest = (self.folder.shape(places[0].key))[places[0].layer is not None :]
        return (rows * len(places), *rest)

    def read(self, entry: Entry, check: bool = False) -> Tensor:
        """Return a whole tensor, of a vocabulary the rows that the model has; `check` as in `TorchDistFolder.read`."""
        parts = [self.folder.read(place.key, place.layer, check) for place in self._places[entry.name]]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole[: self._arch.vocab_size] if entry.kind == "vocab" else whole

    def specs(self) -> list[TensorSpec]:
        """Return what the Hugging Face folder will have, in the checkpoint's precision."""
        return [
            TensorSpec(name, shape, self.folder.dtype(self._places[entry.name][0].key))
            for entry in self.entries
            for name, shape in zip(entry.sources, entry.shapes, strict=True)
        ]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield Hugging Face's tensors, in the order of `specs`."""
        for entry in self.entries:
            yield from entry.to_hugging_face([self.read(entry)])

    def pairs(self, read: SliceReader) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (name, a tensor from here, the same one from a Hugging Face folder), both in Megatron's layout."""
        for entry in self.entries:
            again = entry.read(read, 0, 1)
            source = self.read(entry, check=True)
            yield entry.name, source, again[: len(source)]


def check_megatron_checkpoint(folder: Path, config_folder: str) -> None:
    """Compare a `torch_dist` checkpoint's names and shapes with a model's config.json; Megatron itself ignores what is more.

    Raises:
        UserError: missing, unexpected or misshapen tensors, by name; a damaged checkpoint.
    """
    arch, _ = read_megatron_shape(config_folder)
    with closing(TorchDistFolder(folder)) as checkpoint:
        MegatronSource(checkpoint, arch)


def _is_fsdp(folder: TensorFolder) -> bool:
    return any(name.startswith(_PREFIX) for name in folder.tensors)


def _find_places(folder: TensorFolder) -> dict[str, list[Place]]:
    """Return the places of each name in the table: stacked tensors layer by layer, without the optimizer's."""
    found: dict[str, list[Place]] = {}
    for key in folder.tensors:
        if "optimizer." in key or "_extra_state" in key:
            continue
        name = key.removeprefix(_PREFIX)
        base = name[:-2] if name.endswith(tuple("linear_fc1.weight" + half for half in _HALVES)) else name
        stacked = _STACKED.fullmatch(base)
        if stacked is None:
            found.setdefault(base, []).append(Place(key, None))
            continue
        for layer in range(folder.shape(key)[0]):
            found.setdefault(f"{_LAYERS}{layer}.{stacked.group(1)}", []).append(Place(key, layer))
    for places in found.values():  # the gate before the up half
        places.sort(key=lambda place: place.key.endswith(_HALVES[1]))
    return found
