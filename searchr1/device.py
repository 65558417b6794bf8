"""The one place where CPU and GPU differ.

Everything else asks a `Device` and never tests for CUDA itself. Importing this module imports neither torch nor vLLM.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from searchr1 import nvidia
from searchr1.errors import UserError

if TYPE_CHECKING:
    import torch

DeviceKind = Literal["cpu", "cuda"]
Role = Literal["rollout", "actor", "inference", "reward"]

GIB = 1 << 30
_CPU_FLAGS = {
    "bf16": {"avx512_bf16", "amx_bf16", "bf16", "svebf16"},
    "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}
"""Names of /proc/cpuinfo, of x86 and ARM."""


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """Bytes held by this process on its device (host memory on a CPU)."""

    used_bytes: int
    peak_bytes: int
    total_bytes: int
    """What the whole device (or machine) has."""


@dataclass(frozen=True, slots=True)
class Device:
    """What kind of hardware the run uses and everything that follows from it."""

    kind: DeviceKind
    slots: int
    """How many workers of one group fit: GPUs, or usable cores on a CPU."""
    cores: int
    """CPU cores that this process may use."""

    @classmethod
    def detect(cls, setting: str = "auto", key: str = "cluster.device") -> Device:
        """Find the device.

        Args:
            setting: "auto" (a GPU if there is one), "cpu" or "cuda".
            key: what the user set it by, for messages.

        Raises:
            UserError: unknown setting; "cuda" without a usable GPU; "auto" with a GPU that torch cannot use, unless the user
                chose the CPU.
        """
        if setting not in ("auto", "cpu", "cuda"):
            raise UserError(key, f"{setting!r} is not known; use auto, cpu or cuda")
        cores = usable_cores()
        gpus = 0 if setting == "cpu" else _cuda_device_count()
        if gpus:
            return cls(kind="cuda", slots=gpus, cores=cores)
        if setting == "cuda":
            raise UserError(key, f"cuda was asked for, but torch sees no GPU: {nvidia.why_unusable()}; or set {key}=cpu")
        if setting == "auto":
            nvidia.cpu_instead_of_gpu(key)
        return cls(kind="cpu", slots=cores, cores=cores)

    @property
    def is_cuda(self) -> bool:
        """True on GPUs."""
        return self.kind == "cuda"

    @property
    def has_bf16(self) -> bool:
        """False on GPUs before Ampere, where vLLM rejects bf16."""
        if not self.is_cuda:
            return True
        import torch

        return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)

    def computes_in(self, precision: str) -> bool:
        """Return whether a CPU has instructions for a precision (`fp32`, `bf16` or `fp16`), or is not known to lack them."""
        flags = cpu_flags()
        return self.is_cuda or not flags or precision not in _CPU_FLAGS or bool(flags & _CPU_FLAGS[precision])

    @property
    def workers_for_all(self) -> int:
        """Return how many workers the placement "all" means: one per GPU, or one on a CPU (workers share its cores)."""
        return self.slots if self.is_cuda else 1

    def torch_device(self) -> torch.device:
        """Return the torch device of this process: the CPU, or the GPU at LOCAL_RANK (0 without one) of those that it sees.

        RLinf shows each worker its own GPUs and sets LOCAL_RANK to 0; torchrun shows every process all of them.
        """
        import torch

        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if self.is_cuda else torch.device("cpu")

    def take_gpu(self) -> None:
        """Make this process's GPU its current one, before anything else of torch touches a GPU. Does nothing on a CPU.

        Raises:
            UserError: LOCAL_RANK is missing although there are several processes, or is no GPU that this process sees.
        """
        if not self.is_cuda:
            return
        import torch

        text, world = os.environ.get("LOCAL_RANK"), int(os.environ.get("WORLD_SIZE", "1"))
        if text is None and world > 1:
            raise UserError(
                "LOCAL_RANK",
                f"is not set although WORLD_SIZE is {world}, so every process would take the same GPU; start "
                "them with torchrun, or set it to each process's number on its machine",
            )
        count, rank = torch.cuda.device_count(), "0" if text is None else text
        if not (rank.isascii() and rank.isdigit()) or int(rank) >= count:
            raise UserError(
                "LOCAL_RANK",
                f"{rank!r} has no GPU of its own, because this process sees {count} GPU"
                f"{'' if count == 1 else 's'} (CUDA_VISIBLE_DEVICES); start at most {count} processes on this machine "
                "(torchrun --nproc-per-node)",
            )
        torch.cuda.set_device(int(rank))

    @property
    def collective_backend(self) -> str:
        """Return the torch.distributed backend."""
        return "nccl" if self.is_cuda else "gloo"

    def driver_env(self) -> dict[str, str]:
        """Return environment variables that workers inherit from the driver, because torch reads them at import."""
        return {} if self.is_cuda else {"OMP_WAIT_POLICY": "PASSIVE", "TORCHDYNAMO_DISABLE": "1"}

    def worker_env(self, role: Role, workers: int = 1) -> dict[str, str]:
        """Return environment variables of a worker, to be set before its process imports torch or vLLM.

        Args:
            role: the worker's group.
            workers: how many workers of that group share this machine; they divide the cores.
        """
        env = {"TOKENIZERS_PARALLELISM": "false"}
        if role == "rollout":
            env |= {
                # The engine lives in the worker's own process, stepped by a thread (see rollout/engine.py).
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            }
        if self.is_cuda:
            if role == "rollout":
                # Requests have seeds, which FlashInfer's top-k and top-p kernels cannot follow: vLLM would import it,
                # check its compiler at run time, and then never call it.
                env["VLLM_USE_FLASHINFER_SAMPLER"] = os.environ.get("VLLM_USE_FLASHINFER_SAMPLER", "0")
                # Attention in float32 is Triton's, which would multiply in TF32: log-probabilities off by 1e-3 to 1e-2.
                env["TRITON_F32_DEFAULT"] = "ieee"
            return env
        env["OMP_NUM_THREADS"] = str(self.threads_for(role, workers))
        # Threads that spin while they wait make a busy machine ten times slower (measured: 360 against 3,100 tokens/s).
        env["OMP_WAIT_POLICY"] = "PASSIVE"
        if role == "rollout":
            env |= {
                # Eager only: compiling vLLM's small helper functions costs a first run some 15 s and saves nothing.
                "TORCHDYNAMO_DISABLE": "1",
                # Tensor-parallel ranks must not be bound one per NUMA node: most machines have a single one.
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            }
        return env

    def threads_for(self, role: Role, workers: int = 1) -> int:
        """Return the OpenMP threads of one worker of this group.

        The groups take turns, so each gets all cores; the rollout leaves one to its event loop and the search server.
        """
        share = max(1, self.cores // max(1, workers))
        return max(1, share - 1) if role == "rollout" else share

    def engine_kwargs(self, kv_cache_bytes: int | None, enforce_eager: bool, sleep_mode: bool) -> dict[str, Any]:
        """Return the vLLM engine arguments that differ between devices.

        Args:
            kv_cache_bytes: size of the KV cache; None: 1 GiB on a CPU, what `gpu_memory_utilization` leaves on a GPU.
            enforce_eager: the user's wish; a CPU is always eager.
            sleep_mode: whether the engine will hand its memory back between rollouts; a CPU has none to hand back.
        """
        if self.is_cuda:
            kwargs: dict[str, Any] = {"enforce_eager": enforce_eager, "enable_sleep_mode": sleep_mode}
            if kv_cache_bytes is not None:
                kwargs["kv_cache_memory_bytes"] = kv_cache_bytes
            return kwargs
        return {
            "enforce_eager": True,
            # CPU attention wants blocks in multiples of 32 tokens.
            "block_size": 32,
            "kv_cache_memory_bytes": GIB if kv_cache_bytes is None else kv_cache_bytes,
        }

    @property
    def chunked_prefill(self) -> bool:
        """Return whether a prompt may be prefilled in parts.

        Not on a CPU: vLLM takes a seeded draw back by moving the generator's offset, which CPU generators do not have,
        so a seeded request whose prompt is split kills the engine.
        """
        return self.is_cuda

    def synchronize(self) -> None:
        """Wait for queued work on the device."""
        if self.is_cuda:
            import torch

            torch.cuda.synchronize()

    def empty_cache(self) -> None:
        """Return memory that torch has freed but kept to the device, for another process to use."""
        if self.is_cuda:
            import torch

            torch.cuda.empty_cache()

    def memory(self) -> MemoryStats:
        """Return the memory of this process: allocated by torch on a GPU, resident on a CPU."""
        if self.is_cuda:
            import torch

            return MemoryStats(
                used_bytes=torch.cuda.memory_allocated(),
                peak_bytes=torch.cuda.max_memory_allocated(),
                total_bytes=torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory,
            )
        return _host_memory()


def usable_cores() -> int:
    """Return the CPU cores that this process may use: its affinity mask, cut by a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cores


def usable_memory() -> int:
    """Return the bytes of host memory that this process may use: the machine's, cut by a container's limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(limits)


def cpu_flags() -> set[str]:
    """Return the instruction sets of the first CPU; empty where the system does not list them."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return set(value.split())
    except OSError:
        pass
    return set()


def _cuda_device_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _host_memory() -> MemoryStats:
    import resource

    # Linux counts the peak in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    try:
        used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        used = peak
    return MemoryStats(
        used_bytes=used, peak_bytes=peak, total_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )


def have_liger() -> bool:
    """Return whether Liger's kernels are installed."""
    return importlib.util.find_spec("liger_kernel") is not None
