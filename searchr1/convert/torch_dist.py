"""Slices of tensors out of a PyTorch distributed checkpoint (Megatron's `torch_dist`, FSDP's DCP), by plain reads.

A tensor lies there in chunks, one per rank that held it, each a `torch.save` archive somewhere in a `.distcp` file. Only
the chunks that a slice touches are read, one at a time; no process group is needed.
"""

from __future__ import annotations

import gc
import io
import os
import pickle
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from searchr1.actor.checkpoint import SIZES, verify_checkpoint
from searchr1.convert.dcp_metadata import METADATA, read_metadata
from searchr1.errors import UserError

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
        """Of a whole tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""

    def read(self, name: str, layer: int | None = None, check: bool = False) -> Tensor:
        """A whole tensor, or one layer of a stacked one; `check` compares checksums too."""

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
        if (folder.parent / SIZES).is_file():
            verify_checkpoint(folder.parent)
        found = read_metadata(folder)
        self._storage: dict[MetadataIndex, Any] = found.storage_data
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: item for name, item in found.state_dict_metadata.items() if isinstance(item, TensorStorageMetadata)
        }
        self._check_files()
        self._open: tuple[str, IO[bytes]] | None = None

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self._storage.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in sorted(ends.items()):
            path = self.folder / name
            if not path.resolve().is_relative_to(self.folder.resolve()):
                raise UserError(f"{self.folder / METADATA} points to {name}, outside of the checkpoint; use another one")
            if not path.is_file():
                raise UserError(f"{path} is missing: the checkpoint is damaged; copy it again or use another one")
            if path.stat().st_size < end:
                raise UserError(
                    f"{path} has {path.stat().st_size} bytes instead of {end} or more: the checkpoint is damaged; copy it "
                    "again or use another one"
                )

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor."""
        return tuple(self.tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return self.tensors[name].properties.dtype

    def read(self, name: str, layer: int | None = None, check: bool = False) -> Tensor:
        """A whole tensor, or the part of a stacked one at an index of its first dimension (which is then left out).

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
        target = torch.empty([stop - start for start, stop in box], dtype=self.dtype(name))
        missing = target.numel()
        for chunk, common in found:
            part = target[tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, box, strict=True))]
            part.copy_(self._chunk(name, chunk, check)[_within(common, chunk)])
            missing -= part.numel()
        if missing:
            raise UserError(f"{self.folder}: {name} is not whole: {missing} of its elements are in no file")
        return target

    def _chunk(self, name: str, chunk: ChunkStorageMetadata, check: bool) -> Tensor:
        info = self._storage.get(MetadataIndex(name, chunk.offsets))
        if info is None or getattr(info, "transform_descriptors", None):
            raise UserError(f"{self.folder / METADATA} does not say where {name} is, or it is packed in an unknown way")
        file = self._file(info.relative_path)
        try:
            if check:
                with zipfile.ZipFile(_Part(file, info.offset, info.length)) as archive:
                    bad = archive.testzip()
                if bad:
                    raise ValueError(f"wrong checksum of {bad}")
            part = io.BufferedReader(_Part(file, info.offset, info.length))
            found: Tensor = torch.load(part, map_location="cpu", weights_only=True)
            # torch.load leaves reference cycles that keep its storages; broken now, the memory goes when the tensor does.
            gc.collect(2 if found.nbytes >= _LARGE_BYTES else 0)
            if found.shape != chunk.sizes or found.dtype != self.dtype(name):
                raise ValueError(f"it is {tuple(found.shape)}, {found.dtype}")
        except (RuntimeError, ValueError, OSError, EOFError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{self.folder / info.relative_path} is damaged where {name} should be ({str(error).splitlines()[0]}); copy "
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


class _Part(io.RawIOBase):
    """Part of a file as a file of its own. (PyTorch's own view cannot seek from its end, which zipfile does.)"""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._number, self._start, self._length = file.fileno(), start, length
        self._position = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        return self._position

    def tell(self) -> int:
        """Where the next read starts."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as one read of the file does."""
        view = memoryview(buffer)[: max(self._length - self._position, 0)]
        count = os.preadv(self._number, [view], self._start + self._position)
        self._position += count
        return count


def _overlap(chunk: ChunkStorageMetadata, box: Box) -> Box | None:
    found = tuple(
        (max(offset, start), min(offset + size, stop))
        for offset, size, (start, stop) in zip(chunk.offsets, chunk.sizes, box, strict=True)
    )
    return found if all(start < stop for start, stop in found) else None


def _within(common: Box, chunk: ChunkStorageMetadata) -> tuple[slice, ...]:
    return tuple(slice(start - offset, stop - offset) for (start, stop), offset in zip(common, chunk.offsets, strict=True))
