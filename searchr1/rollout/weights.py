"""Weights on their way from the trainer to the rollout engines, through two buffers in shared memory.

The trainer fills one buffer while the engines load the other, and both are used again and again, in this update and the next
(shared_buffer.py). A bucket is what one buffer holds: whole tensors one after the other, cut where it is full.
LoRA adapters travel as the files that peft writes instead: vLLM loads them from a folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from searchr1.files.atomic import atomic_file
from searchr1.rollout.shared_buffer import SharedBuffer
from searchr1.rollout.shared_memory import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PREFIX,
    SHARED_MEMORY,
    SharedFolder,
    remove_folder,
)

DEFAULT_BUCKET_BYTES = 512 << 20
"""A message to all engines and its answer cost some 10 ms, as much as half a GB at 50 GB/s."""


@dataclass(frozen=True, slots=True)
class TensorPart:
    """Elements of one tensor in a bucket; all of them unless it is cut."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: str
    """Torch's name without the module: "float32", "bfloat16"."""
    start: int
    """The first element, counted over the flat tensor."""
    elements: int
    offset: int
    """In the buffer, in bytes."""


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """One bucket of weights, or an adapter; small, picklable, valid on this node until the next but one."""

    version: int
    directory: str
    """Of the buffers, or the folder of the adapter as peft would write it."""
    path: str
    """Of the buffer that holds the bucket (or of the adapter's weights)."""
    parts: tuple[TensorPart, ...]
    total_bytes: int
    first: bool = True
    last: bool = True
    fresh: bool = True
    """The file has its name still. Later every reader must have mapped it."""
    adapter: bool = False
    warnings: tuple[str, ...] = ()
    """What makes the way slower than it should be."""


def bucket_size(total_elements: int, dtype: torch.dtype) -> int:
    """Return bytes of a bucket: no more than the model has."""
    return max(dtype.itemsize, min(DEFAULT_BUCKET_BYTES, total_elements * dtype.itemsize))


class WeightPublisher:
    """The trainer's side: two buffers for the length of the run."""

    def __init__(self, directory: Path | str, bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> None:
        """Nothing is made before the first bucket.

        Args:
            directory: usually `weight_directory(2 * bucket_bytes, ...)`.
            bucket_bytes: size of each buffer.
        """
        self._root = Path(directory)
        self._bucket_bytes = bucket_bytes
        self._folder: SharedFolder | None = None
        self._buffers: list[SharedBuffer] = []
        self._stream: Any = None
        self._warnings: list[str] = []

    def publish(self, named: Iterable[tuple[str, Tensor]], version: int, total_elements: int) -> Iterator[WeightManifest]:
        """Fill the buffers in turns.

        Ask for bucket n + 1 while bucket n is being read; before n + 2 is asked for, every reader must have read n.
        After the last bucket has been read, call `release`.

        Args:
            named: Hugging Face names and full tensors, on any device; read once, in order.
            version: the optimizer step that produced the weights.
            total_elements: of all tensors together.

        Raises:
            UserError: the folder cannot be written or is full.
            ValueError: no tensors, a name comes twice, or not `total_elements` elements in all.
        """
        try:
            yield from self._fill(named, version, total_elements)
        except Exception:
            self.close()  # readers may have mapped some of it
            raise

    def release(self) -> None:
        """Remove the buffers' names: every reader has mapped them. The buffers stay for the next update."""
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def close(self) -> None:
        """Give the buffers up. The next update makes new ones."""
        self._wait()
        self.release()
        for buffer in self._buffers:
            buffer.close()
        self._buffers = []

    def _fill(self, named: Iterable[tuple[str, Tensor]], version: int, total_elements: int) -> Iterator[WeightManifest]:
        names: set[str] = set()
        parts: list[TensorPart] = []
        number, elements = 0, 0
        for piece in cut(named, self._bucket_bytes):
            if piece is None:
                yield self._bucket(version, number, parts, last=False)
                number, parts = number + 1, []
                continue
            part, source = piece
            if part.start == 0:
                if part.name in names:
                    raise ValueError(f"the weights have {part.name!r} twice")
                names.add(part.name)
            self._copy(number, version, part, source)
            parts.append(part)
            elements += part.elements
        if not names or elements != total_elements:
            raise ValueError(f"the weights must have {total_elements} elements in all and have {elements}")
        yield self._bucket(version, number, parts, last=True)

    def _bucket(self, version: int, number: int, parts: list[TensorPart], last: bool) -> WeightManifest:
        self._wait()
        path = Path(self._buffers[number % 2].path)
        size = sum(part.elements * _dtype(part).itemsize for part in parts)
        warnings, self._warnings = tuple(self._warnings), []
        return WeightManifest(
            version,
            str(path.parent),
            str(path),
            tuple(parts),
            size,
            number == 0,
            last,
            self._folder is not None,
            warnings=warnings,
        )

    def _copy(self, number: int, version: int, part: TensorPart, source: Tensor) -> None:
        if number % 2 == len(self._buffers):
            self._add_buffer(version, pinned=source.is_cuda)
        target = self._buffers[number % 2].view(source.dtype, part.offset, part.elements)
        if not source.is_cuda:
            target.copy_(source)
            return
        # On a stream of its own, beside the gathering of the next tensors; `_wait` ends every bucket.
        if self._stream is None:
            self._stream = torch.cuda.Stream(source.device)
        self._stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        source.record_stream(self._stream)

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _add_buffer(self, version: int, pinned: bool) -> None:
        if self._folder is None:
            self._folder = SharedFolder(self._root, version)
            if self._root != SHARED_MEMORY:
                self._warnings.append(
                    f"weight sync: {SHARED_MEMORY} has no room for twice {2 * self._bucket_bytes >> 20} MiB, so the weights "
                    f"pass through {self._root}, which may be slower; enlarge it (docker: --shm-size)"
                )
        with self._folder.removed_on_failure():
            buffer = SharedBuffer.create(self._folder.path / f"bucket-{len(self._buffers)}", self._bucket_bytes)
        self._buffers.append(buffer)
        if pinned and (warning := buffer.register()):
            self._warnings.append(warning)


def cut(named: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[tuple[TensorPart, Tensor] | None]:
    """Lay tensors out in buckets. Yields each part with its elements (flat); None where a bucket is full and more follow.

    Only shapes and dtypes count for the cuts, so that ranks with empty shells cut where the first rank does.
    """
    offset = 0
    for name, tensor in named:
        flat = tensor.detach().reshape(-1)
        width = tensor.element_size()
        if bucket_bytes < width:
            raise ValueError(f"a bucket of {bucket_bytes} bytes holds no element of {tensor.dtype}")
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        if flat.numel() == 0:
            yield TensorPart(name, shape, dtype, 0, 0, 0), flat
        start = 0
        while start < flat.numel():
            offset += -offset % width
            count = min((bucket_bytes - offset) // width, flat.numel() - start)
            if count < 1:
                yield None
                offset = 0
                continue
            yield TensorPart(name, shape, dtype, start, count, offset), flat[start : start + count]
            offset += count * width
            start += count


def same_buckets(named: Iterable[tuple[str, Tensor]], bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> Iterator[None]:
    """Go through the tensors in the steps of `WeightPublisher.publish` without writing, as the trainer's other ranks do."""
    for piece in cut(named, bucket_bytes):
        if piece is None:
            yield None
    yield None


class WeightReader:
    """An engine's side: the buffers stay mapped between updates."""

    def __init__(self, device: torch.device) -> None:
        """Args:
        device: where the engine's weights are.
        """
        self._device = device
        self._buffers: dict[str, SharedBuffer] = {}
        self._cut: tuple[TensorPart, Tensor] | None = None
        self._warnings: list[str] = []

    def start(self) -> None:
        """Begin an update."""
        self._cut = None

    def read(self, manifest: WeightManifest) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that are whole with this bucket.

        On a GPU they are copies there, under way on the current stream: synchronize before the bucket counts as read. On a
        CPU they may be the buffer itself: copy what outlives the bucket (`holds`).

        Raises:
            ValueError: the manifest does not fit the buffer, or a part of a tensor is missing.
            OSError: the buffer is gone.
        """
        buffer = self._attach(manifest.path)
        for part in manifest.parts:
            dtype = _dtype(part)
            view = buffer.view(dtype, part.offset, part.elements)
            total = torch.Size(part.shape).numel()
            if part.start == 0 and self._cut is None and part.elements == total:
                yield part.name, view.to(self._device, non_blocking=True).reshape(part.shape)
                continue
            if part.start == 0 and self._cut is None:
                whole = torch.empty(total, dtype=dtype, device=self._device)
            elif self._cut is not None and _follows(part, self._cut[0]):
                whole = self._cut[1]
            else:
                raise ValueError(f"the weights of version {manifest.version} do not go on where they were cut: {part}")
            stop = part.start + part.elements
            if stop > total:
                raise ValueError(f"a tensor of {total} elements has no part up to {stop}: {part}")
            whole[part.start : stop].copy_(view, non_blocking=True)
            self._cut = (part, whole)
            if stop == total:
                self._cut = None
                yield part.name, whole.reshape(part.shape)
        if manifest.last and self._cut is not None:
            raise ValueError(f"the weights of version {manifest.version} end within a tensor: {self._cut[0]}")

    def holds(self, tensor: Tensor) -> bool:
        """Return whether the tensor is (part of) a buffer, which the trainer will write again."""
        return any(buffer.holds(tensor) for buffer in self._buffers.values())

    def take_warnings(self) -> list[str]:
        """Return what made the way slower since the last call."""
        warnings, self._warnings = self._warnings, []
        return warnings

    def close(self) -> None:
        """Give the buffers up."""
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers = {}

    def _attach(self, path: str) -> SharedBuffer:
        if path not in self._buffers:
            if not Path(path).parent.name.startswith(PREFIX):
                raise ValueError(f"{path} was not made by WeightPublisher")
            buffer = SharedBuffer.attach(path)
            while len(self._buffers) >= 2:  # of a publisher that has gone: one has two, used in turns
                self._buffers.pop(next(iter(self._buffers))).close()
            self._buffers[path] = buffer
            if self._device.type == "cuda" and (warning := buffer.register()):
                self._warnings.append(warning)
        self._buffers[path] = self._buffers.pop(path)  # the one used last is the last
        return self._buffers[path]


def publish_adapter(
    named: Iterable[tuple[str, Tensor]], version: int, directory: Path | str, settings: dict[str, Any]
) -> WeightManifest:
    """Write a LoRA adapter as peft does, into a new folder under `directory`; it stays there until `release`.

    Args:
        named: peft's names and full tensors, on any device.
        version: the optimizer step that produced them.
        directory: usually `weight_directory(...)`.
        settings: of the adapter, in peft's words.

    Raises:
        UserError: the folder cannot be written or is full.
        ValueError: no tensors, or a name comes twice.
    """
    folder = SharedFolder(Path(directory), version)
    with folder.removed_on_failure():
        tensors: dict[str, Tensor] = {}
        for name, tensor in named:
            if name in tensors:
                raise ValueError(f"the adapter has {name!r} twice")
            # safetensors refuses tensors that share memory.
            tensors[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        if not tensors:
            raise ValueError("an adapter needs at least one tensor")
        path = folder.path / ADAPTER_WEIGHTS
        with atomic_file(path) as partial:
            save_file(tensors, str(partial))
        (folder.path / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", **settings}), encoding="utf-8")
    return WeightManifest(version, str(folder.path), str(path), (), path.stat().st_size, adapter=True)


def release(manifest: WeightManifest) -> None:
    """Remove the names of what was published, and nothing else. Removing twice does no harm."""
    folder = Path(manifest.directory)
    if not folder.name.startswith(PREFIX):
        raise ValueError(f"{folder} was not made by publish_adapter or WeightPublisher")
    remove_folder(folder)


def _dtype(part: TensorPart) -> torch.dtype:
    dtype = getattr(torch, part.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{part.dtype!r} is not a dtype of torch: {part}")
    return dtype


def _follows(part: TensorPart, before: TensorPart) -> bool:
    same = (part.name, part.shape, part.dtype) == (before.name, before.shape, before.dtype)
    return same and part.start == before.start + before.elements
