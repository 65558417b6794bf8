"""Read and write PyTorch distributed checkpoints (Megatron's `torch_dist`, FSDP's DCP) by slices of tensors."""

from __future__ import annotations

import gc
import io
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from searchr1.checkpoints.metadata import METADATA, read_metadata, reason
from searchr1.checkpoints.pickles import FilePart
from searchr1.checkpoints.torch_files import load_part
from searchr1.errors import UserError
from searchr1.files.checksums import Damage

_LARGE_BYTES = 256 << 20
"""From here on a full collection (about a tenth of a second) is worth its time."""

Box = tuple[tuple[int, int], ...]
"""Start and stop in every dimension."""


class TensorFolder(Protocol):
    """A checkpoint's tensors, whatever its format."""

    folder: Path

    @property
    def tensors(self) -> Collection[str]:
        """Their keys."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the precision of a tensor."""

    def read(self, name: str, layer: int | None = None, check: bool = False) -> Tensor:
        """Return a whole tensor, or one layer of a stacked one; `check` compares checksums too."""

    def close(self) -> None:
        """Let the files go."""


class TorchDistFolder:
    """An open checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        """Read the metadata and compare it with the files, whose contents are not read yet.

        Raises:
            UserError: damaged metadata; a file is missing or cut short, by name.
        """
        self.folder = folder
        found = read_metadata(folder)
        self._storage: dict[MetadataIndex, Any] = found.storage_data
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: item for name, item in found.state_dict_metadata.items() if isinstance(item, TensorStorageMetadata)
        }
        self._open: tuple[str, IO[bytes]] | None = None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return tuple(self.tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """Return the precision of a tensor."""
        return self.tensors[name].properties.dtype

    def read(self, name: str, layer: int | None = None, check: bool = False) -> Tensor:
        """Return a whole tensor, or the part of a stacked one at an index of its first dimension (which is then left out).

        Args:
            name: its key.
            layer: the index.
            check: also compare the checksums that `torch.save` stored.

        Raises:
            UserError: damaged; names the file.
        """
        item = self.tensors[name]
        box: Box = tuple((0, size) for size in item.size)
        if layer is not None:
            box = ((layer, layer + 1), *box[1:])
        found = [(chunk, common) for chunk in item.chunks if (common := _overlap(chunk, box)) is not None]
        if len(found) == 1 and found[0][1] == box:  # no copy of a tensor that lies in one chunk
            chunk, common = found[0]
            target = self._chunk(name, chunk, check)[_within(common, chunk)]
        else:
            target = self._assemble(name, box, found, check)
        return target if layer is None else target[0]

    def _assemble(self, name: str, box: Box, found: list[tuple[ChunkStorageMetadata, Box]], check: bool) -> Tensor:
        sizes = [stop - start for start, stop in box]
        missing = math.prod(sizes) - sum(math.prod(stop - start for start, stop in common) for _, common in found)
        if missing:  # before memory is taken for it
            raise UserError(f"{self.folder}: {name} is not whole: {missing} of its elements are in no file")
        target = torch.empty(sizes, dtype=self.dtype(name))
        for chunk, common in found:
            part = target[tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, box, strict=True))]
            part.copy_(self._chunk(name, chunk, check)[_within(common, chunk)])
        return target

    def damaged_parts(self, advance: Callable[[int], object]) -> Iterator[Damage]:
        """Yield files in which a part does not fit the checksum that `torch.save` stored, the first part of each."""
        parts: dict[str, list[tuple[int, int, str]]] = {}
        for index, info in self._storage.items():
            parts.setdefault(info.relative_path, []).append((info.offset, info.length, index.fqn))
        for name, places in sorted(parts.items()):
            for offset, length, tensor in sorted(places):
                problem = self._problem(name, offset, length)
                advance(length)
                if problem:
                    yield Damage(self.folder / name, f"is damaged where {tensor} should be ({problem})")
                    break

    def _problem(self, name: str, offset: int, length: int) -> str:
        try:
            with zipfile.ZipFile(FilePart(self._file(name), offset, length)) as archive:
                bad = archive.testzip()
        except (OSError, ValueError, NotImplementedError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
            return str(error) or repr(error)
        return f"wrong checksum of {bad}" if bad else ""

    def _chunk(self, name: str, chunk: ChunkStorageMetadata, check: bool) -> Tensor:
        info = self._storage.get(MetadataIndex(name, chunk.offsets))
        if info is None:
            raise UserError(f"{self.folder / METADATA} does not say where {name} is; use another checkpoint")
        file = self._file(info.relative_path)
        try:
            if check:
                with zipfile.ZipFile(FilePart(file, info.offset, info.length)) as archive:
                    bad = archive.testzip()
                if bad:
                    raise ValueError(f"wrong checksum of {bad}")
            part = io.BufferedReader(FilePart(file, info.offset, info.length))
            found = load_part(part)
            if not isinstance(found, Tensor):
                raise ValueError("it is not a tensor")
            # torch.load leaves reference cycles that keep its storages; broken now, the memory goes when the tensor does.
            gc.collect(2 if found.nbytes >= _LARGE_BYTES else 0)
            if found.shape != chunk.sizes or found.dtype != self.dtype(name):
                raise ValueError(f"it is {tuple(found.shape)}, {found.dtype}")
        except Exception as error:  # a damaged part can raise anything
            raise UserError(
                f"{self.folder / info.relative_path} is damaged where {name} should be ({reason(error)}); copy "
                "the checkpoint again or use another one"
            ) from error
        return found

    def _file(self, name: str) -> IO[bytes]:
        if self._open is None or self._open[0] != name:
            self.close()
            self._open = (name, (self.folder / name).open("rb", buffering=0))
        return self._open[1]

    def close(self) -> None:
        """Close the file read last."""
        if self._open is not None:
            self._open[1].close()
            self._open = None


def _overlap(chunk: ChunkStorageMetadata, box: Box) -> Box | None:
    found = tuple(
        (max(offset, start), min(offset + size, stop))
        for offset, size, (start, stop) in zip(chunk.offsets, chunk.sizes, box, strict=True)
    )
    return found if all(start < stop for start, stop in found) else None


def _within(common: Box, chunk: ChunkStorageMetadata) -> tuple[slice, ...]:
    return tuple(slice(start - offset, stop - offset) for (start, stop), offset in zip(common, chunk.offsets, strict=True))


FILE_BYTES = 4 << 30
_MEGATRON = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_COMMON = {"checkpoint_version": 3.0}
"""Megatron-LM takes a checkpoint without this for one of an age in which queries, keys and values lay in another order."""


class TorchDistWriter:
    """A checkpoint folder in the making."""

    def __init__(self, folder: Path, file_bytes: int = FILE_BYTES) -> None:
        self._folder = folder
        self._file_bytes = file_bytes
        self._files = 0
        self._file: IO[bytes] | None = None
        self._tensors: dict[str, STORAGE_TYPES] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}

    def add(self, key: str, tensor: Tensor) -> None:
        """Write a whole tensor."""
        self._add(key, tensor, torch.Size([0] * tensor.ndim), tensor.shape)

    def add_layer(self, key: str, tensor: Tensor, layer: int, layers: int) -> None:
        """Write one layer's part of a stacked tensor [layers, …]."""
        self._add(key, tensor[None], torch.Size([layer, *[0] * tensor.ndim]), torch.Size([layers, *tensor.shape]))

    def _add(self, key: str, tensor: Tensor, offsets: torch.Size, size: torch.Size) -> None:
        tensor = tensor.contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save writes whole storages
        file = self._current()
        start = file.tell()
        torch.save(tensor, file)
        item = self._tensors.setdefault(key, TensorStorageMetadata(TensorProperties(tensor.dtype), size, []))
        assert isinstance(item, TensorStorageMetadata)
        index = MetadataIndex(key, offsets, len(item.chunks))
        item.chunks.append(ChunkStorageMetadata(offsets, tensor.shape))
        self._storage[index] = _StorageInfo(_file_name(self._files - 1), start, file.tell() - start)

    def add_empty_object(self, module: str, index: int = 0, count: int = 1) -> None:
        """Write the `_extra_state` (of fp8) that Megatron's and Transformer Engine's modules ask for: none.

        Args:
            module: its key.
            index: its place among the stacked layers.
            count: how many those are.
        """
        key = f"{module}._extra_state/shard_{index}_{count}"
        file = self._current()
        start = file.tell()
        torch.save([None], file)
        self._tensors[key] = BytesStorageMetadata()
        self._storage[MetadataIndex(key)] = _StorageInfo(_file_name(self._files - 1), start, file.tell() - start)

    def _current(self) -> IO[bytes]:
        if self._file is not None and self._file.tell() >= self._file_bytes:
            self.close()
        if self._file is None:
            self._file = (self._folder / _file_name(self._files)).open("wb")
            self._files += 1
        return self._file

    def finish(self) -> None:
        """Write what makes the folder a checkpoint: PyTorch's metadata, Megatron's, and the empty common state."""
        self.close()
        metadata = Metadata(
            state_dict_metadata=self._tensors,
            planner_data={},
            storage_data=self._storage,
            storage_meta=StorageMeta(),
            version=CURRENT_DCP_VERSION,
        )
        (self._folder / METADATA).write_bytes(pickle.dumps(metadata))
        torch.save(_COMMON, self._folder / "common.pt")
        (self._folder / "metadata.json").write_text(json.dumps(_MEGATRON), encoding="utf-8")

    def close(self) -> None:
        """Finish the current file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _file_name(number: int) -> str:
    return f"__0_{number}.distcp"
