"""`searchr1 plan-memory`: what a run would need of each GPU and of the host, by its YAML, without loading a model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from searchr1.checkpoints.model_shape import SHAPES, ModelShape, guess_shape, read_shape, shape_named
from searchr1.config.layout import is_evaluation
from searchr1.config.load import config_help, load_for_command
from searchr1.config.schema import Config
from searchr1.device import usable_memory
from searchr1.errors import UserError
from searchr1.preflight.check_device import require_one_node
from searchr1.preflight.memory_host import CPU_PHASES, plan_cpu, plan_gpu_host
from searchr1.preflight.memory_layout import Layout, layout_of
from searchr1.preflight.memory_plan import (
    GIB,
    PHASES,
    MemoryPlan,
    knobs,
    layouts_table,
    plan_evaluation,
    plan_memory,
    remedy,
)

GPUS_PER_NODE = 8
"""What `all` means unless `cluster.slots` or `--gpus` says otherwise."""
NOT_MEASURED = "Computed, not measured: see docs/guides/layouts.md for what the formulas leave out."


def find_model(config: Config, model_config: str | None, shape: str | None) -> tuple[ModelShape, str]:
    """Return the model's sizes and where they are from.

    Raises:
        UserError: nothing says what model it is.
    """
    if shape is not None:
        return shape_named(shape), f"shape {shape.lower()}"
    if model_config is not None:
        return read_shape(Path(model_config)), model_config
    key = "actor.model.path" if config.actor.model.path else "rollout.model.model_path"
    path = config.actor.model.path or config.rollout.model.model_path
    if path and (Path(path) / "config.json").is_file():
        return read_shape(Path(path)), f"{path}/config.json"
    guess = guess_shape(path)
    if guess is None:
        raise UserError(
            key,
            f"{path or 'empty'} has no config.json here; give --model-config config.json, or --shape with one of "
            f"{', '.join(SHAPES)}",
        )
    return SHAPES[guess], f"shape {guess}, by the name in {key}"


def describe(layout: Layout) -> str:
    """Return the layout in one line."""
    megatron = layout.backend == "megatron"
    words = [
        f"{layout.backend}, {layout.gpus} GPU{'s' if layout.gpus > 1 else ''}",
        *([f"TP {layout.tp} x PP {layout.pp} x DP {layout.dp}"] if megatron else []),
        f"{'bf16' if layout.compute_bytes == 2 else 'fp32'}",
        f"recompute {layout.recompute}",
        *([f"LoRA of rank {layout.lora_rank}"] if layout.lora_rank else []),
        *(["sequence parallel"] if layout.sequence_parallel else []),
        f"{layout.max_tokens} tokens a micro-batch",
        f"engine TP {layout.engine_tp}, {'shared' if layout.shared else 'own'} GPUs",
    ]
    return ", ".join(words)


def show_table(console: Console, plan: MemoryPlan, phases: Sequence[str], title: str, limit: int | None) -> None:
    """Format the lines of a plan, and their sum in each phase."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(title)
    for phase in phases:
        table.add_column(phase, justify="right", no_wrap=True)
    table.add_column("how", style="dim")
    for line in plan.lines:
        if line.size or set(line.phases) & set(phases) == set(phases):
            cells = [f"{line.size / GIB:.2f}" if phase in line.phases else "" for phase in phases]
            table.add_row(line.name, *cells, line.formula)
    table.add_section()
    of = "" if limit is None else f"of {limit / GIB:.4g}"
    table.add_row("total", *(f"{plan.total(phase) / GIB:.2f}" for phase in phases), of)
    console.print(table)


def show(console: Console, plan: MemoryPlan, model: ModelShape, layout: Layout, gpu_bytes: int) -> None:
    """Format the table, the verdict and what to change."""
    title = "GiB on the fullest GPU" if plan.where == "actor" else f"GiB on the {plan.where}'s GPU"
    show_table(console, plan, PHASES, title, gpu_bytes)
    if plan.problem:
        console.print(f"The engine does not start: {plan.problem}.")
    if plan.fits(gpu_bytes):
        spare = (gpu_bytes - plan.peak) / GIB
        console.print(f"[bold]Fits[/]: {spare:.1f} GiB to spare in the worst phase ({plan.worst}).")
        return
    over = [phase for phase in PHASES if plan.total(phase) > gpu_bytes]
    if over:
        missing = (plan.peak - gpu_bytes) / GIB
        console.print(f"[bold]Does not fit[/]: {missing:.1f} GiB too much in the worst phase ({', '.join(over)} over).")
    console.print("What a single change makes of the worst phase:")
    for text, _, changed in knobs(model, layout, gpu_bytes):
        verdict = "fits" if changed.fits(gpu_bytes) else "not enough"
        console.print(f"  {changed.peak / GIB:7.1f} GiB  {text}  ({verdict})")
    taken, best = remedy(model, layout, gpu_bytes)
    if best.fits(gpu_bytes) and len(taken) > 1:
        console.print(f"Together these fit: {'; '.join(taken)}.")
    elif not best.fits(gpu_bytes):
        console.print("No set of these changes fits on these GPUs; take more, or larger ones.")


def host_fits(plan: MemoryPlan, host_bytes: int | None) -> bool:
    """Report whether the host's memory is enough, as far as that is known."""
    return not plan.problem and (host_bytes is None or plan.peak <= host_bytes)


def show_host(console: Console, plan: MemoryPlan, host_bytes: int | None) -> None:
    """Format the host memory of a run on GPUs."""
    parts = ", ".join(f"{line.name} {line.size / GIB:.1f}" for line in plan.lines if line.size)
    console.print(f"Host memory, all processes together: {plan.peak / GIB:.0f} GiB ({parts}).", markup=False)
    if not host_fits(plan, host_bytes):
        assert host_bytes is not None
        console.print(
            f"[bold]Does not fit[/] the host: {(plan.peak - host_bytes) / GIB:.1f} GiB more than --host-gib; set "
            "actor.offload_weight and actor.offload_optimizer to False, or train adapters (actor.lora.rank)."
        )


def show_cpu(console: Console, plan: MemoryPlan, for_training: bool, host_bytes: int) -> None:
    """Format the plan of a run on a CPU."""
    phases = CPU_PHASES if for_training else CPU_PHASES[:1]
    show_table(console, plan, phases, "GiB of host memory, all processes", host_bytes)
    if plan.problem:
        console.print(f"The engine does not start: {plan.problem}.")
    elif plan.peak <= host_bytes:
        console.print(f"[bold]Fits[/]: {(host_bytes - plan.peak) / GIB:.1f} GiB to spare in the worst phase.")
    else:
        console.print(
            f"[bold]Does not fit[/]: {(plan.peak - host_bytes) / GIB:.1f} GiB too much in the worst phase; take fewer "
            "processes (cluster.component_placement), a smaller rollout.vllm.kv_cache_memory_gb or "
            "runner.max_tokens_per_mbs, or a smaller model."
        )


def plan_json(plan: MemoryPlan, phases: Sequence[str] = PHASES) -> dict[str, Any]:
    """Return a plan's lines and sums."""
    lines = [dataclasses.asdict(line) for line in plan.lines]
    return {"lines": lines, "totals": {phase: plan.total(phase) for phase in phases}, "problem": plan.problem}


def model_json(model: ModelShape, source: str) -> dict[str, Any]:
    """Return the model's sizes."""
    return {"model": dataclasses.asdict(model) | {"parameters": model.parameters, "source": source}}


def as_json(plan: MemoryPlan, layout: Layout, model: ModelShape, gpu_bytes: int) -> dict[str, Any]:
    """Return everything of a run on GPUs, for programs; sizes in bytes."""
    fits = plan.fits(gpu_bytes)
    return plan_json(plan) | {
        "layout": dataclasses.asdict(layout) | {"dp": layout.dp},
        "stage": plan.stage,
        "where": plan.where,
        "rank_parameters": plan.parameters,
        "gpu_bytes": gpu_bytes,
        "fits": fits,
        "knobs": []
        if fits
        else [
            {"change": text, "peak": changed.peak, "fits": changed.fits(gpu_bytes)}
            for text, _, changed in knobs(model, layout, gpu_bytes)
        ],
    }


def show_evaluation(console: Console, plan: MemoryPlan, gpu_bytes: int) -> None:
    """Format the plan of an evaluation: a list, and the verdict."""
    console.print("an evaluation: the engine alone, on each of its GPUs")
    for line in plan.lines:
        console.print(f"  {line.name:<15} {line.size / GIB:7.2f} GiB  {line.formula}", markup=False)
    if plan.problem:
        console.print(f"The engine does not start: {plan.problem}.")
    elif plan.fits(gpu_bytes):
        console.print(f"[bold]Fits[/]: {(gpu_bytes - plan.peak) / GIB:.1f} GiB to spare.")
    else:
        missing = (plan.peak - gpu_bytes) / GIB
        console.print(f"[bold]Does not fit[/]: {missing:.1f} GiB too much; lower rollout.gpu_memory_utilization.")


def _on_cpu(config: Config, model: ModelShape, source: str, args: argparse.Namespace) -> int:
    """Plan a run on a CPU against what the machine has, or what `--host-gib` says."""
    for_training = not is_evaluation(config)
    host_bytes = usable_memory() if args.host_gib is None else round(args.host_gib * GIB)
    plan = plan_cpu(model, config, for_training, args.policy_share)
    fits = plan.fits(host_bytes)
    if args.json:
        phases = CPU_PHASES if for_training else CPU_PHASES[:1]
        found = model_json(model, source) | {"device": "cpu"} | plan_json(plan, phases)
        print(json.dumps(found | {"host_bytes": host_bytes, "fits": fits}, indent=1))
        return 0 if fits else 1
    console = _console()
    console.print(f"model    {source}: {model.parameters:,} parameters", markup=False)
    whose = "of this machine" if args.host_gib is None else "as --host-gib says"
    console.print(f"device   cpu, {host_bytes / GIB:.1f} GiB of memory {whose}")
    show_cpu(console, plan, for_training, host_bytes)
    console.print(NOT_MEASURED)
    return 0 if fits else 1


def _on_gpus(config: Config, model: ModelShape, source: str, args: argparse.Namespace) -> int:
    """Plan a run on GPUs, and its host memory."""
    gpus, gpu_bytes = args.gpus or config.cluster.slots or GPUS_PER_NODE, round(args.gpu_gib * GIB)
    host_bytes = None if args.host_gib is None else round(args.host_gib * GIB)
    layout = None if is_evaluation(config) else layout_of(config, gpus, args.policy_share)
    plan = plan_evaluation(model, config, gpus, gpu_bytes) if layout is None else plan_memory(model, layout, gpu_bytes)
    host = plan_gpu_host(model, config, layout, gpus)
    fits = plan.fits(gpu_bytes) and host_fits(host, host_bytes)
    if args.json:
        found = plan_json(plan, PHASES[1:2]) | {"gpu_bytes": gpu_bytes, "fits": plan.fits(gpu_bytes)}
        found = model_json(model, source) | (found if layout is None else as_json(plan, layout, model, gpu_bytes))
        of_host = {"lines": [dataclasses.asdict(line) for line in host.lines], "total": host.peak, "host_bytes": host_bytes}
        print(json.dumps(found | {"host": of_host | {"fits": host_fits(host, host_bytes)}}, indent=1))
        return 0 if fits else 1
    console = _console()
    console.print(f"model    {source}: {model.parameters:,} parameters", markup=False)
    if layout is None:
        show_evaluation(console, plan, gpu_bytes)
    else:
        console.print(f"layout   {describe(layout)}", markup=False)
        if layout.critic is not None:
            console.print(f"critic   {describe(layout.critic)}", markup=False)
        if layout.pp > 1:
            console.print(f"stage    {plan.stage + 1} of {layout.pp} needs most")
        show(console, plan, model, layout, gpu_bytes)
    show_host(console, host, host_bytes)
    console.print(NOT_MEASURED)
    return 0 if fits else 1


def _console() -> Console:
    """Return a console that is wide enough for the table where nobody is watching."""
    return Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 150)


def main(argv: list[str]) -> int:
    """Run the sub-command. Return 0 if the run fits, 1 if not."""
    parser = argparse.ArgumentParser(prog="searchr1 plan-memory", description=__doc__)
    parser.add_argument("config", nargs="?", help=config_help("tiny-gpu"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpu-gib", type=float, default=80, help="memory of one GPU in GiB (default 80)")
    parser.add_argument("--gpus", type=int, help="what `all` means in the placement (default: cluster.slots, else 8)")
    known = parser.add_mutually_exclusive_group()
    known.add_argument("--model-config", metavar="FILE", help="a Hugging Face config.json (default: of the run's model)")
    known.add_argument("--shape", metavar="NAME", help=f"a known model: {', '.join(SHAPES)}")
    parser.add_argument(
        "--policy-share",
        type=float,
        default=1.0,
        help="share of a micro-batch's tokens that the policy sampled, at most (default 1: the worst case)",
    )
    parser.add_argument(
        "--host-gib",
        type=float,
        help="memory of the machine in GiB (default: with cluster.device: cpu what this one has, on GPUs not compared)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    parser.add_argument("--table", action="store_true", help="print the tables of docs/guides/layouts.md and nothing else")
    args = parser.parse_intermixed_args(argv)
    if args.host_gib is not None and args.host_gib <= 0:
        raise UserError("--host-gib", "must be more than 0")
    if args.gpu_gib <= 0 or not 0 < args.policy_share <= 1 or (args.gpus is not None and args.gpus < 1):
        raise UserError("--gpu-gib and --gpus: must be more than 0; --policy-share: above 0, at most 1")
    if args.table:
        print(layouts_table())
        return 0
    if args.config is None:
        raise UserError("give a YAML, or --table")
    config = load_for_command(args.config, args.overrides)
    require_one_node(config)
    model, source = find_model(config, args.model_config, args.shape)
    if config.cluster.device == "cpu":
        return _on_cpu(config, model, source, args)
    return _on_gpus(config, model, source, args)
