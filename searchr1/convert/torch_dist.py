"""Slices of tensors out of a PyTorch distributed checkpoint (Megatron's `torch_dist`, FSDP's DCP), by plain reads.

A tensor lies there in chunks, one per rank that held it, each a `torch.save` archive somewhere in a `.distcp` file. Only
the chunks that a slice touches are read, one at a time; no process group is needed.
"""

from __future__ import annotations

import gc
import io
import math
import zipfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from searchr1.checkpoints.metadata import METADATA, read_metadata, reason
from searchr1.checkpoints.parts import FilePart
from searchr1.checkpoints.torch_files import load_part
from searchr1.checksums import Damage
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
        found = read_metadata(folder)
        self._storage: dict[MetadataIndex, Any] = found.storage_data
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: item for name, item in found.state_dict_metadata.items() if isinstance(item, TensorStorageMetadata)
        }
        self._open: tuple[str, IO[bytes]] | None = None

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
                raise ValueError("it is no tensor")
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
