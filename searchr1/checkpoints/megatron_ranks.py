"""Megatron's `torch` format: a file per tensor- and pipeline-parallel rank, put together tensor by tensor.

    iter_0000100/mp_rank_00_001/model_optim_rng.pt    tensor rank 0, pipeline rank 1 (mp_rank_00 without pipeline)

A file holds `model`, or `model0`, `model1`, ... of a virtual pipeline, with layers numbered from 0 in each.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from searchr1.checkpoints.locate import RANK_FILES
from searchr1.checkpoints.mapping import TABLES, VALUE_HEAD, Kind, checkpoint_name
from searchr1.checkpoints.torch_files import check_checksums, load_tensors
from searchr1.errors import UserError

_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(_\d+)?")
_CHUNK = re.compile(r"model(\d*)")
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\..+)")
_KINDS: dict[str, Kind] = {rule.megatron: rule.kind for table in TABLES.values() for rule in table} | {VALUE_HEAD: "copy"}
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


class MegatronRanks:
    """The tensors of all ranks' files, whole, under the names of mapping.py's table."""

    def __init__(self, folder: Path, tied: bool) -> None:
        """Open every rank's file and number the layers over the whole model.

        Args:
            folder: with the `mp_rank_*` folders.
            tied: the output layer is the embedding, of which the last pipeline stage then holds a copy.

        Raises:
            UserError: a rank is missing, a file is damaged or names code, ranks do not fit together.
        """
        self.folder = folder
        self._files = _rank_files(folder)
        tensor_parallel = 1 + max(tensor for tensor, _ in self._files)
        stages = 1 + max(stage for _, stage in self._files)
        chunks = {rank: _chunks(load_tensors(path), path) for rank, path in self._files.items()}
        self.tensors: dict[str, list[Tensor]] = {}
        count = len(chunks[0, 0])
        first_layer = 0
        for chunk in range(count):
            for stage in range(stages):
                ranks = [chunks[tensor, stage] for tensor in range(tensor_parallel)]
                if any(len(rank) != count for rank in ranks):
                    raise UserError(f"{folder}: its ranks have different numbers of model chunks; copy it again")
                first_layer += self._add([rank[chunk] for rank in ranks], first_layer)
        if tied and _OUTPUT in self.tensors:
            if not torch.equal(self.read(_OUTPUT), self.read(_EMBEDDING)):
                raise UserError(
                    f"{folder}: config.json says tie_word_embeddings: true, but {_OUTPUT} differs from {_EMBEDDING}; give "
                    "the base model's folder as --hf-model"
                )
            del self.tensors[_OUTPUT]

    def _add(self, parts: list[dict[str, Tensor]], first_layer: int) -> int:
        """Take the tensor-parallel parts of one stage's chunk. Returns its number of layers."""
        layers = 0
        for name in parts[0]:
            missing = [rank for rank, part in enumerate(parts) if name not in part]
            if missing or any(part.keys() != parts[0].keys() for part in parts):
                raise UserError(f"{self.folder}: tensor-parallel ranks have different tensors ({name}); copy it again")
            stored, layer = checkpoint_name(name), _LAYER.fullmatch(checkpoint_name(name))
            if layer is not None:
                layers = max(layers, int(layer.group(2)) + 1)
                stored = f"{layer.group(1)}{int(layer.group(2)) + first_layer}{layer.group(3)}"
            if stored in self.tensors:
                raise UserError(f"{self.folder}: {stored} is in more than one pipeline stage; it is of another layout")
            self.tensors[stored] = [part[name] for part in parts]
        return layers

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        shapes = [tuple(part.shape) for part in self.tensors[name]]
        kind = _kind(name)
        if kind == "copy" or not shapes[0]:
            return shapes[0]
        dim = 1 if kind == "columns" and len(shapes[0]) > 1 else 0
        return (*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :])

    def dtype(self, name: str) -> torch.dtype:
        """Return the precision of a tensor."""
        return self.tensors[name][0].dtype

    def read(self, name: str, layer: int | None = None, check: bool = False) -> Tensor:
        """Return a whole tensor, as one tensor-parallel rank would hold it.

        Args:
            name: its key.
            layer: None: these files have no stacked layers.
            check: also compare the checksums that `torch.save` stored, once for all files.

        Raises:
            UserError: a checksum is wrong.
        """
        assert layer is None
        if check:
            for path in self._files.values():
                check_checksums(path)
            self._files = {}
        parts, kind = self.tensors[name], _kind(name)
        if kind == "copy" or len(parts) == 1:
            return parts[0].clone()  # out of the mapped file
        if kind == "columns":
            return torch.cat(parts, 1)
        if kind == "gate_up":
            halves = [part.chunk(2) for part in parts]
            return torch.cat([half[which] for which in (0, 1) for half in halves])
        return torch.cat(parts)

    def close(self) -> None:
        """Let the files go."""
        self.tensors = {}


def _kind(name: str) -> Kind:
    """Return how the table cuts a tensor; a name that it lacks is rejected later."""
    layer = _LAYER.fullmatch(name)
    return _KINDS.get(f"{layer.group(1)}{{}}{layer.group(3)}" if layer else name, "copy")


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    """Return every rank's file by (tensor rank, pipeline rank)."""
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        name = _RANK.fullmatch(path.name)
        if name is None or not path.is_dir():
            continue
        if name.group(3):
            raise UserError(f"{path}: is of a model with expert parallelism, which has no mapping here")
        files = [path / file for file in RANK_FILES if (path / file).is_file()]
        if not files:
            raise UserError(f"{path}: has none of {', '.join(RANK_FILES)}: the checkpoint is damaged; copy it again")
        found[int(name.group(1)), int(name.group(2) or 0)] = files[0]
    sizes = [1 + max(rank[which] for rank in found) for which in (0, 1)]
    missing = [(t, p) for t in range(sizes[0]) for p in range(sizes[1]) if (t, p) not in found]
    if missing:
        tensor, stage = missing[0]
        suffix = f"_{stage:03d}" if sizes[1] > 1 else ""
        raise UserError(f"{folder / f'mp_rank_{tensor:02d}{suffix}'} is missing: the checkpoint is damaged; copy it again")
    return found


def _chunks(state: dict[str, Any], path: Path) -> list[dict[str, Tensor]]:
    """Return the model chunks of one rank's file, without wrappers' prefixes and the fp8 state."""
    version = state.get("checkpoint_version")
    if isinstance(version, (int, float)) and version < 2:
        raise UserError(
            f"{path}: checkpoint_version {version} has queries, keys and values in another order; load and save it with a "
            "recent Megatron-LM first"
        )
    names = sorted((int(match.group(1) or 0), name) for name in state if (match := _CHUNK.fullmatch(name)))
    if not names:
        raise UserError(f"{path}: has no model: it is not a checkpoint of Megatron's")
    return [_model(state[name], path) for _, name in names]


def _model(state: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, dict):
        raise UserError(f"{path}: its model is not a dictionary of tensors: it is not a checkpoint of Megatron-Core's")
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        while name.startswith("module."):
            name = name.removeprefix("module.")
        if name.endswith(("_extra_state", "inv_freq")) or value is None:
            continue
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {name} is not a tensor: not a checkpoint of Megatron-Core's (use_legacy_models?)")
        found[name] = value
    return found
