"""Host memory of a run by arithmetic: all processes on the machine together. No torch; all sizes in bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from searchr1.checkpoints.model_shape import ModelShape, shard_adapters
from searchr1.config.layout import group_ranks
from searchr1.config.schema import Config
from searchr1.device import Device
from searchr1.preflight.memory_layout import PRECISION_BYTES, Layout, layout_of
from searchr1.preflight.memory_lines import (
    GIB,
    Line,
    bucket_bytes,
    cache_token_bytes,
    in_phase,
    reference_lines,
    state_lines,
    train_lines,
)
from searchr1.preflight.memory_plan import MemoryPlan

CPU_PROCESS, GPU_PROCESS = 3 * GIB // 4, 2 * GIB
"""Assumed of a process: its libraries, and on a GPU what CUDA and NCCL keep in host memory."""
RAY_BYTES = GIB
"""Assumed: Ray's own processes, and the driver."""
CPU_CACHE = GIB
"""Of an engine on a CPU, unless `rollout.vllm.kv_cache_memory_gb` says otherwise."""
CPU_ENGINE_WORK = GIB // 2
"""Assumed of an engine on a CPU beside weights and cache."""
CPU_LOSS_BYTES = 64 << 20
"""Of the loss, as in `Layout.loss_bytes`."""
CPU_PHASES = ("rollout", "train", "sync")
"""Nothing leaves a CPU's memory between phases; these differ by what is needed for a moment."""


@dataclass(frozen=True, slots=True)
class Processes:
    """How many of each group there are on the machine."""

    actor: int = 0
    reference: int = 0
    critic: int = 0
    engines: int = 1
    """Processes of all engines, one a GPU."""
    reward: int = 1

    @property
    def total(self) -> int:
        """All of them."""
        return self.actor + self.reference + self.critic + self.engines + self.reward

    @classmethod
    def of(cls, config: Config, device: Device, for_training: bool) -> Processes:
        """Return the processes that a run starts.

        Raises:
            UserError: a placement that does not fit.
        """

        def count(component: str) -> int:
            return len(group_ranks(config, component, device))

        engine = config.rollout.tensor_parallel_size * config.rollout.pipeline_parallel_size
        return cls(
            actor=count("actor") if for_training else 0,
            reference=count("inference") if for_training and config.algorithm.kl_beta > 0 else 0,
            critic=count("critic") if for_training and config.critic.use_critic_model else 0,
            engines=count("rollout") * engine,
            reward=count("reward"),
        )


def plan_cpu(model: ModelShape, config: Config, for_training: bool, policy_share: float = 1.0) -> MemoryPlan:
    """Plan a run on `cluster.device: cpu`: everything that all its processes hold.

    Raises:
        UserError: a placement or layout that does not fit.
    """
    device = Device.detect("cpu")
    processes = Processes.of(config, device, for_training)
    lines = [*_cpu_engine(model, config, processes), *_overhead(processes, CPU_PROCESS)]
    if for_training:
        layout = layout_of(config, 0, policy_share, device=device).both(
            offload_weight=False, offload_grad=False, offload_optimizer=False, cpu_offload=False, loss_bytes=CPU_LOSS_BYTES
        )
        layout = replace(layout, reference_gpus=processes.reference)
        layout.check(model)
        lines = [*_cpu_training(model, layout, processes.actor, "actor"), *lines]
        if layout.critic is not None:
            value_model = replace(model, value_head=True)
            lines = [*_cpu_training(value_model, layout.critic, processes.critic, "critic"), *lines]
        if processes.reference:
            weights, forward = reference_lines(model, layout)
            many = processes.reference
            lines.append(replace(weights, size=weights.size * many))
            lines.append(replace(forward, size=forward.size * many, phases=("rollout",)))
        lines.append(_buckets(model, layout))
    return MemoryPlan(0, model.parameters, tuple(lines), _cache_problem(model, config), "host")


def _cpu_cache(config: Config) -> int:
    asked = config.rollout.vllm.kv_cache_memory_gb
    return CPU_CACHE if asked is None else round(asked * GIB)


def _cache_problem(model: ModelShape, config: Config) -> str:
    """Say why vLLM refuses the cache; empty if it does not."""
    rollout = config.rollout
    layout = Layout(engine_bytes=PRECISION_BYTES[rollout.model.precision], engine_tp=rollout.tensor_parallel_size)
    longest = cache_token_bytes(model, layout) * config.runner.seq_length
    if longest <= _cpu_cache(config):
        return ""
    return (
        f"the engine's cache ({_cpu_cache(config) / GIB:.2f} GiB) holds no trajectory of runner.seq_length "
        f"{config.runner.seq_length} tokens ({longest / GIB:.2f} GiB); raise rollout.vllm.kv_cache_memory_gb"
    )


def _cpu_engine(model: ModelShape, config: Config, processes: Processes) -> list[Line]:
    rollout = config.rollout
    number, cache = PRECISION_BYTES[rollout.model.precision], _cpu_cache(config)
    engines = processes.engines // (rollout.tensor_parallel_size * rollout.pipeline_parallel_size)
    return [
        Line("engine's weights", number * model.parameters * engines, f"{number} B x {model.parameters:,} x {engines}"),
        Line("engine's cache", cache * processes.engines, f"rollout.vllm.kv_cache_memory_gb x {processes.engines}"),
        Line("engine's work", CPU_ENGINE_WORK * processes.engines, f"assumed: 0.5 GiB x {processes.engines}"),
    ]


def _cpu_training(model: ModelShape, layout: Layout, ranks: int, name: str) -> list[Line]:
    """Return the state, which stays, and what training needs beside it."""
    plans = [(state_lines(model, layout, s), train_lines(model, layout, s)) for s in range(layout.pp)]
    state, work = max(plans, key=lambda found: in_phase([*found[0], *found[1]], "train"))
    held, moment = in_phase(state, "rollout"), in_phase([*state, *work], "train")
    what = ", ".join(f"{line.name} {line.size / GIB:.2f}" for line in state if "rollout" in line.phases and line.size)
    times = f" x {ranks} processes" if ranks > 1 else ""
    return [
        Line(f"{name}'s state", held * ranks, what + times),
        Line(f"{name} in training", (moment - held) * ranks, "gradients, activations, logits" + times, ("train",)),
    ]


def plan_gpu_host(model: ModelShape, config: Config, layout: Layout | None, gpus: int) -> MemoryPlan:
    """Plan the host memory of a run on GPUs; `layout` is None for an evaluation.

    What a rank reads at a time while it loads is part of what is assumed for its process.

    Raises:
        UserError: a placement that does not fit.
    """
    placed = replace(config, cluster=replace(config.cluster, slots=gpus))
    processes = Processes.of(placed, Device(kind="cuda", slots=gpus, cores=1), layout is not None)
    lines = _overhead(processes, GPU_PROCESS)
    if layout is not None:
        lines = [*_outside(model, layout, "actor"), *lines, _buckets(model, layout)]
        if layout.critic is not None:
            lines = [*_outside(replace(model, value_head=True), layout.critic, "critic"), *lines]
        if layout.adapter_updates and layout.shared:
            engines = processes.engines // layout.engine_tp
            size = layout.engine_bytes * model.parameters * engines
            lines.append(
                Line("sleeping engines", size, f"their weights, {layout.engine_bytes} B x {model.parameters:,} x {engines}")
            )
        if config.runner.async_save:
            size = sum(line.size for name in ("weights", "optimizer") for line in _parts(model, layout, name))
            lines.append(Line("checkpoint", size, "runner.async_save: a copy of weights and optimizer state"))
    return MemoryPlan(0, model.parameters, tuple(lines), where="host")


def _parts(model: ModelShape, layout: Layout, kind: str) -> list[Line]:
    """Return lines of one kind of state, over all ranks."""
    on_gpu = replace(layout, cpu_offload=False)
    names = {"weights": ("weights",), "optimizer": ("fp32 master", "Adam"), "gradients": ("gradients (fp32)",)}[kind]
    ranks = layout.gpus // layout.pp
    stages = [line for stage in range(layout.pp) for line in state_lines(model, on_gpu, stage)]
    return [replace(line, size=line.size * ranks) for line in stages if line.name.startswith(names)]


def _outside(model: ModelShape, layout: Layout, name: str) -> list[Line]:
    """Return what a trained model keeps in host memory: always, or while somebody else uses the GPU."""
    kinds = {"weights": layout.offload_weight, "optimizer": layout.offload_optimizer}
    if layout.cpu_offload:
        kinds = dict.fromkeys(("weights", "optimizer", "gradients"), True)
    why = "actor.fsdp.cpu_offload" if layout.cpu_offload else "actor.offload_…, pinned"
    found = []
    for kind, away in kinds.items():
        size = sum(line.size for line in _parts(model, layout, kind))
        if away and size:
            found.append(Line(f"{name}'s {kind}", size, f"of {layout.gpus} ranks together: {why}"))
    return found


def _buckets(model: ModelShape, layout: Layout) -> Line:
    if layout.adapter_updates:
        size = layout.engine_bytes * shard_adapters(model, layout.lora_rank, layout.lora_targets, 1)
        return Line("weight buffers", size, "in /dev/shm: the adapters")
    return Line("weight buffers", 2 * bucket_bytes(model, layout), "in /dev/shm: two, for the length of the run")


def _overhead(processes: Processes, each: int) -> list[Line]:
    return [
        Line("processes", each * processes.total, f"assumed: {each / GIB:g} GiB x {processes.total}"),
        Line("Ray and the driver", RAY_BYTES, "assumed: 1 GiB"),
    ]
