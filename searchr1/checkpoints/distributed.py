"""PyTorch's and Megatron's distributed checkpoints, loaded without running anything that they name."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from searchr1.checkpoints.metadata import read_metadata, reason
from searchr1.checkpoints.pickles import FilePart
from searchr1.checkpoints.torch_files import load_part, load_tensors
from searchr1.errors import UserError


class CheckpointReader(filesystem.FileSystemReader):
    """Reads the parts of a folder's tensors; the metadata are read once, when it is made."""

    def __init__(self, folder: str | Path) -> None:
        """Read and check the metadata.

        Raises:
            UserError: they are damaged or hostile, or do not fit the files.
        """
        super().__init__(folder)
        self._folder = Path(folder)
        self._metadata = read_metadata(self._folder)

    def read_metadata(self) -> Metadata:
        """Return what was read. (Without arguments: PyTorch then looks for no metadata of single ranks.)"""
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what a plan asks for, file by file.

        Raises:
            UserError: a part is damaged; names its file.
        """
        items: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            items.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, wanted in items.items():
            with (self._folder / name).open("rb", buffering=0) as file:
                for item in sorted(wanted, key=lambda item: int(self.storage_data[item.storage_index].offset)):
                    with self._named_damage(name, item):
                        self._read(file, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, file: IO[bytes], item: ReadItem, planner: LoadPlanner) -> None:
        info = self.storage_data[item.storage_index]
        part = io.BufferedReader(FilePart(file, info.offset, info.length))
        if item.type == LoadItemType.BYTE_IO:
            planner.load_bytes(item, part)  # type: ignore[arg-type]
            return
        found = load_part(part)
        if not isinstance(found, Tensor):
            raise ValueError("it is not a tensor")
        found = narrow_tensor_by_index(found, item.storage_offsets, item.lengths)
        target = planner.resolve_tensor(item).detach()
        if target.shape != found.shape:
            raise ValueError(f"it is {tuple(found.shape)} instead of {tuple(target.shape)}")
        target.copy_(found)
        planner.commit_tensor(item, target)

    @contextmanager
    def _named_damage(self, name: str, item: ReadItem) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a damaged part can raise anything
            raise UserError(
                f"{self._folder / name} is damaged where {item.storage_index.fqn} should be ({reason(error)}); use another "
                "checkpoint"
            ) from error


class RestrictedObjects(DefaultLoadPlanner):
    """Loads the objects that are no tensors (numbers, texts, their lists and dictionaries) without running anything."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Put an object into its place."""
        found = load_part(value)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], found)
        else:
            self.state_dict[read_item.dest_index.fqn] = found


def load_distributed(state: dict[str, Any], folder: Path) -> None:
    """Fill a state dict from a folder; a collective.

    Raises:
        UserError: damaged or hostile.
        CheckpointException and others: of another model.
    """
    reader = CheckpointReader(folder)
    with plain_damage():
        dcp.load(state, storage_reader=reader, planner=RestrictedObjects())


@contextmanager
def plain_damage() -> Iterator[None]:
    """Raise the sentence of the first rank that met damage, out of what PyTorch wraps it in.

    Raises:
        UserError: a rank raised one.
    """
    try:
        yield
    except CheckpointException as error:
        for _, (cause, _) in sorted(error.failures.items()):
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from error
        raise


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
