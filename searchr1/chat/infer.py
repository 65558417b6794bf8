"""Answer a list of questions and print how each answer came about, as `searchr1 infer` does."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import deque
from contextlib import aclosing
from pathlib import Path
from typing import Any

from rich.console import Console

from searchr1.chat.async_chat import AsyncChat
from searchr1.chat.events import Done, Event, Failed
from searchr1.chat.plan import Plan
from searchr1.chat.terminal import Terminal, printable
from searchr1.data.golds import column_names
from searchr1.data.questions import question_of_row
from searchr1.data.reading import file_format, read_rows
from searchr1.errors import UserError


def read_questions(prompts: list[str], file: Path | None) -> list[str]:
    """Return the questions of `--prompt` and `--prompt_file`; `-` is standard input. A line is a question; a file of
    rows (.jsonl, .json, .csv, .parquet and so on) has a column `question`, or prompts that hold it.

    Raises:
        UserError: no file, no question.
    """
    questions: list[str] = []
    for prompt in prompts:
        try:
            questions += sys.stdin.read().split("\n") if prompt == "-" else [_typed(prompt)]
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt -: the input is not text ({error})") from error
    if file is not None:
        questions += _of_rows(file) if file_format(file.name) else _of_lines(file)
    questions = [question.strip() for question in questions if question.strip()]
    if not questions:
        raise UserError("no question; give --prompt 'Who …?', --prompt - or --prompt_file FILE")
    return questions


def _typed(text: str) -> str:
    """Return an argument as UTF-8 where the locale is ASCII and Python has kept the argument's bytes."""
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
    """Return the questions of a file of rows, which training and evaluation can read too."""
    questions = []
    for line, row in read_rows(file):
        try:
            question = question_of_row(row)
        except UserError as error:
            raise UserError(f"{file}:{line}: {error}") from error
        if not question:
            raise UserError(f'{file}:{line}: has no text "question", only {column_names(row)}')
        questions.append(question)
    return questions


def as_json(question: str, last: Event | None) -> dict[str, Any]:
    """Return one answer as plain data."""
    if not isinstance(last, Done):
        return {"question": question, "answer": None, "error": last.message if isinstance(last, Failed) else "no end"}
    row = {"question": question, **last.as_json(), "turns": []}
    del row["type"]
    row["turns"] = [
        {
            "policy_text": turn.policy_text,
            "action": turn.action,
            "queries": turn.queries,
            "tool_text": turn.tool_text,
            "tool_error": turn.tool_error,
        }
        for turn in last.trajectory.turns
    ]
    return row


async def collect(chat: AsyncChat, question: str) -> list[Event]:
    """Return all events of one question."""
    async with aclosing(chat.ask(question)) as events:
        return [event async for event in events]


def answer_line(last: Event | None) -> str:
    """Return the line that an answer ends with."""
    if isinstance(last, Done) and last.answer is not None:
        return f"Answer: {printable(last.answer)}"
    return "No answer."


async def run(chat: AsyncChat, questions: list[str], *, as_rows: bool, full: bool, at_once: int = 64) -> bool:
    """Answer all questions, `at_once` at a time. One is shown as it happens, more are shown in their order, each when it is
    done. Return whether all came to an end without an error."""
    console = Console(highlight=False, markup=False, emoji=False)
    if len(questions) == 1 and not as_rows:
        terminal, last = Terminal(console, full=full), None
        async with aclosing(chat.ask(questions[0])) as events:
            async for event in events:
                terminal.show(last := event)
        print(f"\n{answer_line(last)}", flush=True)
        return isinstance(last, Done)
    slots = asyncio.Semaphore(at_once)

    async def in_turn(question: str) -> list[Event]:
        async with slots:
            return await collect(chat, question)

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


async def load_and_run(plan: Plan, questions: list[str], *, as_rows: bool, full: bool) -> bool:
    """Load the model and answer all questions, in one event loop; return as `run` does."""
    from searchr1.chat.load import open_chat
    from searchr1.retrieval.client.client import server_addresses
    from searchr1.retrieval.client.outages import OutageWatch

    chat = await open_chat(plan)
    search = plan.config.tools.search
    servers = [] if plan.engine or search.dummy_mode else server_addresses(search)
    try:
        # As many again as the engine takes at once: some wait for a search, and none waits so long that it is given up.
        at_once = 2 * plan.config.rollout.max_running_requests
        with OutageWatch(servers, search.timeout_s, key="--retriever-url", limit="", awaited=plan.check):
            return await run(chat, questions, as_rows=as_rows, full=full, at_once=at_once)
    finally:
        await chat.aclose()
