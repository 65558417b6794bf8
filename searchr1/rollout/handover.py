"""Work and answers between event loops and the engine's thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from searchr1.rollout.backend import Backend, OnText


@dataclass(slots=True, eq=False)
class Pending:
    """A future of an event loop that the engine's thread owes an answer."""

    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    weight_version: int = 0
    answer: Any = None
    error: BaseException | None = None


@dataclass(slots=True)
class Command:
    """Work for the engine's thread, between two steps."""

    run: Callable[[Backend], Any]
    pending: Pending | None = None
    """Who waits; None: nobody."""
    answers_later: bool = False
    """`run` only registers a request; a later step answers."""


def deliver(answered: Sequence[Pending]) -> None:
    """Hand answers over: one call into each waiting event loop, however many requests ended."""
    loops: dict[asyncio.AbstractEventLoop, list[Pending]] = {}
    for pending in answered:
        loops.setdefault(pending.loop, []).append(pending)
    for loop, batch in loops.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(_resolve, batch)


def _resolve(batch: Sequence[Pending]) -> None:
    for pending in batch:
        if pending.future.done():
            continue
        if pending.error is not None:
            pending.future.set_exception(pending.error)
        else:
            pending.future.set_result(pending.answer)


def across_threads(loop: asyncio.AbstractEventLoop, on_text: OnText) -> OnText:
    """Wrap a listener of this loop for calls from the engine's thread."""

    def call(text: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            loop.call_soon_threadsafe(on_text, text)

    return call
