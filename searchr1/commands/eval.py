"""`searchr1 eval`."""

from __future__ import annotations

import argparse

from searchr1.config.load import config_help, load_for_command
from searchr1.evaluation.evaluate import evaluate


def main(argv: list[str]) -> int:
    """Evaluate a model as a YAML describes. Return the exit code."""
    parser = argparse.ArgumentParser(
        prog="searchr1 eval",
        description="Evaluate a model as a YAML describes. An evaluation that was stopped goes on where it was.",
    )
    parser.add_argument("config", help=config_help("tiny-cpu-eval"))
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="for instance rollout.model.model_path=PATH 'evaluation.methods=[direct,cot,rag,search]'",
    )
    args = parser.parse_args(argv)
    config = load_for_command(args.config, args.overrides)
    results, folder = evaluate(config)
    print(f"\n{results.text()}\n\nresults  {folder}/results.html, results.md, results.json, eval.json")
    return 0
