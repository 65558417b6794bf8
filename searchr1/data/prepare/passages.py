"""Passages for the questions, from a retrieval server; what was found before an interruption is not asked for again."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from searchr1.agent.protocol import Document, render_body
from searchr1.config.schema import SearchToolConfig
from searchr1.errors import UserError
from searchr1.retrieval.client.client import SearchClient, SearchUnavailable
from searchr1.retrieval.client.outages import OutageWatch

QUESTIONS_PER_CALL = 32
CALLS_AT_ONCE = 8
TIMEOUT_S = 120.0


def search_passages(
    questions: Sequence[str], addresses: Sequence[str], topk: int, notes: Path, update: Callable[[float], object]
) -> dict[str, str]:
    """Return the rendered passages of each question.

    Args:
        questions: what is searched for, word for word.
        addresses: of retrieval servers, `host:port`.
        topk: passages per question.
        notes: a file that keeps what was found, for a repeated run that asks the same servers for as much; the caller
            deletes it when it is done.
        update: called with the share that is done.

    Raises:
        UserError: no server answers, or the notes cannot be written.
    """
    asked: dict[str, Any] = {"topk": topk, "servers": list(addresses)}
    found = _read_notes(notes, asked)
    wanted = [question for question in dict.fromkeys(questions) if question not in found]
    calls = [wanted[start : start + QUESTIONS_PER_CALL] for start in range(0, len(wanted), QUESTIONS_PER_CALL)]
    try:
        notes.parent.mkdir(parents=True, exist_ok=True)
        with notes.open("a", encoding="utf-8") as file:

            def keep(call: Sequence[str], results: Sequence[str]) -> None:
                for question, passages in zip(call, results, strict=True):
                    found[question] = passages
                    file.write(json.dumps({"question": question, **asked, "passages": passages}) + "\n")
                file.flush()
                update(1 - sum(question not in found for question in wanted) / max(len(wanted), 1))

            asyncio.run(_search_all(calls, addresses, topk, keep))
    except SearchUnavailable as error:
        raise UserError(
            f"--search: {error}. Start the retrieval server (searchr1 retrieval-server) and run this again: "
            f"{len(found)} questions are done and will not be searched again"
        ) from error
    except OSError as error:
        raise UserError(f"{notes}: cannot write ({error.strerror or error})") from error
    return found


def _read_notes(notes: Path, asked: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    if not notes.is_file():
        return found
    with notes.open("rb+") as file:
        whole = 0
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                break  # cut off while it was written
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            if all(row.get(name) == value for name, value in asked.items()):
                found[row["question"]] = row["passages"]
        os.truncate(notes, whole)
    return found


async def _search_all(
    calls: Sequence[Sequence[str]], addresses: Sequence[str], topk: int, keep: Callable[[Sequence[str], Sequence[str]], None]
) -> None:
    search = SearchToolConfig(server_addr=list(addresses), topk=topk, timeout_s=TIMEOUT_S)
    client = SearchClient.from_config(search, max_connections=CALLS_AT_ONCE)
    waiting = iter(calls)

    async def work() -> None:
        for call in waiting:  # shared: every worker takes the next
            results = await client.search(call)
            keep(call, [render_body([[Document(d.title, d.text) for d in documents]], "searchr1") for documents in results])

    try:
        with OutageWatch(addresses, TIMEOUT_S, key="--search", limit=""):
            async with asyncio.TaskGroup() as group:
                for _ in range(min(CALLS_AT_ONCE, len(calls))):
                    group.create_task(work())
    except* SearchUnavailable as errors:
        raise errors.exceptions[0] from errors
    finally:
        await client.aclose()
