"""`searchr1 infer`: answer questions and print how."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import deque
from contextlib import aclosing
from pathlib import Path
from typing import Any

from rich.console import Console

from searchr1.chat.events import Done, Event, Failed
from searchr1.chat.session import Session
from searchr1.chat.terminal import Terminal, printable
from searchr1.commands.chat_flags import Plan, parser, plan
from searchr1.data.dataset import read_prompt
from searchr1.data.golds import column_names
from searchr1.data.prepare.reading import file_format, read_rows
from searchr1.data.questions import question_column, question_of_prompt
from searchr1.errors import UserError


def read_questions(prompts: list[str], file: Path | None) -> list[str]:
    """The questions of `--prompt` and `--prompt_file`; `-` is standard input. A line is a question; a file of
    rows (.jsonl, .json, .csv, .parquet and so on) has a column `question`, or prompts that hold it.

    Raises:
        UserError: no file, no question.
    """
    questions: list[str] = []
    for prompt in prompts:
        try:
            questions += sys.stdin.read().split("\n") if prompt == "-" else [_typed(prompt)]
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt -: the input is no text ({error})") from error
    if file is not None:
        questions += _of_rows(file) if file_format(file.name) else _of_lines(file)
    questions = [question.strip() for question in questions if question.strip()]
    if not questions:
        raise UserError("no question; give --prompt 'Who …?', --prompt - or --prompt_file FILE")
    return questions


def _typed(text: str) -> str:
    """An argument as UTF-8, where the locale knows nothing but ASCII and Python has kept its bytes."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text


def _of_lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_file {file}: not readable ({error})") from error


def _of_rows(file: Path) -> list[str]:
    """The questions of a file that training and evaluation can read too."""
    questions = []
    for line, row in read_rows(file):
        try:
            question = question_column(row) or question_of_prompt(read_prompt(row.get("prompt"), "prompt"))
        except UserError as error:
            raise UserError(f"{file}:{line}: {error}") from error
        if not question:
            raise UserError(f'{file}:{line}: has no text "question", only {column_names(row)}')
        questions.append(question)
    return questions


def as_json(question: str, last: Event | None) -> dict[str, Any]:
    """One answer for scripts."""
    if not isinstance(last, Done):
        return {"question": question, "answer": None, "error": last.message if isinstance(last, Failed) else "no end"}
    found = {"question": question, **last.as_json(), "turns": []}
    del found["type"]
    found["turns"] = [
        {
            "policy_text": turn.policy_text,
            "action": turn.action,
            "queries": turn.queries,
            "tool_text": turn.tool_text,
            "tool_error": turn.tool_error,
        }
        for turn in last.trajectory.turns
    ]
    return found


async def collect(session: Session, question: str) -> list[Event]:
    """All events of one question."""
    async with aclosing(session.ask(question)) as events:
        return [event async for event in events]


def answer_line(last: Event | None) -> str:
    """What infer ends with."""
    if isinstance(last, Done) and last.answer is not None:
        return f"Answer: {printable(last.answer)}"
    return "No answer."


async def run(session: Session, questions: list[str], *, as_rows: bool, full: bool, at_once: int = 64) -> bool:
    """Answer all questions, `at_once` at a time. One is shown as it happens, more are shown in their order, each when it is
    done. Returns whether all came to an end without an error."""
    console = Console(highlight=False, markup=False, emoji=False)
    if len(questions) == 1 and not as_rows:
        terminal, last = Terminal(console, full=full), None
        async with aclosing(session.ask(questions[0])) as events:
            async for event in events:
                terminal.show(last := event)
        print(f"\n{answer_line(last)}", flush=True)
        return isinstance(last, Done)
    slots = asyncio.Semaphore(at_once)

    async def in_turn(question: str) -> list[Event]:
        async with slots:
            return await collect(session, question)

    tasks = deque(asyncio.create_task(in_turn(question)) for question in questions)
    good = True
    try:
        for question in questions:
            events_of_one = await tasks[0]
            tasks.popleft()  # what was printed need not be kept
            last = events_of_one[-1] if events_of_one else None
            good = good and isinstance(last, Done)
            if as_rows:
                print(json.dumps(as_json(question, last), ensure_ascii=True), flush=True)
                continue
            print(f"Question: {printable(question)}", flush=True)
            terminal = Terminal(console, full=full)
            for event in events_of_one:
                terminal.show(event)
            print(f"{answer_line(last)}\n", flush=True)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return good


async def load_and_run(chosen: Plan, questions: list[str], *, as_rows: bool, full: bool) -> bool:
    """Everything, in one event loop."""
    from searchr1.chat.load import open_session
    from searchr1.chat.search_backends import addresses
    from searchr1.retrieval.client.outages import OutageWatch

    session = await open_session(chosen)
    search = chosen.config.tools.search
    servers = [] if chosen.engine or search.dummy_mode else addresses(search)
    try:
        # As many again as the engine takes at once: some wait for a search, and none waits so long that it is given up.
        at_once = 2 * chosen.config.rollout.max_running_requests
        with OutageWatch(servers, search.timeout_s, key="--retriever-url", limit="", awaited=chosen.check):
            return await run(session, questions, as_rows=as_rows, full=full, at_once=at_once)
    finally:
        await session.aclose()


def main(argv: list[str]) -> int:
    """Entry point of the sub-command; 1 if a question ended with an error."""
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
    return 0 if asyncio.run(load_and_run(plan(args), questions, as_rows=args.json, full=args.full)) else 1
