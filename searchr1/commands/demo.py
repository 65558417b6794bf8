"""`searchr1 demo`: the whole pipeline on the demo world; run.sh calls it."""

from __future__ import annotations

import argparse
from pathlib import Path

from searchr1.cluster.processes import guarded
from searchr1.config.load import load_config
from searchr1.demo.demo import COLD_START, NEW_WORLD_SEED, Demo, pick_recipes, run_demo
from searchr1.preflight.check_device import require_one_node
from searchr1.rollout.shared_memory import SHARED_MEMORY


def main(argv: list[str]) -> int:
    """Parse the arguments, check them, and run the demo."""
    parser = argparse.ArgumentParser(
        prog="searchr1 demo",
        description="A small language model learns to search a fictional encyclopedia: on the first GPU where there is one, "
        "else on a CPU, in 5 to 12 minutes on two idle cores. A second run goes on where the first one stopped.",
    )
    parser.add_argument("--steps", type=int, help="training steps (default: 40; 2 for the impatient)")
    parser.add_argument("--seed", type=int, default=0, help="of the world and of the training (default 0)")
    parser.add_argument("--out", type=Path, help="folder for everything (default runs/demo-seedSEED)")
    parser.add_argument("--model", type=Path, default=COLD_START, help="model to start from (default: the cold start)")
    parser.add_argument("--checks", action="store_true", help=f"also evaluate without search, and on world {NEW_WORLD_SEED}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the training's YAML")
    args = parser.parse_args(argv)
    recipes = pick_recipes(args.overrides)
    require_one_node(load_config(recipes.train, args.overrides))  # a mistake is reported now, not after the world is made
    out: Path = args.out or Path(f"runs/demo-seed{args.seed}")
    with guarded([SHARED_MEMORY]):
        run_demo(Demo(out, recipes, args.model, args.seed, args.steps, args.checks, args.overrides))
    return 0
