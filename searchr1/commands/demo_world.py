"""`searchr1 demo-world`: write a world, or what the cold start is made from."""

from __future__ import annotations

import argparse
from pathlib import Path

from searchr1.errors import UserError


def main(argv: list[str]) -> int:
    """Run the sub-command. Return its exit code."""
    parser = argparse.ArgumentParser(
        prog="searchr1 demo-world",
        description="Write a fictional encyclopedia (corpus.jsonl, pages.jsonl) and questions about it "
        "(train and test, jsonl and parquet). The same seed gives the same world.",
    )
    parser.add_argument("--seed", type=int, default=0, help="which world (default 0)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--demonstrations",
        choices=("full", "mediocre"),
        help="write demonstrations.jsonl for `searchr1 sft` instead: worked answers over many other worlds",
    )
    parser.add_argument("--worlds", type=int, default=40, help="with --demonstrations: number of worlds (default 40)")
    parser.add_argument("--per-world", type=int, default=2400, help="with --demonstrations: rows per world")
    parser.add_argument("--tokenizer", action="store_true", help="write the demo's tokenizer instead")
    args = parser.parse_args(argv)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: not a folder")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tokenizer:
        from searchr1.demo.cold_start_rows import save_tokenizer

        save_tokenizer(args.out)
        print(f"tokenizer -> {args.out}")
    elif args.demonstrations:
        from searchr1.demo.cold_start_rows import demonstrations
        from searchr1.demo.files import write_jsonl

        rows = demonstrations(args.worlds, args.per_world, args.seed, args.demonstrations == "mediocre")
        path = args.out / "demonstrations.jsonl"
        print(f"{write_jsonl(path, rows)} demonstrations -> {path}")
    else:
        from searchr1.demo.files import write_world

        counts = write_world(args.seed, args.out)
        print(
            f"world {args.seed} -> {args.out}: {counts['passages']} passages, "
            f"{sum(counts['train'].values())} training and {sum(counts['test'].values())} held-out questions"
        )
    return 0
