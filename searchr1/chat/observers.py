"""An engine and tools that emit events around the agent loop of training, which stays as it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from searchr1.agent.settings import GenerateParams, Generation
from searchr1.agent.tools import Tool, ToolResult
from searchr1.chat.events import (
    Blocks,
    Event,
    InvalidAction,
    Passage,
    Read,
    Text,
    ToolCalled,
    ToolFailed,
    ToolReturned,
    TurnStarted,
    open_at_end,
)

SHOWN_CHARACTERS = 20_000
"""Most characters of a passage or page in an event; the model's own limit is a number of tokens."""

Emit = Callable[[Event], None]


class StreamingEngine(Protocol):
    """An engine that reports the text so far of a generation, as `searchr1.rollout.engine.Engine`."""

    async def generate(
        self,
        prompt_ids: list[int],
        params: GenerateParams,
        timeout_s: float | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Sample one continuation."""
        ...


class ObservedRollout:
    """One question's engine and tools, which emit events."""

    def __init__(self, engine: StreamingEngine, tools: Mapping[str, Tool], tokenizer: Any, emit: Emit) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._emit = emit
        self._seen: list[int] = []
        self._turns = 0
        self._called = False
        self.tools: dict[str, Tool] = {action: _ObservedTool(action, tool, self) for action, tool in tools.items()}

    async def generate(self, prompt_ids: list[int], params: GenerateParams) -> Generation:
        """Generate a turn. The new end of the prompt is what the environment wrote since the last turn."""
        seen, self._seen = self._seen, []
        read = prompt_ids[len(seen) :] if prompt_ids[: len(seen)] == seen else []
        text = self._tokenizer.decode(read)
        if self._turns:
            self._emit(Read(text, len(read)) if self._called else InvalidAction(text, len(read)))
        self._turns += 1
        self._called = False
        self._emit(TurnStarted(self._turns))
        blocks = Blocks(open_at_end(text))
        written = ""

        def on_text(so_far: str) -> None:
            nonlocal written
            self._emit_text(blocks.feed(so_far[len(written) :]))
            written = so_far

        generation = await self._engine.generate(prompt_ids, params, on_text=on_text)
        on_text(generation.text)
        self._emit_text(blocks.finish())
        self._seen = prompt_ids + generation.token_ids
        return generation

    def _emit_text(self, pieces: Sequence[tuple[Any, str]]) -> None:
        for kind, text in pieces:
            self._emit(Text(kind, text))

    async def call(self, action: str, tool: Tool, arguments: Sequence[str]) -> ToolResult:
        """Call a tool; emit the call and what it returned."""
        self._called = True
        self._emit(ToolCalled(action, list(arguments)))
        started = time.perf_counter()
        try:
            result = await tool.call(arguments)
        except asyncio.CancelledError:  # the loop gives up a slow tool; when everything stops, nobody reads the event
            self._emit(ToolFailed(action, f"no answer within {time.perf_counter() - started:.0f} s"))
            raise
        if result.error is not None:
            self._emit(ToolFailed(action, result.error))
        else:
            results = [
                [Passage(d.title, d.text[:SHOWN_CHARACTERS], d.url, d.score) for d in documents]
                for documents in result.found or [[] for _ in arguments]
            ]
            self._emit(ToolReturned(action, results, round(time.perf_counter() - started, 4)))
        return result


class _ObservedTool:
    def __init__(self, action: str, tool: Tool, rollout: ObservedRollout) -> None:
        self._action, self._tool, self._rollout = action, tool, rollout

    async def call(self, arguments: Sequence[str]) -> ToolResult:
        return await self._rollout.call(self._action, self._tool, arguments)

    async def aclose(self) -> None:
        """Do nothing: the tools belong to the chat."""
