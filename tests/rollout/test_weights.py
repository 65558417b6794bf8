"""The way of the weights from a trainer to its readers, without an engine."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from searchr1.errors import UserError
from searchr1.rollout import shared_memory as shared_folder
from searchr1.rollout.shared_buffer import SharedBuffer
from searchr1.rollout.shared_memory import weight_directory
from searchr1.rollout.weights import (
    DEFAULT_BUCKET_BYTES,
    WeightManifest,
    WeightPublisher,
    WeightReader,
    bucket_size,
    cut,
    publish_adapter,
    release,
    same_buckets,
)

CPU = torch.device("cpu")


def send(publisher: WeightPublisher, named: dict[str, Tensor], version: int = 1) -> Iterator[WeightManifest]:
    return publisher.publish(named.items(), version, sum(tensor.numel() for tensor in named.values()))


def receive(reader: WeightReader, publisher: WeightPublisher, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """An update, the next bucket written before one is read; copies of what came."""
    reader.start()
    found: dict[str, Tensor] = {}
    buckets = send(publisher, named)
    bucket = next(buckets)
    while True:
        following = None if bucket.last else next(buckets)
        assert pickle.loads(pickle.dumps(bucket)) == bucket
        found |= {name: tensor.clone() for name, tensor in reader.read(bucket)}
        if following is None:
            break
        bucket = following
    publisher.release()
    return found


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), min_size=0, max_size=3), min_size=1, max_size=8),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), min_size=1, max_size=3),
    size=st.integers(4, 300),
)
def test_tensors_come_back_bit_by_bit_update_after_update(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtypes: list[torch.dtype], size: int
) -> None:
    """Also numbers that are none: infinities and NaN with any payload."""
    root = tmp_path_factory.mktemp("weights")
    publisher, reader = WeightPublisher(root, size), WeightReader(CPU)
    for update in range(3):
        generator = torch.Generator().manual_seed(update)
        tensors = {}
        for i, shape in enumerate(shapes):
            dtype = dtypes[i % len(dtypes)]
            raw = torch.randint(
                0, 256, (torch.Size(shape).numel() * dtype.itemsize,), generator=generator, dtype=torch.uint8
            )
            tensors[f"layer.{i}"] = raw.view(dtype).reshape(shape)
        found = receive(reader, publisher, tensors)
        assert list(found) == list(tensors)
        for name, tensor in tensors.items():
            assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
            assert bits(found[name]) == bits(tensor)
        # Nothing has a name between two updates.
        assert list(root.iterdir()) == []
    assert len(reader._buffers) <= 2


def test_buckets_are_full_and_a_large_tensor_takes_several(tmp_path: Path) -> None:
    tensors = {"small": torch.arange(10.0), "embedding": torch.arange(1000.0).reshape(100, 10), "tail": torch.ones(3)}
    buckets = list(send(WeightPublisher(tmp_path, 400), tensors))
    assert [bucket.total_bytes for bucket in buckets] == [400] * 10 + [52]
    assert [bucket.first for bucket in buckets] == [True] + [False] * 10
    assert [bucket.last for bucket in buckets] == [False] * 10 + [True]
    assert len({bucket.path for bucket in buckets}) == 2
    parts = [part for bucket in buckets for part in bucket.parts if part.name == "embedding"]
    assert [part.start for part in parts] == [0, *range(90, 1000, 100)]


def test_every_rank_of_the_trainer_goes_in_the_same_steps(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(7 * i + 1) for i in range(20)}
    for size in (4, 100, 1000, 10**6):
        pulled: list[list[str]] = [[], []]

        def walk(rank: int, seen: list[list[str]] = pulled) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors.items():
                seen[rank].append(name)
                yield name, tensor if rank == 0 else torch.empty(tensor.shape, device="meta")

        elements = sum(tensor.numel() for tensor in tensors.values())
        first, second = WeightPublisher(tmp_path, size).publish(walk(0), 1, elements), same_buckets(walk(1), size)
        for _ in first:
            next(second)
            # Each tensor is a collective: both must have asked for the same ones after every bucket.
            assert pulled[0] == pulled[1]
        assert next(second, "end") == "end"


def test_a_second_buffer_may_come_in_a_later_update(tmp_path: Path) -> None:
    publisher, reader = WeightPublisher(tmp_path, 64), WeightReader(CPU)
    receive(reader, publisher, {"a": torch.ones(4)})
    buckets = list(send(publisher, {"a": torch.arange(20.0)}))
    assert [bucket.fresh for bucket in buckets] == [False, True]
    assert [Path(bucket.path).exists() for bucket in buckets] == [False, True]
    reader.start()
    assert torch.equal(dict(pair for bucket in buckets for pair in reader.read(bucket))["a"], torch.arange(20.0))


def test_wrong_weights_are_rejected_and_leave_nothing_behind(tmp_path: Path) -> None:
    def broken() -> Any:
        yield "a", torch.ones(4)
        raise RuntimeError("the trainer died")

    publisher = WeightPublisher(tmp_path, 8)
    with pytest.raises(RuntimeError, match="trainer died"):
        list(publisher.publish(broken(), 1, 4))
    with pytest.raises(ValueError, match="must have 5 elements in all and have 4"):
        list(publisher.publish([("a", torch.ones(4))], 1, 5))
    with pytest.raises(ValueError, match="must have 3 elements in all and have 4"):
        list(publisher.publish([("a", torch.ones(4))], 1, 3))
    with pytest.raises(ValueError, match="have 0"):
        list(publisher.publish([], 1, 0))
    with pytest.raises(ValueError, match="'a' twice"):
        list(publisher.publish([("a", torch.ones(1)), ("a", torch.ones(1))], 1, 2))
    with pytest.raises(ValueError, match="holds no element"):
        list(WeightPublisher(tmp_path, 3).publish([("a", torch.ones(1))], 1, 1))
    assert list(tmp_path.iterdir()) == []
    # And it goes on, with new buffers.
    found = receive(WeightReader(CPU), publisher, {"a": torch.arange(9.0)})
    assert torch.equal(found["a"], torch.arange(9.0))


def test_views_and_tied_tensors_can_be_published(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    named = {"embed": base, "head": base, "transposed": base.t(), "row": base[1], "parameter": torch.nn.Parameter(base)}
    for size in (20, 1000):
        back = receive(WeightReader(CPU), WeightPublisher(tmp_path, size), named)
        for name, tensor in named.items():
            assert torch.equal(back[name], tensor)


def test_a_manifest_that_does_not_fit_its_buffer_is_rejected(tmp_path: Path) -> None:
    publisher, reader = WeightPublisher(tmp_path, 64), WeightReader(CPU)
    bucket = next(send(publisher, {"a": torch.arange(16.0), "b": torch.arange(3.0)}))
    (part,) = bucket.parts

    def read(**changes: Any) -> list[Any]:
        reader.start()
        return list(reader.read(replace(bucket, parts=(replace(part, **changes),))))

    assert torch.equal(read()[0][1], torch.arange(16.0))
    for changes in (
        {"offset": 4},
        {"offset": -4},
        {"offset": 2, "elements": 1},
        {"elements": 17, "shape": (17,)},
        {"elements": -1},
    ):
        with pytest.raises(ValueError, match="do not fit into"):
            read(**changes)
    with pytest.raises(ValueError, match="has no part up to 16"):
        read(shape=(15,))
    with pytest.raises(ValueError, match="do not go on where they were cut"):
        read(start=4, elements=4)
    for dtype in ("save", "float33", "nn"):
        with pytest.raises(ValueError, match="is not a dtype"):
            read(dtype=dtype)
    half = replace(part, elements=8)
    for second in (
        replace(half, start=9, elements=7),
        replace(half, name="b", start=8),
        replace(half, dtype="int32", start=8),
    ):
        reader.start()
        with pytest.raises(ValueError, match="do not go on where they were cut"):
            list(reader.read(replace(bucket, parts=(half, second))))
    reader.start()
    with pytest.raises(ValueError, match="end within a tensor"):
        list(reader.read(replace(bucket, parts=(half,), last=True)))
    # After an update that failed a new one begins afresh.
    assert len(read()) == 1


def test_only_ordinary_files_of_a_publisher_are_mapped(tmp_path: Path) -> None:
    reader = WeightReader(CPU)
    bucket = next(send(WeightPublisher(tmp_path, 64), {"a": torch.arange(16.0)}))
    path = Path(bucket.path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    stranger = tmp_path / "file"
    stranger.write_bytes(b"x" * 64)
    with pytest.raises(ValueError, match="not made by WeightPublisher"):
        list(reader.read(replace(bucket, path=str(stranger))))
    link = path.parent / "bucket-7"
    link.symlink_to(stranger)
    with pytest.raises(OSError, match="symbolic links"):
        list(reader.read(replace(bucket, path=str(link))))
    fifo = path.parent / "bucket-8"
    os.mkfifo(fifo)
    with pytest.raises(PermissionError, match="ordinary file"):
        list(reader.read(replace(bucket, path=str(fifo))))
    assert len(list(reader.read(bucket))) == 1


def test_release_deletes_only_what_was_published(tmp_path: Path) -> None:
    publisher = WeightPublisher(tmp_path, 64)
    bucket = next(send(publisher, {"a": torch.ones(4)}))
    neighbour = tmp_path / "bucket-0"
    guest = Path(bucket.directory) / "keep.txt"
    for path in (neighbour, guest):
        path.write_text("mine")
    publisher.release()
    publisher.release()
    assert neighbour.exists()
    assert guest.exists()
    assert not Path(bucket.path).exists()
    with pytest.raises(ValueError, match="was not made"):
        release(replace(bucket, directory=str(tmp_path)))


def test_folders_of_killed_publishers_are_removed_and_live_ones_kept(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from searchr1.rollout.weights import WeightPublisher\n"
        "publisher = WeightPublisher(sys.argv[1], 64)\n"
        "print(next(publisher.publish([('a', torch.ones(4))], 1, 4)).directory, flush=True)\n"
        "sys.stdin.read()\n"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        folders = [Path(child.stdout.readline().strip()) for child in children if child.stdout is not None]
        children[0].kill()
        children[0].wait(timeout=30)
        old = time.time() - 3600
        for folder in folders:
            os.utime(folder, (old, old))
        mine = next(send(WeightPublisher(tmp_path, 64), {"a": torch.ones(4)}))
        os.utime(mine.directory, (old, old))
        next(send(WeightPublisher(tmp_path, 64), {"a": torch.ones(4)}))
        assert not folders[0].exists()
        assert folders[1].exists()
        assert Path(mine.directory).exists()
    finally:
        for child in children:
            child.kill()
            child.communicate(timeout=30)


def test_an_unwritable_folder_is_a_user_error(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(UserError, match="give a writable folder"):
        next(send(WeightPublisher(blocker, 64), {"a": torch.ones(1)}))


def test_a_full_folder_is_a_user_error_and_not_a_signal() -> None:
    """The file system itself says so before anything is mapped; a write to a mapped file without room is a SIGBUS."""
    if not os.access(shared_folder.SHARED_MEMORY, os.W_OK):
        pytest.skip("there is no /dev/shm")
    too_much = shutil.disk_usage(shared_folder.SHARED_MEMORY).total + (1 << 20)
    with tempfile.TemporaryDirectory(dir=shared_folder.SHARED_MEMORY) as folder:
        with pytest.raises(UserError, match="shm-size"):
            next(send(WeightPublisher(folder, too_much), {"a": torch.ones(1)}))
        assert os.listdir(folder) == []


def test_shared_memory_is_chosen_only_with_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder, "SHARED_MEMORY", tmp_path)
    assert weight_directory(1, Path("elsewhere")) == tmp_path
    assert weight_directory(1 << 60, Path("elsewhere")) == Path("elsewhere")
    monkeypatch.setattr(shared_folder, "SHARED_MEMORY", tmp_path / "missing")
    assert weight_directory(1, Path("elsewhere")) == Path("elsewhere")


def test_a_fallback_from_shared_memory_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = WeightPublisher(tmp_path, 8)
    reported = [bucket.warnings for _ in range(2) for bucket in send(publisher, {"a": torch.ones(6)})]
    assert [len(warnings) for warnings in reported] == [1] + [0] * 5
    assert str(tmp_path) in reported[0][0]
    monkeypatch.setattr("searchr1.rollout.weights.SHARED_MEMORY", tmp_path)
    assert [bucket.warnings for bucket in send(WeightPublisher(tmp_path, 8), {"a": torch.ones(6)})] == [()] * 3


def test_buckets_are_no_larger_than_the_model() -> None:
    assert bucket_size(1000, torch.bfloat16) == 2000
    assert bucket_size(10**10, torch.bfloat16) == DEFAULT_BUCKET_BYTES


class Cudart:
    """Stands for torch.cuda.cudart(): what is registered, by address."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        assert flags == 1
        assert pointer % 4096 == 0
        assert pointer not in self.registered
        if self.code == 0:
            self.registered[pointer] = size
        return self.code

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.registered[pointer]
        return 0


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    fake = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: pytest.fail(f"error {code}") if code else None)
    return fake


def test_buffers_are_registered_once_and_unregistered_before_they_go(tmp_path: Path, cudart: Cudart) -> None:
    buffer = SharedBuffer.create(tmp_path / "a", 64)
    view = buffer.view(torch.float32, 0, 16).fill_(3)
    assert buffer.register() == ""
    assert cudart.registered == {view.data_ptr(): 64}
    buffer.close()
    assert cudart.registered == {}
    buffer.close()
    # Whoever still has a view keeps the memory.
    assert view.sum() == 48


def test_memory_that_cannot_be_pinned_is_reported_and_used(
    tmp_path: Path, cudart: Cudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudart.code = 2
    read_errors: list[Any] = []
    monkeypatch.setattr(torch, "ones", lambda *args, **kwargs: read_errors.append(kwargs))
    buffer = SharedBuffer.create(tmp_path / "a", 64)
    warning = buffer.register()
    assert "cudaHostRegister: error 2" in warning
    # CUDA keeps the failure as its last error; the next kernel must not be blamed for it.
    assert read_errors == [{"device": "cuda"}]
    assert buffer.view(torch.float32, 0, 16).numel() == 16
    buffer.close()


def test_an_engine_keeps_two_buffers_registered(tmp_path: Path, cudart: Cudart) -> None:
    reader = WeightReader(CPU)
    reader._device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    for _ in range(3):  # a trainer that starts again
        publisher = WeightPublisher(tmp_path, 8)
        for bucket in send(publisher, {"a": torch.ones(6)}):
            reader._attach(bucket.path)
            assert sorted(cudart.registered.values()) == [8] * min(2, len(reader._buffers))
        publisher.release()
    assert len(cudart.registered) == 2
    reader.close()
    assert cudart.registered == {}


class OnGpu:
    """Stands for a flat tensor on a GPU: its copy arrives when its stream is synchronized."""

    def __init__(self, values: Tensor, log: list[str]) -> None:
        self.values, self.log = values, log
        self.is_cuda, self.device, self.dtype = True, "cuda:0", values.dtype

    def record_stream(self, stream: Any) -> None:
        self.log.append("kept for the stream")


def test_copies_from_a_gpu_have_arrived_before_their_bucket_is_announced(
    tmp_path: Path, cudart: Cudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    waiting: list[tuple[Tensor, Tensor]] = []

    class Stream:
        def __init__(self, device: str) -> None:
            log.append(f"stream on {device}")

        def wait_stream(self, other: str) -> None:
            log.append(f"after {other}")

        def synchronize(self) -> None:
            log.append("synchronized")
            while waiting:
                target, values = waiting.pop()
                target.copy_(values)

    class Target:
        def __init__(self, target: Tensor) -> None:
            self.target = target

        def copy_(self, source: OnGpu, non_blocking: bool) -> None:
            assert non_blocking
            waiting.append((self.target, source.values))

    view = SharedBuffer.view
    publisher = WeightPublisher(tmp_path, 64)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the work on {device}")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    with monkeypatch.context() as writing:
        writing.setattr(SharedBuffer, "view", lambda *args: Target(view(*args)))
        layout = cut({"a": torch.arange(20.0)}.items(), 64)
        moved = (None if piece is None else (piece[0], OnGpu(piece[1], log)) for piece in layout)
        writing.setattr("searchr1.rollout.weights.cut", lambda named, size: moved)
        bucket = next(publisher.publish([], 1, 20))
    assert waiting == []
    assert log == ["stream on cuda:0", "after the work on cuda:0", "kept for the stream", "synchronized"]
    assert list(cudart.registered.values()) == [64]
    found = SharedBuffer.attach(bucket.path).view(torch.float32, 0, 16)
    assert torch.equal(found, torch.arange(16.0))


def test_adapters_are_all_or_nothing(tmp_path: Path) -> None:
    for named in ([], [("a", torch.ones(1)), ("a", torch.ones(1))]):
        with pytest.raises(ValueError, match="adapter"):
            publish_adapter(named, 1, tmp_path, {})
    assert list(tmp_path.iterdir()) == []
    manifest = publish_adapter([("a", torch.ones(1))], 1, tmp_path, {"r": 4})
    release(manifest)
    assert list(tmp_path.iterdir()) == []
