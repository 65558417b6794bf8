"""`searchr1 infer`: answer questions and print how."""

from __future__ import annotations

import asyncio
from pathlib import Path

from searchr1.chat.infer import load_and_run, read_questions
from searchr1.commands.flags import parser, plan_of


def main(argv: list[str]) -> int:
    """Run the command; return its exit code, 1 if a question ended with an error."""
    flags = parser("infer", "Answer questions with a trained model that searches, and print how it came to each answer.")
    flags.add_argument(
        "--prompt", action="append", default=[], help="the question; - reads one per line from standard input"
    )
    flags.add_argument(
        "--prompt_file",
        "--prompt-file",
        type=Path,
        help="a question a line, or rows (.jsonl, .csv …) with a question",
    )
    flags.add_argument("--json", action="store_true", help="one JSON object per question, with every turn")
    flags.add_argument("--full", action="store_true", help="print everything the model was given to read")
    args = flags.parse_intermixed_args(argv)
    questions = read_questions(args.prompt, args.prompt_file)
    return 0 if asyncio.run(load_and_run(plan_of(args), questions, as_rows=args.json, full=args.full)) else 1
