"""`searchr1 plan-memory` for an evaluation: only the engine is on the GPUs."""

from __future__ import annotations

from dataclasses import replace

from searchr1.config.memory_layout import PRECISION_BYTES
from searchr1.config.memory_plan import CONTEXT_BYTES, GIB, Line, MemoryPlan, engine_problem
from searchr1.config.memory_shapes import ModelShape
from searchr1.config.placement import group_ranks
from searchr1.config.schema import Config
from searchr1.device import Device
from searchr1.errors import UserError


def plan_evaluation(model: ModelShape, config: Config, gpus: int, gpu_bytes: int) -> MemoryPlan:
    """The plan of one GPU of an engine.

    Raises:
        UserError: a placement that does not fit, or a precision that is not known.
    """
    rollout = config.rollout
    if rollout.model.precision not in PRECISION_BYTES:
        raise UserError(f"rollout.model.precision: {rollout.model.precision!r} is not one of {', '.join(PRECISION_BYTES)}")
    placed = replace(config, cluster=replace(config.cluster, slots=gpus))
    size = len(group_ranks(placed, "rollout", Device(kind="cuda", slots=gpus, cores=1))[0])
    weights = PRECISION_BYTES[rollout.model.precision] * model.parameters / size
    room = rollout.gpu_memory_utilization * gpu_bytes
    text = f"gpu_memory_utilization {rollout.gpu_memory_utilization:g} x {gpu_bytes / GIB:g} GiB, of which weights "
    lines = (
        Line("rollout engine", round(room), f"{text}{weights / GIB:.1f} GiB", ("rollout",)),
        Line("context", CONTEXT_BYTES, "assumed: 1 GiB", ("rollout",)),
    )
    return MemoryPlan(0, model.parameters, lines, engine_problem(weights, room))
