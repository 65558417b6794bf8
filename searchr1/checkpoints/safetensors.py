"""safetensors files: their header, checked as strictly as the engine's library does, and their tensors, one at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from searchr1.errors import UserError
from searchr1.files.lfs import refuse_pointer

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_MAX_HEADER = 32 << 20
"""300,000 tensors. (The library stops at 100 MB, which would take gigabytes here.)"""
_MAX_DIMS = 64


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a header says about one tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """In the file."""


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return a file's tensors by name, in the header's order.

    Raises:
        UserError: missing, cut short, a Git LFS pointer, or the header lies.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    refuse_pointer(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError("its header is not whole")
            if length > _MAX_HEADER:
                raise ValueError(f"its header has {length} bytes, more than {_MAX_HEADER}")
            text = file.read(length)
        header = json.loads(text.decode(), object_pairs_hook=_distinct, parse_constant=_refuse_constant)
        return _tensors(header, 8 + length, size)
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged or cut short ({str(error)[:200]}); get it again") from error


def _tensors(header: Any, data: int, size: int) -> dict[str, StoredTensor]:
    if type(header) is not dict:
        raise ValueError("its header is no dictionary")
    notes = header.pop("__metadata__", {})
    if type(notes) is not dict or not all(type(value) is str for value in notes.values()):
        raise ValueError("its notes are no texts")
    found: dict[str, StoredTensor] = {}
    ends: list[tuple[int, int, str]] = []
    for name, item in header.items():
        if type(item) is not dict or item.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name[:60]} is not described as a tensor is")
        dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
        if type(dtype) is not str or dtype not in _BITS:
            raise ValueError(f"{name[:60]} is of the unknown type {str(dtype)[:30]}")
        if not _are_counts(shape) or len(shape) > _MAX_DIMS or not _are_counts(offsets) or len(offsets) != 2:
            raise ValueError(f"{name[:60]} has a wrong shape or place")
        start, end = offsets
        if (end - start) * 8 != math.prod(shape) * _BITS[dtype]:
            raise ValueError(f"{name[:60]} has a wrong place: {end - start} bytes for {shape} of {dtype}")
        if data + end > size:
            raise ValueError(f"{size} bytes, but {name[:60]} ends at {data + end}")
        found[name] = StoredTensor(dtype, tuple(shape), data + start)
        ends.append((start, end, name))
    position = 0
    for start, end, name in sorted(ends):
        if start != position:
            raise ValueError(f"{name[:60]} has a wrong place: it begins at {start}, where the one before ends at {position}")
        position = end
    if data + position != size:
        raise ValueError(f"{size} bytes, but the last tensor ends at {data + position}")
    return found


def _are_counts(values: Any) -> bool:
    return type(values) is list and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is in its header twice")
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"its header has {text}")


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
    """What a header says about one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def bytes_of(tensor: Tensor) -> Tensor:
    """[bytes] uint8, the memory of a contiguous tensor, not a copy of it."""
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
        """Write one tensor, in the precision that its spec says.

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
                self._file.flush()
                os.fsync(self._file.fileno())


def pieces(tensor: Tensor, dtype: torch.dtype, name: str) -> Iterator[Tensor]:
    """A tensor's elements in order, a few megabytes at a time, in another precision.

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
        """Part of a tensor along a dimension; rows are read alone, for columns all rows are, a few megabytes at a time.

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
