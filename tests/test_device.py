"""What follows from the device."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from searchr1 import device as device_module
from searchr1.device import Device, usable_cores
from searchr1.errors import UserError

CPU = Device(kind="cpu", slots=4, cores=4)
CUDA = Device(kind="cuda", slots=8, cores=64)


def test_detect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "_cuda_device_count", lambda: 0)
    assert Device.detect("auto") == Device.detect("cpu") == Device("cpu", usable_cores(), usable_cores())
    with pytest.raises(UserError, match="no GPU"):
        Device.detect("cuda")
    with pytest.raises(UserError, match="'gpu' is not known; use auto, cpu or cuda"):
        Device.detect("gpu")
    monkeypatch.setattr(device_module, "_cuda_device_count", lambda: 8)
    assert Device.detect("auto") == Device.detect("cuda") == Device("cuda", 8, usable_cores())
    assert Device.detect("cpu").kind == "cpu"


def test_placement_and_collectives() -> None:
    assert (CPU.workers_for_all, CUDA.workers_for_all) == (1, 8)
    assert (CPU.collective_backend, CUDA.collective_backend) == ("gloo", "nccl")


@pytest.mark.parametrize(
    ("launcher", "gpus", "taken"),
    [
        ({}, 8, 0),  # alone
        ({"LOCAL_RANK": "3", "RANK": "11", "WORLD_SIZE": "16"}, 8, 3),  # torchrun on the second of two machines
        ({"LOCAL_RANK": "0", "RANK": "5", "WORLD_SIZE": "8"}, 1, 0),  # a worker, or a job step, that sees only its own GPU
    ],
)
def test_a_process_takes_the_gpu_of_its_local_rank(monkeypatch, launcher, gpus, taken) -> None:
    import torch

    current: list[int] = []
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    CUDA.take_gpu()
    assert current == [taken]
    assert str(CUDA.torch_device()) == f"cuda:{taken}"
    CPU.take_gpu()
    assert current == [taken]
    assert str(CPU.torch_device()) == "cpu"


def test_the_gpu_is_taken_before_the_process_group_is_joined(monkeypatch) -> None:
    """Every actor, critic, reference model and `sft` joins through this function; NCCL binds to the current GPU."""
    import torch

    from searchr1.learner import model

    happened: list[object] = []
    for name, value in {"LOCAL_RANK": "5", "RANK": "5", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", happened.append)
    monkeypatch.setattr(model.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(model.dist, "init_process_group", lambda backend, timeout: happened.append(backend))
    model.init_process_group(CUDA)
    assert happened == [5, "nccl"]


@pytest.mark.parametrize(
    ("launcher", "gpus", "message"),
    [
        ({"LOCAL_RANK": "4", "WORLD_SIZE": "8"}, 4, "LOCAL_RANK: '4' .*sees 4 GPUs .*at most 4 processes"),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1, "LOCAL_RANK: '1' .*sees 1 GPU .*at most 1 "),
        ({"LOCAL_RANK": "-1", "WORLD_SIZE": "2"}, 2, "LOCAL_RANK: '-1' has no GPU"),
        ({"LOCAL_RANK": "", "WORLD_SIZE": "2"}, 2, "LOCAL_RANK"),
        ({"WORLD_SIZE": "8"}, 8, "LOCAL_RANK: is not set although WORLD_SIZE is 8"),
    ],
)
def test_two_processes_never_take_one_gpu(monkeypatch, launcher, gpus, message) -> None:
    import torch

    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda rank: pytest.fail(f"took GPU {rank}"))
    with pytest.raises(UserError, match=message):
        CUDA.take_gpu()


def test_threads_divide_the_cores() -> None:
    assert [CPU.threads_for("actor", workers) for workers in (1, 2, 3, 9)] == [4, 2, 1, 1]
    assert [CPU.threads_for("rollout", workers) for workers in (1, 2, 4)] == [3, 1, 1]
    assert CPU.worker_env("actor", workers=2)["OMP_NUM_THREADS"] == "2"
    assert CPU.worker_env("rollout")["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in CUDA.worker_env("actor")


def test_rollout_workers_keep_vllm_in_their_own_process() -> None:
    for device in (CPU, CUDA):
        assert device.worker_env("rollout")["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert not any(name.startswith("VLLM") for name in device.worker_env("actor"))
    assert CUDA.worker_env("rollout")["TRITON_F32_DEFAULT"] == "ieee"
    assert all(isinstance(value, str) for value in CPU.worker_env("rollout").values())


def test_engine_arguments_of_each_device() -> None:
    assert CPU.engine_kwargs(None, enforce_eager=False, sleep_mode=True) == {
        "enforce_eager": True,
        "block_size": 32,
        "kv_cache_memory_bytes": 1 << 30,
    }
    assert CPU.engine_kwargs(5, enforce_eager=True, sleep_mode=False)["kv_cache_memory_bytes"] == 5
    for asked in (False, True):
        expected = {"enforce_eager": False, "enable_sleep_mode": asked}
        assert CUDA.engine_kwargs(None, enforce_eager=False, sleep_mode=asked) == expected
    assert CUDA.engine_kwargs(7, enforce_eager=True, sleep_mode=False)["kv_cache_memory_bytes"] == 7
    assert not CPU.chunked_prefill


def test_memory_of_this_process() -> None:
    # A mapping of its own: the allocator may serve a block from memory that it already holds.
    before = CPU.memory()
    block = mmap.mmap(-1, 64 << 20)
    block.write(b"x" * (64 << 20))
    after = CPU.memory()
    assert after.used_bytes - before.used_bytes > 32 << 20
    assert after.used_bytes <= after.peak_bytes + (1 << 20)
    assert after.peak_bytes < after.total_bytes
    block.close()


def test_importing_the_device_module_imports_nothing_heavy() -> None:
    code = "import sys, searchr1.device; print(sorted({'torch', 'vllm', 'ray'} & set(sys.modules)))"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
