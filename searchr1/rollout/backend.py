"""The synchronous engine that the engine's thread steps, and the hand-over of work between event loops and that thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from searchr1.agent.settings import FinishReason, GenerateParams
from searchr1.rollout.weights import WeightManifest

OnText = Callable[[str], None]
"""Told the text so far of a generation that goes on."""


@dataclass(slots=True)
class Finished:
    """A request that ended."""

    request_id: str
    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    prompt_logprobs: list[float] | None


WEIGHTS, KV_CACHE = "weights", "kv_cache"
"""What of an engine's memory wakes by itself; vLLM's names."""


class Backend(Protocol):
    """What the engine's thread drives; `VllmBackend` is the one in use."""

    @property
    def has_work(self) -> bool:
        """True while a request is unfinished."""

    def add(self, request_id: str, prompt_ids: list[int], params: GenerateParams, on_text: OnText | None = None) -> None:
        """Queue a generation; `on_text` is called in `step` whenever it has grown and not ended."""

    def add_scoring(self, request_id: str, token_ids: list[int]) -> None:
        """Queue the scoring of given tokens."""

    def step(self) -> list[Finished]:
        """Run the model once; returns what ended."""

    def take_ended(self) -> list[Finished]:
        """Return, once, the requests that ended in a call other than `step`, which waited for what was on the device."""

    def abort(self, request_ids: list[str]) -> list[Finished]:
        """End requests; returns what they had."""

    def load_weights(self, bucket: WeightManifest) -> list[str]:
        """Replace the weights between two steps and empty the caches; from the first bucket to the last nothing may run.

        Once it returns, the bucket's buffer may be written again. Returns what made it slower than it should be.
        """

    def load_adapter(self, folder: str, version: int) -> None:
        """Replace the LoRA adapter between two steps and empty the caches."""

    def reset_prefix_cache(self) -> None:
        """Forget cached prompts."""

    def sleep(self, level: int) -> None:
        """Hand memory back."""

    def wake(self, tags: tuple[str, ...]) -> None:
        """Take the memory of `tags` again."""

    def close(self) -> None:
        """Free everything."""


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
