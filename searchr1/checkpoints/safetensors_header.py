"""The header of a safetensors file, as strict as the library that the engine reads it with.

8 bytes with the header's length (little endian), the header (JSON: name -> dtype, shape, place), the tensors without gaps.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchr1.errors import UserError
from searchr1.files.lfs import reject_pointer

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
    """The entry of one tensor in a header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset of the first byte in the file."""


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return a file's tensors by name, in the header's order.

    Raises:
        UserError: missing, cut short, a Git LFS pointer, or the header lies.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    reject_pointer(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError("its header is not whole")
            if length > _MAX_HEADER:
                raise ValueError(f"its header has {length} bytes, more than {_MAX_HEADER}")
            text = file.read(length)
        header = json.loads(text.decode(), object_pairs_hook=_distinct, parse_constant=_reject_constant)
        return _tensors(header, 8 + length, size)
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged or cut short ({str(error)[:200]}); get it again") from error


def _tensors(header: Any, data: int, size: int) -> dict[str, StoredTensor]:
    if type(header) is not dict:
        raise ValueError("its header is not a dictionary")
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


def _reject_constant(text: str) -> Any:
    raise ValueError(f"its header has {text}")
