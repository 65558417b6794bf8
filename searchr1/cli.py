"""`searchr1 COMMAND …`: one command, a table of sub-commands, each with a `main(argv) -> exit code` of its own."""

from __future__ import annotations

import contextlib
import errno
import importlib
import sys

from searchr1 import __version__
from searchr1.caches import provide_caches
from searchr1.errors import UserError, WorkerDied
from searchr1.shutdown import Stopped, leave, stops_cleanly
from searchr1.streams import EXIT_BROKEN_PIPE, drop_output, leave_ascii, open_streams, output_is_broken

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("searchr1.commands.train", "train a policy: searchr1 train CONFIG.yaml [key=value ...]"),
    "eval": ("searchr1.commands.eval", "evaluate a model: searchr1 eval CONFIG.yaml [key=value ...]"),
    "check-config": ("searchr1.commands.check_config", "print what a YAML would run, or every problem in it"),
    "plan-memory": ("searchr1.commands.plan_memory", "what a run would need of each GPU, from its YAML alone"),
    "prepare-data": ("searchr1.commands.prepare_data", "make training and evaluation files of question sets"),
    "infer": ("searchr1.commands.infer", "answer questions with a trained model, and print how"),
    "chat": ("searchr1.commands.chat", "ask a trained model in the terminal"),
    "serve-chat": ("searchr1.commands.serve_chat", "a web page that asks a trained model"),
    "sft": ("searchr1.commands.sft", "supervised fine-tuning on chat or plain rows"),
    "convert": ("searchr1.commands.convert", "checkpoints: Megatron or FSDP to Hugging Face, Hugging Face to Megatron"),
    "verify": ("searchr1.commands.verify", "whether checkpoints, models, indexes and corpora are still what was written"),
    "retrieval-server": ("searchr1.commands.retrieval_server", "serve /retrieve, /access and /health"),
    "rerank-server": ("searchr1.commands.rerank_server", "serve a cross-encoder: /rerank"),
    "build-index": ("searchr1.commands.build_index", "build a BM25 or dense index of a corpus"),
    "report": ("searchr1.commands.report", "write a page about a run: summary, curves, trajectories"),
    "watch": ("searchr1.commands.watch", "serve that page while training goes on"),
    "demo-world": ("searchr1.commands.demo_world", "make the fictional encyclopedia and its questions"),
    "demo": ("searchr1.commands.demo", "the whole pipeline on the demo world (what run.sh calls)"),
}

RETRIEVAL = {"retrieval-server", "rerank-server", "build-index"}
"""Commands that need the `retrieval` extra only."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, a used-up quota and a limit on the size of files."""

OWN_SIGNALS = {"retrieval-server", "rerank-server", "serve-chat", "chat", "watch"}
"""Commands that handle signals themselves: servers end them as a normal end, and a chat goes on."""


WITH_LIBRARIES = {
    *("train", "eval", "prepare-data", "infer", "chat", "serve-chat", "sft", "convert", "demo"),
    *RETRIEVAL,
}
"""Commands whose libraries download or compile something."""


def usage() -> str:
    """Return the help text: one line per command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"searchr1 {__version__}",
            "usage: searchr1 COMMAND [...]",
            "",
            *lines,
            "",
            "searchr1 COMMAND --help explains a command.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command. Returns its exit code; 2 for a user's mistake, which is printed without a traceback.

    A signal that asks for a stop ends the process with 128 + its number, and a process of the run that has died with 1.
    """
    if argv is None:
        leave_ascii()
    open_streams(for_children=argv is None)
    args = sys.argv[1:] if argv is None else argv
    if argv is None and args and args[0] in WITH_LIBRARIES and not {"-h", "--help"} & set(args):
        provide_caches()
    try:
        try:
            code = _main(args)
        except SystemExit:  # argparse's, after a help text or a wrong flag
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # a failure is seen here, not as the interpreter ends
    except BrokenPipeError:
        if not output_is_broken():
            raise
        drop_output()
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        _report(f"searchr1 {args[0]}: {error.filename or 'the output'}: {error.strerror}; make room and start again")
        drop_output()
        return 2
    return code


def _main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0
    if args[0] == "--version":
        print(__version__)
        return 0
    command, *rest = args
    if command not in COMMANDS:
        _report(f"searchr1: no command {command!r}\n\n{usage()}")
        return 2
    try:
        with contextlib.nullcontext() if command in OWN_SIGNALS else stops_cleanly():
            return int(importlib.import_module(COMMANDS[command][0]).main(rest))
    except UserError as error:
        _report(f"searchr1 {command}: {error}")
        return 2
    except WorkerDied as error:
        _report(f"searchr1 {command}: {error}")
        leave(1)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "searchr1":
            raise
        extras = ("retrieval",) if command in RETRIEVAL else ("cpu", "gpu")
        packages = " or ".join(f"'searchr1[{extra}]'" for extra in extras)
        _report(f"searchr1 {command}: needs {error.name}; run: pip install {packages}")
        return 2
    except Stopped as stop:
        _report(f"searchr1 {command}: {stop}")
        leave(stop.exit_code)
    except KeyboardInterrupt:
        _report(f"searchr1 {command}: stopped")
        return 130


def _report(text: str) -> None:
    with contextlib.suppress(OSError):  # the exit code says it too
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
