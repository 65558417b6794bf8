"""`searchr1 plan-memory` for an evaluation: only the engine is on the GPUs."""

from __future__ import annotations

from dataclasses import replace

from searchr1.config.memory_layout import with_engine
from searchr1.config.memory_lines import engine_lines
from searchr1.config.memory_plan import CONTEXT_BYTES, Layout, Line, MemoryPlan, engine_problem
from searchr1.config.memory_shapes import ModelShape
from searchr1.config.placement import group_ranks
from searchr1.config.schema import Config
from searchr1.device import Device


def plan_evaluation(model: ModelShape, config: Config, gpus: int, gpu_bytes: int) -> MemoryPlan:
    """The plan of one GPU of an engine.

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
