"""Weights on their way from the trainer to the rollout engines, as files in shared memory.

The trainer writes a bucket of tensors at a time; every engine process on the node maps the same pages. While the engines
load one bucket the next is written, and no more than two exist. Folders of killed processes are found by their lock (a
dead process holds none) and removed by the next publisher.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from searchr1.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
DEFAULT_BUCKET_BYTES = 512 << 20
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Peft's names of an adapter's files, and vLLM's."""
_PREFIX = "searchr1-weights-"
_LOCK = ".lock"
# A folder this young may belong to a publisher that has not locked it yet.
_STALE_AFTER_SECONDS = 60.0

_held_locks: dict[str, int] = {}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One published tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Torch's name without the module: "float32", "bfloat16"."""


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """What `publish_weights` wrote; small, picklable, valid on this node until `release`."""

    version: int
    directory: str
    files: tuple[str, ...]
    """Absolute paths of safetensors files, in loading order."""
    tensors: tuple[TensorInfo, ...]
    total_bytes: int
    first: bool = True
    last: bool = True
    """Weights may come in several parts (`publish_buckets`), from the first to the last."""
    adapter: bool = False
    """These are the matrices of a LoRA adapter; `directory` is the folder that peft would write."""


def weight_directory(needed_bytes: int, fallback: Path) -> Path:
    """Chooses where to publish: shared memory if it is writable and has twice the room that is needed, else `fallback`."""
    try:
        if os.access(SHARED_MEMORY, os.W_OK) and shutil.disk_usage(SHARED_MEMORY).free >= 2 * needed_bytes:
            return SHARED_MEMORY
    except OSError:
        pass
    return fallback


def publish_weights(
    named: Iterable[tuple[str, torch.Tensor]],
    version: int,
    directory: Path | str,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> WeightManifest:
    """Writes all tensors into a new folder under `directory`, a bucket at a time; they stay there until `release`.

    Args:
        named: Hugging Face names and full tensors, on any device; read once, in order.
        version: the optimizer step that produced the weights.
        directory: usually `weight_directory(...)`.
        bucket_bytes: how much to gather before writing a file.

    Raises:
        UserError: the folder cannot be written or is full.
        ValueError: no tensors, or a name comes twice.
    """
    folder = _new_folder(Path(directory), version)
    with _removed_on_failure(folder):
        parts = [_write_bucket(folder, number, bucket) for number, bucket in enumerate(_buckets(named, bucket_bytes))]
        tensors = tuple(tensor for _, part in parts for tensor in part)
        _check_names([tensor.name for tensor in tensors])
    files = tuple(path for path, _ in parts)
    return WeightManifest(version, str(folder), files, tensors, sum(os.path.getsize(path) for path in files))


def publish_buckets(
    named: Iterable[tuple[str, torch.Tensor]],
    version: int,
    directory: Path | str,
    total_elements: int,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> Iterator[WeightManifest]:
    """The same in parts, for a reader that keeps up: no more than two buckets exist at any time.

    Ask for part n + 1 while part n is being read; when part n + 2 is asked for, part n must have been read and goes.

    Args:
        named: as in `publish_weights`.
        version: likewise.
        directory: likewise.
        total_elements: of all tensors together: what tells the last bucket.
        bucket_bytes: size of a part.

    Raises:
        UserError: the folder cannot be written or is full.
        ValueError: no tensors, a name comes twice, or not `total_elements` elements in all.
    """
    folder = _new_folder(Path(directory), version)
    with _removed_on_failure(folder):
        names: list[str] = []
        elements, last = 0, False
        for number, bucket in enumerate(_buckets(named, bucket_bytes)):
            if number >= 2:
                _bucket_path(folder, number - 2).unlink(missing_ok=True)
            path, tensors = _write_bucket(folder, number, bucket)
            names += bucket
            _check_names(names)
            elements += sum(tensor.numel() for tensor in bucket.values())
            last = elements == total_elements
            yield WeightManifest(version, str(folder), (path,), tensors, os.path.getsize(path), number == 0, last)
        if not last:
            raise ValueError(f"publish_buckets needs {total_elements} elements and got {elements}")


def publish_adapter(
    named: Iterable[tuple[str, torch.Tensor]], version: int, directory: Path | str, settings: dict[str, Any]
) -> WeightManifest:
    """Writes a LoRA adapter as peft does, into a new folder under `directory`; it stays there until `release`.

    Args:
        named: peft's names and full tensors, on any device.
        version: the optimizer step that produced them.
        directory: usually `weight_directory(...)`.
        settings: of the adapter, in peft's words.

    Raises:
        UserError: the folder cannot be written or is full.
        ValueError: no tensors, or a name comes twice.
    """
    folder = _new_folder(Path(directory), version)
    with _removed_on_failure(folder):
        buckets = list(_buckets(named, 1 << 62))
        _check_names([name for bucket in buckets for name in bucket])
        path, tensors = _write(folder / ADAPTER_WEIGHTS, buckets[0])
        (folder / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", **settings}))
    return WeightManifest(version, str(folder), (path,), tensors, os.path.getsize(path), adapter=True)


def same_buckets(named: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> Iterator[None]:
    """Goes through the tensors in the steps of `publish_buckets` without writing: what the trainer's other ranks do.

    Their tensors may be empty shells (on the "meta" device); only shape and dtype count.
    """
    size = 0
    for _, tensor in named:
        size += tensor.numel() * tensor.element_size()
        if size >= bucket_bytes:
            yield None
            size = 0
    if size:
        yield None


def _new_folder(root: Path, version: int) -> Path:
    folder = root / f"{_PREFIX}v{version}-{uuid.uuid4().hex[:12]}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
        folder.mkdir()
        _held_locks[str(folder)] = _lock(folder)
    except OSError as error:
        raise UserError(f"cannot write weights below {root}: {error.strerror}; give a writable folder") from error
    return folder


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        _remove(folder)
        if _is_full(error):
            raise UserError(
                f"no room for the weights below {folder.parent}: {error}; free space there, enlarge /dev/shm "
                "(docker: --shm-size), or publish to another folder"
            ) from error
        raise


def _bucket_path(folder: Path, number: int) -> Path:
    return folder / f"bucket-{number:05d}.safetensors"


def _write_bucket(folder: Path, number: int, bucket: dict[str, torch.Tensor]) -> tuple[str, tuple[TensorInfo, ...]]:
    return _write(_bucket_path(folder, number), bucket)


def _write(path: Path, bucket: dict[str, torch.Tensor]) -> tuple[str, tuple[TensorInfo, ...]]:
    partial = path.with_suffix(".partial")
    save_file(bucket, str(partial))
    partial.rename(path)
    tensors = (
        TensorInfo(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in bucket.items()
    )
    return str(path), tuple(tensors)


def _check_names(names: list[str]) -> None:
    if not names or len(set(names)) != len(names):
        raise ValueError("publish_weights needs at least one tensor, and each name once")


def read_weights(files: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of published files, mapped rather than read: each costs memory only where it is touched."""
    for path in files:
        with safe_open(path, framework="pt", device="cpu") as handle:
            for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield name, handle.get_tensor(name)


def release(manifest: WeightManifest) -> None:
    """Deletes what `publish_weights` made, and nothing else. Deleting twice does no harm."""
    folder = Path(manifest.directory)
    if not folder.name.startswith(_PREFIX):
        raise ValueError(f"{folder} was not made by publish_weights")
    _remove(folder)


def _buckets(named: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    bucket: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    size = 0
    for name, tensor in named:
        host = tensor.detach().to("cpu").contiguous()
        # safetensors refuses tensors that share memory (tied weights given under both names).
        if host.untyped_storage().data_ptr() in storages:
            host = host.clone()
        storages.add(host.untyped_storage().data_ptr())
        if name in bucket:
            raise ValueError(f"publish_weights got {name!r} twice")
        bucket[name] = host
        size += host.numel() * host.element_size()
        if size >= bucket_bytes:
            yield bucket
            bucket, storages, size = {}, set(), 0
    if bucket:
        yield bucket


def _lock(folder: Path) -> int:
    descriptor = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _remove(folder: Path) -> None:
    written = ("bucket-*.safetensors", ADAPTER_WEIGHTS, ADAPTER_CONFIG)
    for pattern in (*written, "*.partial", _LOCK):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # gone already, or someone keeps a file of their own there
        folder.rmdir()
    descriptor = _held_locks.pop(str(folder), None)
    if descriptor is not None:
        os.close(descriptor)


def _remove_stale(root: Path) -> None:
    for folder in root.glob(f"{_PREFIX}v*"):
        if str(folder) in _held_locks:
            continue
        try:
            if time.time() - folder.stat().st_mtime < _STALE_AFTER_SECONDS:
                continue
            descriptor = _lock(folder)
        except OSError:
            continue  # another process publishes there, or it is not ours
        os.close(descriptor)
        _remove(folder)


def _is_full(error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error)
