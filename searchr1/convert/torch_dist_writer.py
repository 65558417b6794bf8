"""Write a `torch_dist` checkpoint tensor by tensor, without Megatron and without a process group.

PyTorch's own writer keeps every tensor of a file until the file is complete; here one is in memory at a time.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import IO

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

from searchr1.checkpoints.metadata import METADATA

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
            with file:
                file.flush()
                os.fsync(file.fileno())


def _file_name(number: int) -> str:
    return f"__0_{number}.distcp"
