"""`searchr1 prepare-data`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from searchr1.data.model_settings import template_text
from searchr1.data.model_source import load_tokenizer
from searchr1.data.prepare.hub import fetch
from searchr1.data.prepare.prepare import Outcome, Settings, prepare
from searchr1.data.prepare.rows import ROW_SHAPES
from searchr1.data.prepare.sources import DEFAULT_SETS, REPOSITORY, SETS, SPLITS, find_sources, parse_input
from searchr1.data.prepare.stats import as_table
from searchr1.data.templates import TEMPLATES
from searchr1.errors import UserError

FORMATS = {"parquet": ("parquet",), "jsonl": ("jsonl",), "both": ("parquet", "jsonl")}
LOG_WIDTH = 120
EPILOG = """\
examples:
  searchr1 prepare-data --split train,test --out data          what Search-R1 trains on and evaluates on
  searchr1 prepare-data --sets nq --split train --limit 5000 --seed 1 --out data/small
  searchr1 prepare-data --input mine=questions.csv --split train --format jsonl --rows rlinf --out data/mine
  searchr1 prepare-data --sets nq --split test --template rag --search 127.0.0.1:8000 --out data/rag

docs/guides/data.md lists the row shapes and the templates."""


def parser() -> argparse.ArgumentParser:
    """Return the command's flags."""
    found = argparse.ArgumentParser(
        prog="searchr1 prepare-data",
        description="Question sets into files that training and evaluation read: OUT/SPLIT.parquet, OUT/stats.json.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = found.add_argument_group("what is read").add_argument
    train = ", ".join(DEFAULT_SETS["train"])
    add("--sets", help=f"comma-separated, of {', '.join(SETS)}; or `all` (default: {train} for train, all for test)")
    add("--split", default="train", help=f"comma-separated, of {', '.join(SPLITS)}; `test` is what Search-R1 evaluates a "
        "set on: its test split, else its dev split (default: train)")  # fmt: skip
    add("--input", action="append", default=[], metavar="NAME[:SPLIT]=FILE", help="a file of your own, or of a public set "
        "in FlashRAG's or its original form; may be repeated")  # fmt: skip
    add("--local", type=Path, metavar="DIR", help=f"read public sets from DIR/SET/SPLIT.jsonl instead of {REPOSITORY}")
    add("--revision", help="branch, tag or commit of the hub's repository")
    add = found.add_argument_group("what is kept").add_argument
    add("--limit", type=int, help="at most so many rows of each set and split; the first ones, or with --seed drawn ones")
    add("--seed", type=int, help="shuffle the rows of all sets together; without it they keep the files' order")
    add("--dedup", action="store_true", help="leave out questions that an earlier row of the split asks")
    add("--drop-overlap", action="store_true", help="leave training questions out that test, dev or --against ask too")
    add(
        "--against",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="compare with this file too; may be repeated",
    )
    add("--skip-bad", action="store_true", help="leave bad rows out and count them, instead of stopping")
    add = found.add_argument_group("what is written").add_argument
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder; files of an earlier run are replaced when all is done",
    )
    add("--format", choices=FORMATS, default="parquet", help="default: parquet")
    add("--rows", choices=ROW_SHAPES, default="searchr1", help="the row shape; plain rows hold the question alone and get "
        "their prompt from data.prompt_template (default: searchr1)")  # fmt: skip
    add("--template", help=f"{', '.join(name for name in TEMPLATES if name != 'none')}, or a .txt file with {{question}} "
        "(default: searchr1)")  # fmt: skip
    add("--no-question-mark", action="store_true", help="do not end questions in a question mark where they have none")
    add("--messages", action="store_true", help="rlinf rows: the prompt as chat messages, for data.apply_chat_template")
    add("--chat-template", metavar="MODEL", help="rlinf rows: render the prompt with this model's chat template")
    add(
        "--search", help="passages for --template rag or plain rows: HOST:PORT of a retrieval server, or several with commas"
    )
    add("--topk", type=int, default=3, help="passages per question (default: 3)")
    return found


def main(argv: list[str]) -> int:
    """Prepare data. Returns the exit code."""
    args = parser().parse_args(argv)
    settings = _settings(args)
    splits = _names(args.split, "--split")
    for split in splits:
        if split not in SPLITS:
            raise UserError(f"--split {split}: is not known; use {', '.join(SPLITS)}")
    sets = None if args.sets is None else list(SETS) if args.sets == "all" else _names(args.sets, "--sets")
    if args.local is not None and not args.local.is_dir():
        raise UserError(f"--local {args.local}: no such folder")
    inputs = [parse_input(text) for text in args.input]
    sources = find_sources(sets, splits, inputs, args.local, partial(fetch, revision=args.revision))
    _report(prepare(sources, settings))
    return 0


def _names(text: str, flag: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"{flag}: names nothing")
    return list(dict.fromkeys(names))


def _settings(args: argparse.Namespace) -> Settings:
    template = args.template
    if args.rows == "plain":
        if template is not None:
            raise UserError(
                "--template: plain rows hold no prompt; leave it out and set data.prompt_template, or use other --rows"
            )
    else:
        template = template or "searchr1"
        try:
            text = template_text(template)
        except UserError as error:
            raise UserError("--template", error.message) from error
        if text is None:
            raise UserError(f"--template {template}: puts the question into no prompt; use --rows plain for bare questions")
        if args.search and "{passages}" not in text:
            raise UserError(f"--search: --template {template} shows no passages; use rag, or --rows plain")
    for name in ("messages", "chat_template"):
        if getattr(args, name) and args.rows != "rlinf":
            raise UserError(f"--{name.replace('_', '-')}: is for --rows rlinf; searchr1 rows always hold chat messages")
    if args.messages and args.chat_template:
        raise UserError("--messages and --chat-template exclude each other")
    for flag, value in (("--limit", args.limit), ("--topk", args.topk)):
        if value is not None and value < 1:
            raise UserError(f"{flag}: must be 1 or more, found {value}")
    for path in args.against:
        if not path.is_file():
            raise UserError(f"--against {path}: no such file")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file; name a folder")
    return Settings(
        out=args.out,
        shape=args.rows,
        formats=FORMATS[args.format],
        template=template,
        limit=args.limit,
        seed=args.seed,
        dedup=args.dedup,
        drop_overlap=args.drop_overlap,
        against=tuple(args.against),
        skip_bad=args.skip_bad,
        question_mark=not args.no_question_mark,
        messages=args.messages,
        tokenizer=_tokenizer(args.chat_template) if args.chat_template else None,
        search=tuple(_names(args.search, "--search")) if args.search else (),
        topk=args.topk,
    )


def _tokenizer(model: str) -> Any:
    found = load_tokenizer(model, "--chat-template")
    if not getattr(found, "chat_template", None):
        raise UserError(f"--chat-template {model}: its tokenizer has no chat template")
    return found


def _report(outcome: Outcome) -> None:
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print(as_table(outcome.stats))
    for warning in outcome.warnings:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)
    for path in outcome.files:
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
