"""Megatron's distributed checkpoints, loaded without running anything that they name.

Megatron-Core 0.16 reads `.metadata`, every sharded object and `common.pt` by plain unpickling, and lets its caller replace
the last only. So for as long as it loads, the two names by which it makes its reader and its planner stand for ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from searchr1.checkpoints.distributed import CheckpointReader, RestrictedObjects, plain_damage
from searchr1.checkpoints.metadata import reason
from searchr1.checkpoints.torch_files import load_tensors
from searchr1.errors import UserError

_FORMAT = "metadata.json"
_MAX_FORMAT_BYTES = 1 << 20
_READER, _PLANNER = "_get_filesystem_reader", "MCoreLoadPlanner"


def load_megatron(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what Megatron's `dist_checkpointing.load` makes of a sharded state dict; a collective.

    Raises:
        UserError: damaged, hostile, or of a format that is not read.
        CheckpointingException, CheckpointException and others: of another model.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    class Common(TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
            return load_tensors(Path(checkpoint_dir) / "common.pt")

    _check_format(folder)
    strategies = {"sharded_strategy": TorchDistLoadShardedStrategy(), "common_strategy": Common()}
    try:
        with _our_reader(), plain_damage():
            found: dict[str, Any] = dist_checkpointing.load(state, str(folder), **strategies)
    except (AssertionError, TypeError, AttributeError, IndexError) as error:  # objects that are not what it expects
        raise UserError(
            f"{folder} is damaged, or another release of Megatron wrote it ({reason(error)}); use another checkpoint"
        ) from error
    return found


@contextmanager
def _our_reader() -> Iterator[None]:
    from megatron.core.dist_checkpointing.strategies import torch as strategy

    planner = getattr(strategy, _PLANNER)
    original = {name: getattr(strategy, name) for name in (_READER, _PLANNER)}  # an AttributeError in another release
    ours = type(_PLANNER, (RestrictedObjects, planner), {})
    setattr(strategy, _READER, lambda folder, cache_metadata=False: CheckpointReader(folder))
    setattr(strategy, _PLANNER, ours)
    try:
        yield
    finally:
        for name, value in original.items():
            setattr(strategy, name, value)


def _check_format(folder: Path) -> None:
    path = folder / _FORMAT
    try:
        if path.stat().st_size > _MAX_FORMAT_BYTES:
            raise ValueError("it is too long")
        found = json.loads(path.read_bytes())
        backends = found["sharded_backend"], found["common_backend"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({str(error)[:200]}); use another checkpoint") from error
    if backends != ("torch_dist", "torch"):
        raise UserError(f"{path} says {str(backends)[:100]}: only torch_dist is read; save the checkpoint in that format")
