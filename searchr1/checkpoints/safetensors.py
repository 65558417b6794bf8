"""safetensors files, one tensor at a time.

The format: 8 bytes with the header's length (little endian), the header (JSON: name -> dtype, shape, place), the data.
The library writes a file from tensors that are all in memory, and reads through a memory map whose pages count as the
process's memory; this module does neither, so a conversion needs room for one tensor, however large the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from searchr1.checkpoints.safetensors_header import read_header
from searchr1.errors import UserError

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_PIECE_BYTES = 32 << 20
"""How much is converted and written at a time."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The entry of one tensor in a header."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the memory of a contiguous tensor as uint8 [bytes], not a copy of it."""
    return tensor.reshape(-1).view(torch.uint8)


class SafetensorsWriter:
    """A file whose header is written first and whose tensors follow in any order. A context manager."""

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[TensorSpec, int]] = {}
        position = 0
        # Larger elements first: each tensor then starts at a multiple of its element's size, which readers rely on.
        for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
            end = position + spec.nbytes
            header[spec.name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [position, end],
            }
            self._places[spec.name] = (spec, position)
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._missing = {spec.name for spec in specs}
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, in the precision of its spec.

        Raises:
            UserError: a finite value does not fit the precision.
            OSError: the disk.
        """
        spec, position = self._places[name]
        assert tuple(tensor.shape) == spec.shape, (name, tensor.shape, spec.shape)
        self._file.seek(self._start + position)
        for piece in pieces(tensor, spec.dtype, name):
            self._file.write(bytes_of(piece).numpy().data)
        self._missing.remove(name)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                assert not self._missing, f"never written: {sorted(self._missing)[:5]}"


def pieces(tensor: Tensor, dtype: torch.dtype, name: str) -> Iterator[Tensor]:
    """Yield a tensor's elements in order, a few megabytes at a time, in another precision.

    Raises:
        UserError: a finite value does not fit the precision (only fp16 is so narrow).
    """
    flat = tensor.contiguous().reshape(-1)
    step = _PIECE_BYTES // max(flat.dtype.itemsize, dtype.itemsize)
    for start in range(0, len(flat), step):
        source = flat[start : start + step]
        piece = source.to(dtype)
        if dtype == torch.float16 and source.dtype != dtype and not torch.equal(piece.isinf(), source.isinf()):
            raise UserError(f"{name} has values beyond fp16's largest (65504); use --dtype bf16 or fp32")
        yield piece


class SafetensorsReader:
    """An open file, read by plain reads."""

    def __init__(self, path: Path) -> None:
        """Open and check it.

        Raises:
            UserError: missing, cut short or no safetensors file; names it.
        """
        header = read_header(path)
        for name, item in header.items():
            if item.dtype not in _DTYPES:
                raise UserError(f"{path} is damaged or cut short ({name} is of the unknown type {item.dtype}); get it again")
        self.path = path
        self.specs = {name: TensorSpec(name, item.shape, _DTYPES[item.dtype]) for name, item in header.items()}
        self._places = {name: item.start for name, item in header.items()}
        self._file = path.open("rb", buffering=0)

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Return part of a tensor along a dimension; rows are read alone, for columns all are, a few megabytes at a time.

        Raises:
            UserError: the file ended early.
        """
        spec = self.specs[name]
        if dim == 0:
            rest = spec.shape[1:]
            found = torch.empty((stop - start, *rest), dtype=spec.dtype)
            self._fill(found, self._places[name] + start * math.prod(rest) * spec.dtype.itemsize)
            return found
        if (start, stop) == (0, spec.shape[dim]):
            return self.read(name, 0, 0, spec.shape[0])
        found = torch.empty((*spec.shape[:dim], stop - start, *spec.shape[dim + 1 :]), dtype=spec.dtype)
        step = max(1, _PIECE_BYTES * spec.shape[0] // max(1, spec.nbytes))
        for first in range(0, spec.shape[0], step):
            rows = self.read(name, 0, first, min(first + step, spec.shape[0]))
            found[first : first + step] = rows.narrow(dim, start, stop - start)
        return found

    def _fill(self, target: Tensor, position: int) -> None:
        view = bytes_of(target).numpy().data
        while view:
            count = os.preadv(self._file.fileno(), [view], position)
            if not count:
                raise UserError(f"{self.path} ended early; get it again")
            view, position = view[count:], position + count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
