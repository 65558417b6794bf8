"""The tables of docs/guides/layouts.md: per model and number of GPUs, the layout that fits and costs least speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import log2

from searchr1.checkpoints.model_shape import ModelShape
from searchr1.checkpoints.parameter_counts import SHAPES
from searchr1.errors import UserError
from searchr1.preflight.memory_layout import Layout
from searchr1.preflight.memory_plan import GIB, PHASES, MemoryPlan, plan_memory

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
    """Layouts with a rough price each: recomputing costs a third, the rest is rated by rule of thumb."""
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
    """The cheapest layout that fits, or, where none does, the one that comes nearest."""
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
    """One line of the table."""
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
    """Both backends' tables, in Markdown."""
    found = []
    for backend in ("fsdp", "megatron"):
        found += [f"### training_backend: {backend}", "", HEAD, "|" + "---|" * HEAD.count(" | ") + "---|"]
        for name in MODELS:
            for gpus in GPUS:
                found.append(row(name, *best_layout(SHAPES[name], backend, gpus)))
        found.append("")
    return "\n".join(found).rstrip()
