"""`searchr1 train`."""

from __future__ import annotations

import argparse

from searchr1.config.load import config_help, load_for_command
from searchr1.training.train import train


def main(argv: list[str]) -> int:
    """Train a policy as a YAML describes. Return the exit code."""
    parser = argparse.ArgumentParser(prog="searchr1 train", description="Train a policy as a YAML describes.")
    parser.add_argument("config", help=config_help("tiny-cpu"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance runner.max_steps=10")
    args = parser.parse_args(argv)
    config = load_for_command(args.config, args.overrides)
    folder = train(config)
    print(f"done: {folder}")
    return 0
