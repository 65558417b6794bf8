"""`searchr1 plan-memory`: what a run would need of each GPU, worked out from its YAML without loading a model."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from searchr1.config.check_device import require_one_node
from searchr1.config.load import load_for_command
from searchr1.config.memory_eval import plan_evaluation
from searchr1.config.memory_layout import Layout, layout_of
from searchr1.config.memory_plan import GIB, PHASES, MemoryPlan, knobs, plan_memory, remedy
from searchr1.config.memory_shapes import SHAPES, ModelShape, guess_shape, read_shape, shape_named
from searchr1.config.memory_table import layouts_table
from searchr1.config.placement import is_evaluation
from searchr1.config.schema import Config
from searchr1.errors import UserError

GPUS_PER_NODE = 8
"""What `all` means unless `cluster.slots` or `--gpus` says otherwise."""


def find_model(config: Config, model_config: str | None, shape: str | None) -> tuple[ModelShape, str]:
    """The model's sizes and where they are from.

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
            f"{key}: {path or 'empty'} has no config.json here; give --model-config config.json, or --shape with one of "
            f"{', '.join(SHAPES)}"
        )
    return SHAPES[guess], f"shape {guess}, by the name in {key}"


def describe(layout: Layout) -> str:
    """The layout in one line."""
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


def show(console: Console, plan: MemoryPlan, model: ModelShape, layout: Layout, gpu_bytes: int) -> None:
    """The table, the verdict and what to change."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("GiB on the fullest GPU")
    for phase in PHASES:
        table.add_column(phase, justify="right", no_wrap=True)
    table.add_column("how", style="dim")
    for line in plan.lines:
        cells = [f"{line.size / GIB:.2f}" if phase in line.phases else "" for phase in PHASES]
        table.add_row(line.name, *cells, line.formula)
    table.add_section()
    table.add_row("total", *(f"{plan.total(phase) / GIB:.2f}" for phase in PHASES), f"of {gpu_bytes / GIB:g}")
    console.print(table)
    if plan.problem:
        console.print(f"The engine does not start: {plan.problem}.")
    if plan.fits(gpu_bytes):
        console.print(f"[bold]Fits[/]: {(gpu_bytes - plan.peak) / GIB:.1f} GiB to spare in the worst phase.")
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


def as_json(plan: MemoryPlan, layout: Layout, model: ModelShape, source: str, gpu_bytes: int) -> dict[str, Any]:
    """Everything, for programs; sizes in bytes."""
    fits = plan.fits(gpu_bytes)
    return {
        "model": dataclasses.asdict(model) | {"parameters": model.parameters, "source": source},
        "layout": dataclasses.asdict(layout) | {"dp": layout.dp},
        "stage": plan.stage,
        "rank_parameters": plan.parameters,
        "lines": [dataclasses.asdict(line) for line in plan.lines],
        "totals": {phase: plan.total(phase) for phase in PHASES},
        "gpu_bytes": gpu_bytes,
        "fits": fits,
        "problem": plan.problem,
        "knobs": []
        if fits
        else [
            {"change": text, "peak": changed.peak, "fits": changed.fits(gpu_bytes)}
            for text, _, changed in knobs(model, layout, gpu_bytes)
        ],
    }


def _evaluation(plan: MemoryPlan, model: ModelShape, source: str, gpu_bytes: int, as_data: bool) -> int:
    """Print the plan of an evaluation."""
    if as_data:
        known: dict[str, Any] = {"model": dataclasses.asdict(model) | {"parameters": model.parameters, "source": source}}
        known |= {"lines": [dataclasses.asdict(line) for line in plan.lines], "totals": {"rollout": plan.peak}}
        print(json.dumps(known | {"gpu_bytes": gpu_bytes, "fits": plan.fits(gpu_bytes), "problem": plan.problem}, indent=1))
        return 0 if plan.fits(gpu_bytes) else 1
    print(f"model    {source}: {model.parameters:,} parameters\nan evaluation: the engine alone, on each of its GPUs")
    for line in plan.lines:
        print(f"  {line.name:<15} {line.size / GIB:7.2f} GiB  {line.formula}")
    if plan.problem:
        print(f"The engine does not start: {plan.problem}.")
    elif plan.fits(gpu_bytes):
        print(f"Fits: {(gpu_bytes - plan.peak) / GIB:.1f} GiB to spare.")
    else:
        print(f"Does not fit: {(plan.peak - gpu_bytes) / GIB:.1f} GiB too much; lower rollout.gpu_memory_utilization.")
    print("Computed, not measured: see docs/layouts.md for what the formulas leave out.")
    return 0 if plan.fits(gpu_bytes) else 1


def main(argv: list[str]) -> int:
    """Entry point of the sub-command. Exit code 0 if the run fits, 1 if not."""
    parser = argparse.ArgumentParser(prog="searchr1 plan-memory", description=__doc__)
    parser.add_argument("config", nargs="?", help="path of a YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpu-gib", type=float, default=80, help="memory of one GPU in GiB (default 80)")
    parser.add_argument("--gpus", type=int, help="what `all` means in the placement (default: cluster.slots, else 8)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model-config", metavar="FILE", help="a Hugging Face config.json (default: of the run's model)")
    source.add_argument("--shape", metavar="NAME", help=f"a known model: {', '.join(SHAPES)}")
    parser.add_argument(
        "--policy-share",
        type=float,
        default=1.0,
        help="share of a micro-batch's tokens that the policy sampled, at most (default 1: the worst case)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    parser.add_argument("--table", action="store_true", help="print the tables of docs/layouts.md and nothing else")
    args = parser.parse_intermixed_args(argv)
    if args.gpu_gib <= 0 or not 0 < args.policy_share <= 1 or (args.gpus is not None and args.gpus < 1):
        raise UserError("--gpu-gib and --gpus: must be more than 0; --policy-share: above 0, at most 1")
    if args.table:
        print(layouts_table())
        return 0
    if args.config is None:
        raise UserError("give a YAML, or --table")
    config = load_for_command(args.config, args.overrides)
    require_one_node(config)
    model, found = find_model(config, args.model_config, args.shape)
    gpus = args.gpus or config.cluster.slots or GPUS_PER_NODE
    gpu_bytes = round(args.gpu_gib * GIB)
    if is_evaluation(config):
        return _evaluation(plan_evaluation(model, config, gpus, gpu_bytes), model, found, gpu_bytes, args.json)
    layout = layout_of(config, gpus, args.policy_share)
    plan = plan_memory(model, layout, gpu_bytes)
    if args.json:
        print(json.dumps(as_json(plan, layout, model, found, gpu_bytes), indent=1))
    else:
        console = Console(highlight=False, soft_wrap=False)
        console.print(f"model    {found}: {model.parameters:,} parameters", markup=False)
        console.print(f"layout   {describe(layout)}", markup=False)
        if layout.critic is not None:
            console.print(f"critic   {describe(layout.critic)}", markup=False)
        if layout.pp > 1:
            console.print(f"stage    {plan.stage + 1} of {layout.pp} needs most")
        show(console, plan, model, layout, gpu_bytes)
        console.print("Computed, not measured: see docs/layouts.md for what the formulas leave out.")
    return 0 if plan.fits(gpu_bytes) else 1
