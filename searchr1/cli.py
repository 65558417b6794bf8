"""`searchr1 COMMAND …`: one command, a table of sub-commands, each with a `main(argv) -> exit code` of its own."""

from __future__ import annotations

import importlib
import sys

from searchr1 import __version__
from searchr1.errors import UserError

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("searchr1.runner.train", "train a policy: searchr1 train CONFIG.yaml [key=value ...]"),
    "eval": ("searchr1.runner.evaluate", "evaluate a model: searchr1 eval CONFIG.yaml [key=value ...]"),
    "check-config": ("searchr1.config.cli", "print what a YAML would run, or every problem in it"),
    "plan-memory": ("searchr1.config.memory_plan_cli", "what a run would need of each GPU, from its YAML alone"),
    "prepare-data": ("searchr1.data.prepare.cli", "make training and evaluation files of question sets"),
    "infer": ("searchr1.inference.infer", "answer questions with a trained model, and print how"),
    "chat": ("searchr1.inference.chat", "ask a trained model in the terminal"),
    "serve-chat": ("searchr1.inference.serve", "a web page that asks a trained model"),
    "sft": ("searchr1.runner.sft", "supervised fine-tuning on chat or plain rows"),
    "convert": ("searchr1.convert.cli", "checkpoints: Megatron or FSDP to Hugging Face, Hugging Face to Megatron"),
    "retrieval-server": ("searchr1.retrieval.server_cli", "serve /retrieve, /access and /health"),
    "rerank-server": ("searchr1.retrieval.rerank_server", "serve a cross-encoder: /rerank"),
    "build-index": ("searchr1.retrieval.build", "build a BM25 or dense index of a corpus"),
    "report": ("searchr1.tracking.report", "write a page about a run: summary, curves, trajectories"),
    "watch": ("searchr1.tracking.watch", "serve that page while training goes on"),
    "demo-world": ("searchr1.data.demo_world.cli", "make the fictional encyclopedia and its questions"),
    "demo": ("searchr1.runner.demo", "the whole pipeline on the demo world (what run.sh calls)"),
}

RETRIEVAL = {"retrieval-server", "rerank-server", "build-index"}
"""Commands that need the `retrieval` extra only."""


def usage() -> str:
    """The help text: one line per command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"searchr1 {__version__}",
            "usage: searchr1 COMMAND [...]",
            "",
            *lines,
            "",
            "searchr1 COMMAND --help tells more.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command. Returns its exit code; 2 for a user's mistake, told without a traceback."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0
    if args[0] == "--version":
        print(__version__)
        return 0
    command, *rest = args
    if command not in COMMANDS:
        print(f"searchr1: no command {command!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        return int(importlib.import_module(COMMANDS[command][0]).main(rest))
    except UserError as error:
        print(f"searchr1 {command}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "searchr1":
            raise
        extra = "retrieval" if command in RETRIEVAL else "cpu' or 'searchr1[gpu]"
        print(f"searchr1 {command}: needs {error.name}; run: pip install 'searchr1[{extra}]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"searchr1 {command}: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
