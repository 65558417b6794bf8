"""The demo: world, retrieval server, training, conversion, evaluation, report.

Every step is a command of its own, printed before it runs, so that a person can repeat any of them.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from searchr1.config.load import RECIPES, package_data
from searchr1.demo.processes import retrieval_server, run_command
from searchr1.device import Device
from searchr1.files.folder_lock import folder_lock
from searchr1.tracking.loggers import read_metrics

COLD_START = Path(package_data("demo/cold_start"))
NEW_WORLD_SEED = 77
HOPS = ("one_hop", "two_hop", "three_hop")


@dataclass(frozen=True, slots=True)
class Recipes:
    """YAMLs of the demo's training and evaluation."""

    train: Path
    eval: Path


CPU_RECIPES = Recipes(RECIPES / "tiny-cpu.yaml", RECIPES / "tiny-cpu-eval.yaml")
GPU_RECIPES = Recipes(RECIPES / "tiny-gpu.yaml", RECIPES / "tiny-gpu-eval.yaml")


@dataclass(frozen=True, slots=True)
class Demo:
    """The options of one demo."""

    out: Path
    """Folder for everything that the demo writes."""
    recipes: Recipes
    model: Path
    """Folder of the model to start from."""
    seed: int
    """Seed of the world and of the training."""
    steps: int | None
    """Number of training steps; None for the recipe's."""
    checks: bool
    """Evaluate also without search, and on a world that was not trained on."""
    overrides: Sequence[str]
    """Overrides of the training's YAML."""


def pick_recipes(overrides: Sequence[str]) -> Recipes:
    """Return the recipes for the GPU where there is one, unless an override names a device; else those for the CPU.

    Raises:
        UserError: there is a GPU, but it cannot be used and the user did not choose the CPU.
    """
    settings = dict(override.split("=", 1) for override in overrides if "=" in override)
    device = Device.detect(settings.get("cluster.device", "auto"))
    return GPU_RECIPES if device.is_cuda else CPU_RECIPES


def machine_overrides(overrides: Sequence[str]) -> list[str]:
    """Return those of the training's overrides that an evaluation on the same machine needs too."""
    return [override for override in overrides if override.startswith(("cluster.", "rollout.model.precision="))]


def run_demo(demo: Demo) -> None:
    """Run the whole demo in its folder, and print its results.

    Raises:
        UserError: a command failed, the retrieval server ended, or another process writes to the folder.
    """
    started = time.perf_counter()
    with folder_lock(demo.out, "--out", "searchr1 demo"):
        model = _train_and_evaluate(demo)
        if demo.checks:
            _evaluate_on_new_world(demo, model)
        run_command("report", demo.out / "train")
        print(f"\n{summary(demo.out)}\n")
        if demo.checks:
            for label, path in (("search off", "eval-search-off"), (f"world {NEW_WORLD_SEED}", "new-world/eval")):
                metrics = json.loads((demo.out / path / "eval.json").read_text(encoding="utf-8"))
                print(f"exact match, {label}: {metrics['val/exact_match']:.3f}")
        print(f"model   {model}\ntable   {demo.out / 'eval/eval.json'}\npage    {demo.out / 'train/report.html'}")
        print(f"everything took {(time.perf_counter() - started) / 60:.1f} minutes")


def _train_and_evaluate(demo: Demo) -> Path:
    """Train, convert the newest checkpoint and evaluate it. Return the converted model's folder."""
    out, world = demo.out, demo.out / "world"
    if not (world / "world.json").exists():
        run_command("demo-world", "--seed", demo.seed, "--out", world)
    with retrieval_server(world, out / "retrieval.log") as server:
        env = {
            "SEARCHR1_DEMO_DIR": str(out),
            "SEARCHR1_SEARCH_ADDR": server.address,
            "SEARCHR1_COLD_START": str(demo.model),
        }
        overrides = [f"runner.seed={demo.seed}", "runner.resume_dir=auto", *demo.overrides]
        if demo.steps is not None:
            overrides.append(f"runner.max_steps={demo.steps}")
        run_command("train", demo.recipes.train, *overrides, env=env, server=server)
        model = _convert_newest(out)
        words = ["runner.overwrite=True", *machine_overrides(demo.overrides)]
        run_command("eval", demo.recipes.eval, *words, env=env, server=server)
        if demo.checks:
            off = ["runner.experiment_name=eval-search-off", "tools.search.dummy_mode=True"]
            run_command("eval", demo.recipes.eval, *off, *words, env=env, server=server)
    return model


def _convert_newest(out: Path) -> Path:
    steps = sorted((out / "train/checkpoints").glob("global_step_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    model = out / "model"
    shutil.rmtree(model, ignore_errors=True)  # a continued run has a newer checkpoint
    kind = "mg2hf" if (steps[-1] / "actor/metadata.json").exists() else "fsdp2hf"
    run_command("convert", kind, "--checkpoint", steps[-1] / "actor", "--output", model)
    return model


def _evaluate_on_new_world(demo: Demo, model: Path) -> None:
    out = demo.out / "new-world"
    run_command("demo-world", "--seed", NEW_WORLD_SEED, "--out", out / "world")
    with retrieval_server(out / "world", demo.out / "retrieval-new-world.log") as server:
        env = {"SEARCHR1_DEMO_DIR": str(out), "SEARCHR1_SEARCH_ADDR": server.address}
        words = [f"rollout.model.model_path={model}", "runner.overwrite=True", *machine_overrides(demo.overrides)]
        run_command("eval", demo.recipes.eval, *words, env=env, server=server)


def summary(folder: Path) -> str:
    """Return a table of the held-out scores: before training, after it, and of the converted model."""
    rows = [row for row in read_metrics(folder / "train/metrics.jsonl") if "val/exact_match" in row]
    exported = json.loads((folder / "eval/eval.json").read_text(encoding="utf-8"))
    columns = [("before training", rows[0]), (f"after {rows[-1]['step']} steps", rows[-1]), ("converted model", exported)]
    lines = ["held-out questions" + "".join(f"{name:>20}" for name, _ in columns)]
    for label, key in [("exact match", "val/exact_match"), *((f"  {h}", f"val/{h}/exact_match") for h in HOPS)]:
        lines.append(f"{label:<18}" + "".join(f"{row.get(key, float('nan')):>20.3f}" for _, row in columns))
    lines.append(f"{'searches/question':<18}" + "".join(f"{row['val/searches']:>20.2f}" for _, row in columns))
    return "\n".join(lines)
