"""The `.metadata` file of a PyTorch distributed checkpoint, read without running code that a stranger put there.

It is a pickle, and unpickling can call anything that it names. Here it may name PyTorch's own metadata classes, dtypes
and a few containers; Megatron's additions, which reading does not need, become empty stand-ins.
"""

from __future__ import annotations

import pickle
from enum import EnumMeta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from searchr1.errors import UserError

METADATA = ".metadata"

_METADATA_CLASSES = {
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
    "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
}  # fmt: skip
_PLANNER_CLASSES = {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"}
_CONTAINERS = {
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # torch.strided is pickled as a call of this
}


def _enum_member(owner: Any, name: str) -> Any:
    """How early releases of Python 3.11 pickle a member of an enumeration: getattr of its class. It does no more here."""
    if not isinstance(owner, EnumMeta):
        raise pickle.UnpicklingError("calls getattr, which has no place in a checkpoint's metadata")
    return owner[name]


class _StandIn:
    """For Megatron's classes (its save plans), whose contents are not needed."""

    def __setstate__(self, state: Any) -> None:
        """Forget it."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == metadata.__name__ and name in _METADATA_CLASSES:
            return getattr(metadata, name)
        if module == planner.__name__ and name in _PLANNER_CLASSES:
            return getattr(planner, name)
        if (module, name) == (filesystem.__name__, "_StorageInfo"):
            return filesystem._StorageInfo
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if (module, name) in _CONTAINERS:
            return super().find_class(module, name)
        if module.startswith("megatron.core.") and name.startswith("MCore"):
            return _StandIn
        raise pickle.UnpicklingError(f"names {module}.{name}, which has no place in a checkpoint's metadata")


def read_metadata(folder: Path) -> metadata.Metadata:
    """The metadata of a checkpoint folder.

    Raises:
        UserError: it is damaged, or names something that it should not.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            found = _Unpickler(file).load()
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path} is damaged or no checkpoint's metadata ({error}); use another checkpoint") from error
    if not isinstance(found, metadata.Metadata) or not isinstance(found.storage_data, dict):
        raise UserError(f"{path} is not a PyTorch distributed checkpoint's metadata; use another checkpoint")
    return found
