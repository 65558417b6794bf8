"""GPU memory of a run or an evaluation by arithmetic, and the table of layouts. No torch; all sizes in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import log2

from searchr1.checkpoints.model_shape import SHAPES, ModelShape, stage_parameters
from searchr1.config.layout import group_ranks
from searchr1.config.schema import Config
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.preflight.memory_layout import Layout, with_engine
from searchr1.preflight.memory_lines import (
    CONTEXT_BYTES,
    ENGINE_WORK,
    GIB,
    PHASES,
    Line,
    cache_token_bytes,
    engine_lines,
    engine_room,
    in_phase,
    kept_activations,
    layer_activation,
    reference_lines,
    state_lines,
    train_lines,
    update_lines,
)

__all__ = [
    "CONTEXT_BYTES", "GIB", "PHASES", "SHAPES", "Layout", "Line", "MemoryPlan", "engine_problem",
    "kept_activations", "knobs", "layer_activation", "plan_memory", "remedy",
]  # fmt: skip

FRAGMENTATION = 0.05
"""Assumed share of the training phase that the allocator cannot use."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What the fullest GPU holds."""

    stage: int
    """Pipeline stage, from 0."""
    parameters: int
    """On this rank before sharding over data-parallel ranks."""
    lines: tuple[Line, ...]
    problem: str = ""
    """Why the engine cannot start, if so."""
    where: str = "actor"
    """Whose GPU it is."""

    def total(self, phase: str) -> int:
        """Return bytes in a phase."""
        return in_phase(self.lines, phase)

    @property
    def peak(self) -> int:
        """Bytes in the worst phase."""
        return max(self.total(phase) for phase in PHASES)

    @property
    def worst(self) -> str:
        """The phase of the peak."""
        return max(PHASES, key=self.total)

    def fits(self, gpu_bytes: int) -> bool:
        """Return whether every phase fits."""
        return not self.problem and self.peak <= gpu_bytes


def _critic_lines(model: ModelShape, layout: Layout, actor: list[Line]) -> list[Line]:
    """Add the critic, which trains before the actor: what it holds, and what it needs then beyond the actor.

    Which of the critic's stages shares a GPU with which of the actor's depends on both layouts; the worst one counts.
    """
    if layout.critic is None or layout.critic_apart:
        return []
    value_model, critic = replace(model, value_head=True), layout.critic
    stages = [
        (state_lines(value_model, critic, stage), train_lines(value_model, critic, stage)) for stage in range(critic.pp)
    ]
    state, training = max(stages, key=lambda found: in_phase([*found[0], *found[1]], "train"))
    alone = in_phase([*state, *training], "train")
    # Away from the GPU are the actor's offloaded state while the critic trains, and the critic's while the actor does.
    held, others = in_phase(state, "rollout"), in_phase(actor, "rollout")
    more = max(held, alone + others - in_phase(actor, "train"))
    cut = f", TP {critic.tp} x PP {critic.pp} x DP {critic.dp}" if critic.backend == "megatron" else ""
    text = f"{alone / GIB:.2f} GiB while it trains, before the actor; counted is what is more than the actor needs"
    return [
        *(
            replace(line, name=f"critic: {line.name}", phases=tuple(phase for phase in line.phases if phase != "train"))
            for line in state
            if line.size and line.phases != ("train",)
        ),
        Line("critic", more, f"{critic.backend}{cut}: {text}", ("train",)),
    ]


def _contexts(processes: int) -> Line:
    text = f"assumed: 1 GiB x {processes} process{'es' if processes > 1 else ''}"
    return Line("contexts", CONTEXT_BYTES * processes, text)


def _stage_plan(model: ModelShape, layout: Layout, gpu_bytes: int, stage: int) -> MemoryPlan:
    lines = [*state_lines(model, layout, stage), *train_lines(model, layout, stage)]
    own = stage_parameters(model, layout.tp, layout.pp, stage) if layout.backend == "megatron" else model.parameters
    critic = _critic_lines(model, layout, lines)
    lines += critic
    if layout.reference:
        lines += reference_lines(model, layout)
    if layout.shared:
        lines += engine_lines(model, layout, gpu_bytes)
    if layout.section == "actor":
        lines += update_lines(model, layout)
    lines.append(_contexts(1 + layout.shared + layout.reference + bool(critic)))
    lines.append(_margin(lines))
    return MemoryPlan(stage, own, tuple(lines), engine_problem(model, layout, gpu_bytes), layout.section)


def _margin(lines: list[Line]) -> Line:
    spare = round(FRAGMENTATION * in_phase(lines, "train"))
    return Line("margin", spare, f"assumed: {FRAGMENTATION:.0%} of training, for fragmentation", ("train",))


def _other_plans(model: ModelShape, layout: Layout, gpu_bytes: int) -> list[MemoryPlan]:
    """Plan the GPUs without an actor."""
    found = []
    if layout.critic is not None and layout.critic_apart:
        value_model = replace(model, value_head=True)
        found += [_stage_plan(value_model, layout.critic, gpu_bytes, stage) for stage in range(layout.critic.pp)]
    if not layout.shared or layout.reference_by_engine:
        with_engine = engine_lines(model, layout, gpu_bytes)
        if not layout.reference_by_engine:  # then it never sleeps
            with_engine = [replace(with_engine[0], phases=PHASES)]
        with_engine += reference_lines(model, layout) if layout.reference_by_engine else []
        with_engine.append(_contexts(1 + layout.reference_by_engine))
        found.append(MemoryPlan(0, model.parameters, tuple(with_engine), where="engine"))
    if layout.reference_apart and not layout.reference_by_engine:
        lines = [*reference_lines(model, layout), _contexts(1)]
        found.append(MemoryPlan(0, model.parameters, tuple(lines), where="reference model"))
    return found


def engine_problem(model: ModelShape, layout: Layout, gpu_bytes: int) -> str:
    """Say why an engine cannot start; empty if it can. vLLM refuses a cache that cannot hold the longest trajectory."""
    weights, room = layout.engine_bytes * model.parameters / layout.engine_tp, engine_room(model, layout, gpu_bytes)
    longest = cache_token_bytes(model, layout) * layout.longest
    if weights + ENGINE_WORK + longest <= room:
        return ""
    need = f"weights {weights / GIB:.1f}, {ENGINE_WORK / GIB:g} to work in, cache of one trajectory {longest / GIB:.1f} GiB"
    return (
        f"the engine needs more ({need}) than the {room / GIB:.1f} GiB a GPU that it is given; raise "
        "rollout.gpu_memory_utilization (or rollout.vllm.kv_cache_memory_gb) or rollout.tensor_parallel_size"
    )


def plan_memory(model: ModelShape, layout: Layout, gpu_bytes: int = 80 * GIB) -> MemoryPlan:
    """Return the plan of the GPU that needs most: in its worst phase if that is too much, else of the actor's in training.

    Raises:
        UserError: the layout does not fit the model's sizes.
    """
    layout.check(model)
    plans = [_stage_plan(model, layout, gpu_bytes, stage) for stage in range(layout.pp)]
    others = [plan for plan in _other_plans(model, layout, gpu_bytes) if plan.peak > gpu_bytes]
    return max([*plans, *others], key=lambda plan: (plan.peak if plan.peak > gpu_bytes else 0, plan.total("train")))


def knobs(model: ModelShape, layout: Layout, gpu_bytes: int) -> list[tuple[str, Layout, MemoryPlan]]:
    """Try single changes that lower the peak, the best first: the key and its value, and what comes of it."""
    now, found = plan_memory(model, layout, gpu_bytes), []
    for text, changed in layout.variants():
        try:
            plan = plan_memory(model, changed, gpu_bytes)
        except UserError:
            continue  # the model cannot be cut that way
        if plan.peak < now.peak or (now.problem and not plan.problem):
            found.append((text, changed, plan))
    return sorted(found, key=lambda item: (bool(item[2].problem), item[2].peak))


def remedy(model: ModelShape, layout: Layout, gpu_bytes: int) -> tuple[list[str], MemoryPlan]:
    """Search for changes that together make the run fit on its GPUs, taking the best one at a time.

    The plan returned does not fit if none do.
    """
    taken: list[str] = []
    plan = plan_memory(model, layout, gpu_bytes)
    while not plan.fits(gpu_bytes) and len(taken) < 8:
        options = [item for item in knobs(model, layout, gpu_bytes) if "component_placement" not in item[0]]
        if not options:
            break
        text, layout, plan = options[0]
        taken.append(text)
    return taken, plan


def plan_evaluation(model: ModelShape, config: Config, gpus: int, gpu_bytes: int) -> MemoryPlan:
    """Return the plan of one GPU of an engine.

    Raises:
        UserError: a placement that does not fit, or a precision that is not known.
    """
    placed = replace(config, cluster=replace(config.cluster, slots=gpus))
    group_ranks(placed, "rollout", Device(kind="cuda", slots=gpus, cores=1))  # refuses engines that do not fit
    layout = with_engine(Layout(), config)
    engine = engine_lines(model, layout, gpu_bytes)[0]
    lines = (
        replace(engine, phases=("rollout",)),
        Line("context", CONTEXT_BYTES, "assumed: 1 GiB", ("rollout",)),
    )
    return MemoryPlan(0, model.parameters, lines, engine_problem(model, layout, gpu_bytes), "engine")


MODELS = ("qwen3-0.6b", "qwen2.5-3b", "qwen2.5-7b", "qwen2.5-14b", "qwen2.5-32b", "qwen2.5-72b")
GPUS = (1, 2, 4, 8)
GPU_BYTES = 80 * GIB
TOKENS = 11008
PER_NODE = 8
"""TP and an engine stay within a node."""
SHOWN = PHASES[:-1]
"""The last is a rollout without the reference model's work."""
HEAD = f"| model | GPUs | TP | PP | DP | recompute | offload | engine | {' | '.join(SHOWN)} | largest of training |"


def candidates(backend: str, gpus: int) -> Iterator[tuple[float, Layout]]:
    """Yield layouts with a rough price each: recomputing costs a third, the rest is rated by rule of thumb."""
    base = Layout(backend=backend, gpus=gpus, reference_gpus=gpus, max_tokens=TOKENS)
    powers = [size for size in (1, 2, 4, 8) if size <= gpus]
    megatron = backend == "megatron"
    # Moving state to host memory while the engine generates (actor.offload_*) is Megatron's; FSDP has cpu_offload.
    cuts = [(tp, pp) for tp, pp in product(powers, powers) if tp * pp <= gpus] if megatron else [(1, 1)]
    aways, host = ((False, True), (False,)) if megatron else ((False,), (False, True))
    for (tp, pp), full, away, cpu, share, engine_tp in product(
        cuts, (False, True), aways, host, (0.75, 0.6, 0.45, 0.3), powers
    ):
        price = 0.33 * full + 0.1 * away + 1.0 * cpu + 0.15 * log2(tp) + 0.25 * log2(pp)
        price += 0.4 * (0.75 - share) + 0.05 * log2(engine_tp)
        yield (
            price,
            replace(
                base, tp=tp, pp=pp, sequence_parallel=tp > 1, recompute="full" if full else "none", cpu_offload=cpu,
                offload_weight=away, offload_grad=away, offload_optimizer=away, engine_share=share, engine_tp=engine_tp,
            ),
        )  # fmt: skip


def best_layout(model: ModelShape, backend: str, gpus: int) -> tuple[Layout, MemoryPlan]:
    """Return the cheapest layout that fits, or, where none does, the one that comes nearest."""
    fitting: list[tuple[float, int, Layout, MemoryPlan]] = []
    nearest: list[tuple[bool, int, int, Layout, MemoryPlan]] = []
    for number, (price, layout) in enumerate(candidates(backend, gpus)):
        try:
            plan = plan_memory(model, layout, GPU_BYTES)
        except UserError:
            continue  # the model cannot be cut that way
        if plan.fits(GPU_BYTES):
            fitting.append((price, number, layout, plan))
        nearest.append((bool(plan.problem), plan.peak, number, layout, plan))
    return min(fitting)[2:] if fitting else min(nearest)[3:]


def row(name: str, layout: Layout, plan: MemoryPlan) -> str:
    """Return one line of the table."""
    largest = max((line for line in plan.lines if "train" in line.phases), key=lambda line: line.size)
    totals = [f"{plan.total(phase) / GIB:.1f}" for phase in SHOWN]
    away = "always (cpu_offload)" if layout.cpu_offload else "in rollout" if layout.offload_weight else "no"
    megatron = layout.backend == "megatron"
    cut = [str(layout.tp), str(layout.pp), str(layout.dp)] if megatron else ["–", "–", str(layout.gpus)]
    if not plan.fits(GPU_BYTES):
        totals = [
            f"**{text}**" if plan.total(phase) > GPU_BYTES else text for text, phase in zip(totals, SHOWN, strict=True)
        ]
        name += " **does not fit**" + (" (engine)" if plan.problem else "")
    engine = f"TP {layout.engine_tp}, {layout.engine_share:g}"
    cells = [name, str(layout.gpus), *cut, layout.recompute, away, engine, *totals]
    return "| " + " | ".join([*cells, f"{largest.name}, {largest.size / GIB:.1f}"]) + " |"


def layouts_table() -> str:
    """Return both backends' tables, in Markdown."""
    found = []
    for backend in ("fsdp", "megatron"):
        found += [f"### training_backend: {backend}", "", HEAD, "|" + "---|" * HEAD.count(" | ") + "---|"]
        for name in MODELS:
            for gpus in GPUS:
                found.append(row(name, *best_layout(SHAPES[name], backend, gpus)))
        found.append("")
    return "\n".join(found).rstrip()
