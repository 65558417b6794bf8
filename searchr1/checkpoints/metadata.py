"""The `.metadata` file of a PyTorch distributed checkpoint: read without running what a stranger put there, and checked.

It is a pickle (see pickles.py). Here it may name PyTorch's own metadata classes, dtypes and a few containers; save plans and
Megatron's additions, which reading does not need, become empty stand-ins. What is left must be what the classes say, so that
whoever reads tensors by it reads inside the folder's files, and no more than they hold.
"""

from __future__ import annotations

import itertools
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from searchr1.checkpoints.pickles import Call, Mapping, Reader, Sealed, StandIn, container
from searchr1.errors import UserError
from searchr1.files.lfs import reject_pointer

METADATA = ".metadata"
_SMALL_BYTES = 16 << 20
_BYTES_OF_DATA = 64
"""A larger file needs this many bytes of tensors for each of its own: in memory it takes up to a hundred times its size."""
_MAX_DIMS = 64

_CONTAINERS: dict[tuple[str, str], type[Any]] = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("collections", "OrderedDict"): Mapping,
}
_DROPPED = {
    ("collections", "defaultdict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("torch.serialization", "_get_layout"),
    *((planner.__name__, name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
    *((metadata.__name__, name) for name in ("_MEM_FORMAT_ENCODING", "StorageMeta")),
}
"""Where the checkpoint was, how it was planned, and how tensors once lay in memory."""


def read_metadata(folder: Path) -> metadata.Metadata:
    """Return the metadata of a checkpoint folder, which fit the files beside them.

    Raises:
        UserError: it is damaged, or names something that it should not, or a file is missing or cut short.
    """
    path = folder / METADATA
    reject_pointer(path)
    try:
        _reject_size(path)
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from error
    try:
        found = Reader(data, _find).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"{path} is damaged or no checkpoint's metadata ({reason(error)}); use another checkpoint"
        ) from error
    if not isinstance(found, metadata.Metadata):
        raise UserError(f"{path} is not a PyTorch distributed checkpoint's metadata; use another checkpoint")
    try:
        _check_entries(found)
        _check_files(folder, found)
        _check_places(found)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({reason(error)}); use another checkpoint") from error
    return found


def reason(error: BaseException) -> str:
    """Return an error's text as one short line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _reject_size(path: Path) -> None:
    size = path.stat().st_size
    if size <= _SMALL_BYTES:
        return
    stored = sum(entry.stat().st_blocks * 512 for entry in os.scandir(path.parent) if entry.name.endswith(".distcp"))
    if size > _SMALL_BYTES + stored // _BYTES_OF_DATA:
        raise UserError(f"{path} has {size} bytes for {stored} bytes of tensors: it is not a checkpoint's metadata")


def _find(module: str, name: str, reader: Reader) -> Any:
    if module == metadata.__name__ and name in _CLASSES:
        return _CLASSES[name]
    if (module, name) == (filesystem.__name__, "_StorageInfo"):
        return _StorageInfo
    if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
        return found
    if (module, name) == ("torch", "Size"):
        return Call(_size)
    if (module, name) == ("builtins", "getattr"):
        return Call(_enum_member)
    if (module, name) in _CONTAINERS:
        return container(_CONTAINERS[module, name], reader)
    if (module, name) in _DROPPED or (module.startswith("megatron.core.") and name.startswith("MCore")):
        return StandIn
    return None


def _size(items: Any) -> torch.Size:
    if type(items) not in (list, tuple) or len(items) > _MAX_DIMS:
        raise pickle.UnpicklingError("has a size that is none")
    for item in items:
        if type(item) is not int or not 0 <= item < 1 << 62:
            raise pickle.UnpicklingError("has a size that is none")
    return torch.Size(items)


def _enum_member(owner: Any, name: Any) -> Any:
    """Return a member of an enumeration, which early releases of Python 3.11 pickle as a getattr of its class."""
    if owner is not StandIn or type(name) is not str:
        raise pickle.UnpicklingError("calls getattr, which has no place in a checkpoint's metadata")
    return StandIn()


def _check_entries(found: metadata.Metadata) -> None:
    """Check what the classes' containers hold.

    Raises:
        ValueError, TypeError: something is not what it should be.
    """
    for index, info in found.storage_data.items():
        if type(index) is not metadata.MetadataIndex or type(info) is not filesystem._StorageInfo:
            raise ValueError("says where something is that is not a tensor")
        if info.transform_descriptors:
            raise ValueError(f"{index.fqn} is packed in an unknown way")
    for name, item in found.state_dict_metadata.items():
        if type(name) is not str or type(item) not in (metadata.TensorStorageMetadata, metadata.BytesStorageMetadata):
            raise ValueError("has an entry that is neither a tensor nor an object")
        if isinstance(item, metadata.TensorStorageMetadata):
            for chunk in item.chunks:
                _check_chunk(name, item, chunk)


def _check_places(found: metadata.Metadata) -> None:
    """Check that every part of a tensor has bytes of its own: otherwise a small file could fill a large memory.

    Raises:
        ValueError: it does not.
    """
    parts: dict[str, list[tuple[int, int, str]]] = {}
    for name, item in found.state_dict_metadata.items():
        if not isinstance(item, metadata.TensorStorageMetadata):
            continue
        for chunk in item.chunks:
            info = found.storage_data.get(metadata.MetadataIndex(name, chunk.offsets))
            if info is None:
                continue  # an error for whoever reads this tensor
            if info.length < math.prod(chunk.sizes) * item.properties.dtype.itemsize:
                raise ValueError(f"{name} has more elements than there are bytes for it")
            parts.setdefault(info.relative_path, []).append((info.offset, info.length, name))
    for places in parts.values():
        places.sort()
        for (start, length, name), (following, _, other) in itertools.pairwise(places):
            if start + length > following:
                raise ValueError(f"{name} and {other} are in the same place")


def _check_chunk(name: str, item: metadata.TensorStorageMetadata, chunk: Any) -> None:
    if type(chunk) is not metadata.ChunkStorageMetadata or not len(chunk.offsets) == len(chunk.sizes) == len(item.size):
        raise ValueError(f"{name} has parts of another shape")
    if any(offset + size > whole for offset, size, whole in zip(chunk.offsets, chunk.sizes, item.size, strict=True)):
        raise ValueError(f"{name} has a part outside of it")


def _check_files(folder: Path, found: metadata.Metadata) -> None:
    """Compare what the metadata say with the files, which may be links to elsewhere (as in the hub's cache)."""
    ends: dict[str, int] = {}
    for info in found.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name or not Path(name).parts:
            raise UserError(f"{folder / METADATA} points to {name!r}, outside of the checkpoint; use another one")
        if not path.is_file():
            raise UserError(f"{path} is missing: the checkpoint is damaged; copy it again or use another one")
        reject_pointer(path)
        if path.stat().st_size < end:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes instead of {end} or more: the checkpoint is damaged; copy it "
                "again or use another one"
            )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _sealed(kind: type[Any], **fields: Callable[[Any], bool]) -> Any:
    """Return a class whose instances become those of `kind` when they get their state, of which each field is checked."""

    def set_state(self: Any, state: Any) -> None:
        if type(state) is not dict:
            raise pickle.UnpicklingError(f"has a {kind.__name__} without fields")
        for field, fits in fields.items():
            if field in state:
                if not fits(state[field]):
                    raise pickle.UnpicklingError(f"has a {kind.__name__} whose {field} is none")
                object.__setattr__(self, field, state[field])
            elif not hasattr(kind, field):
                raise pickle.UnpicklingError(f"has a {kind.__name__} without {field}")
        object.__setattr__(self, "__class__", kind)

    def reject_hash(self: Any) -> int:
        raise pickle.UnpicklingError(f"uses a {kind.__name__} without fields")

    return Sealed(f"{kind.__name__}WithoutFields", (kind,), {"__setstate__": set_state, "__hash__": reject_hash})


class _Properties(metadata.TensorProperties, metaclass=Sealed):
    """Whose state is a tuple, of which the dtype alone counts."""

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or not state or type(state[0]) is not torch.dtype:
            raise pickle.UnpicklingError("has properties of a tensor without a dtype")
        metadata.TensorProperties.__init__(self, dtype=state[0])
        object.__setattr__(self, "__class__", metadata.TensorProperties)


class _NoFields(metaclass=Sealed):
    """Makes the class that has no fields, and so gets no state."""

    def __new__(cls) -> Any:
        """Make the other class's."""
        return metadata.BytesStorageMetadata()


def _of(*kinds: type[Any]) -> Callable[[Any], bool]:
    return lambda value: type(value) in kinds


def _anything(value: Any) -> bool:
    return True


_CLASSES: dict[str, Any] = {
    "Metadata": _sealed(metadata.Metadata, state_dict_metadata=_of(dict), planner_data=_anything, storage_data=_of(dict)),
    "TensorStorageMetadata": _sealed(
        metadata.TensorStorageMetadata,
        properties=_of(metadata.TensorProperties, _Properties),
        size=_of(torch.Size),
        chunks=_of(list),
    ),
    "ChunkStorageMetadata": _sealed(metadata.ChunkStorageMetadata, offsets=_of(torch.Size), sizes=_of(torch.Size)),
    "MetadataIndex": _sealed(
        metadata.MetadataIndex, fqn=_of(str), offset=_of(torch.Size, type(None)), index=_of(int, type(None))
    ),
    "BytesStorageMetadata": _NoFields,
    "TensorProperties": _Properties,
}
_StorageInfo = _sealed(
    filesystem._StorageInfo,
    relative_path=_of(str),
    offset=_is_count,
    length=_is_count,
    transform_descriptors=_of(list, tuple, type(None)),
)
