"""FSDP checkpoints of other trainers: verl's file per rank, RLinf's file of full weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from searchr1.checkpoints.locate import FULL_WEIGHTS, Located
from searchr1.checkpoints.torch_files import check_checksums, load_tensors
from searchr1.errors import UserError

_RANK = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")


class FsdpRanks:
    """The tensors of all ranks' files, whole, under Hugging Face's names."""

    def __init__(self, located: Located) -> None:
        """Open every rank's file.

        Raises:
            UserError: a rank is missing, a file is damaged or names code, or a tensor is cut in an unknown way.
        """
        self.folder = located.folder
        ranked = located.kind == "fsdp_ranks"
        self._files = _rank_files(self.folder) if ranked else [self.folder / FULL_WEIGHTS]
        states = [load_tensors(path) for path in self._files]
        self.tensors: dict[str, list[Any]] = {}
        for name, first in states[0].items():
            if not isinstance(first, Tensor):
                raise UserError(f"{self._files[0]}: {name} is not a tensor; convert it with the tools of its trainer")
            if any(name not in state for state in states):
                raise UserError(f"{self.folder}: {name} is not in every rank's file; copy it again")
            self.tensors[name] = [state[name] for state in states]
            self._check_sharding(name)

    def _check_sharding(self, name: str) -> None:
        first = self.tensors[name][0]
        if not isinstance(first, DTensor):
            if len(self.tensors[name]) > 1 and any(part.shape != first.shape for part in self.tensors[name]):
                raise UserError(f"{self.folder}: {name} is cut in an unknown way; convert it with the tools of its trainer")
            return
        sharded = [place for place in first.placements if not isinstance(place, Replicate)]
        if len(sharded) > 1 or any(type(place) is not Shard for place in sharded):
            raise UserError(
                f"{self.folder}: {name} is cut in several dimensions ({first.placements}); convert it with the tools of its "
                "trainer"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return tuple(self.tensors[name][0].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the precision of a tensor."""
        found: torch.dtype = self.tensors[name][0].dtype
        return found

    def read(self, name: str, layer: int | None = None, check: bool = False) -> Tensor:
        """Return a whole tensor; copies of a hybrid-sharded one after the first are not read.

        Args:
            name: its key.
            layer: None: these files have no stacked layers.
            check: also compare the checksums that `torch.save` stored, once for all files.

        Raises:
            UserError: a checksum is wrong, or parts are missing.
        """
        assert layer is None
        if check:
            for path in self._files:
                check_checksums(path)
            self._files = []
        parts = self.tensors[name]
        first = parts[0]
        if not isinstance(first, DTensor):
            whole: Tensor = first.clone()  # out of the mapped file
            return whole
        dims = [place.dim for place in first.placements if isinstance(place, Shard)]
        if not dims:
            return first._local_tensor.clone()
        size, found, rows = first.shape[dims[0]], [], 0
        for part in parts:  # ranks of one copy follow each other
            if rows >= size:
                break
            found.append(part._local_tensor)
            rows += found[-1].shape[dims[0]]
        if rows != size:
            raise UserError(f"{self.folder}: {name} has {rows} of {size} rows in all files; copy it again")
        return torch.cat(found, dims[0])

    def close(self) -> None:
        """Unmap the files."""
        self.tensors = {}


def _rank_files(folder: Path) -> list[Path]:
    """Return every rank's file, in order."""
    found = {(int(m.group(1)), int(m.group(2))): path for path in folder.iterdir() if (m := _RANK.fullmatch(path.name))}
    sizes = sorted({world for world, _ in found})
    if len(sizes) > 1:
        raise UserError(f"{folder}: has files of {' and of '.join(map(str, sizes))} ranks; remove those of the older save")
    missing = [rank for rank in range(sizes[0]) if (sizes[0], rank) not in found]
    if missing:
        path = folder / f"model_world_size_{sizes[0]}_rank_{missing[0]}.pt"
        raise UserError(f"{path} is missing: the checkpoint is damaged; copy it again")
    return [found[sizes[0], rank] for rank in range(sizes[0])]
