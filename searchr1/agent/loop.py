"""The multi-turn loop of one trajectory: generate until a stop, call the tool, append, generate again.

Tokens in, tokens out: what the engine sampled is kept as sampled, what a tool answers is tokenized once, on its own. No
trajectory waits for another.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from searchr1.agent.protocol import frame, parse_action, truncate_ids
from searchr1.agent.settings import AgentSettings, Engine, Generation
from searchr1.agent.tools import Tool, ToolResult
from searchr1.agent.trajectory import Sample, StopReason, Trajectory, Turn
from searchr1.errors import UserError

GenerateFn = Callable[..., Coroutine[Any, Any, Trajectory]]


async def run_trajectory(
    *,
    sample: Sample,
    replica: int,
    engine: Engine,
    tools: Mapping[str, Tool],
    tokenizer: Any,
    settings: AgentSettings,
    seed: int,
) -> Trajectory:
    """One attempt at `sample`.

    Args:
        sample: the question.
        replica: which attempt of its group this is.
        engine: shared by all trajectories.
        tools: by action: "search", "access".
        tokenizer: encodes tool text.
        settings: limits, sampling, texts.
        seed: of the step; every generation draws from its own stream, so the order of events changes nothing.

    Raises:
        UserError: a tool fails too often.
    """
    response = _Response(sample.prompt_ids, settings)
    turns: list[Turn] = []
    stop: StopReason = "turns"
    version = 0
    forced = False
    while True:
        # Search-R1's turns: up to `max_turns` with tools, then a last one whose call nobody answers.
        forced = len(turns) >= settings.max_turns
        if forced and not settings.force_final_turn:
            break
        room = response.room
        if room <= 0:
            stop = "length"
            break
        limit = min(room, settings.max_new_tokens_per_turn or room)
        params = replace(
            settings.sampling,
            max_new_tokens=limit,
            min_new_tokens=min(settings.sampling.min_new_tokens, limit),
            seed=_turn_seed(seed, sample.id, replica, len(turns)),
        )
        generation = await engine.generate(response.all_ids, params)
        version = version or generation.weight_version
        response.append_sampled(generation)
        action = parse_action(generation.text)
        turn = Turn(generation.text, action.kind, policy_tokens=len(generation.token_ids), queries=[])
        turns.append(turn)
        if action.kind == "answer":
            stop = "answer"
            break
        if action.kind in ("search", "access") and action.kind in tools:
            turn.queries = action.arguments
        else:
            turn.action = "invalid"
        if forced:
            break
        if generation.finish_reason == "abort":
            stop = "error"
            break
        if turn.action == "invalid":
            if generation.finish_reason == "length" and response.room <= 0:
                stop = "length"
                break
            if generation.token_ids and generation.token_ids[-1] == tokenizer.eos_token_id:
                stop = "eos"
                break
            text_ids = _encode(tokenizer, settings.invalid_action_message)
            turn.tool_text = settings.invalid_action_message
        else:
            text_ids = await _call_tool(turn, tools[turn.action], tokenizer, settings)
        if not response.append_environment(text_ids):
            stop = "length"
            turn.tool_text = ""
            break
        turn.tool_tokens = len(text_ids)
    return Trajectory(
        sample=sample,
        replica=replica,
        response_ids=np.array(response.ids, dtype=np.int32),
        loss_mask=np.array(response.mask, dtype=np.bool_),
        rollout_logprobs=np.array(response.logprobs, dtype=np.float32),
        turns=turns,
        stop=stop,
        weight_version=version,
        forced_final=forced and settings.force_final_turn,
    )


class _Response:
    """Response tokens as they grow, and how many more fit."""

    def __init__(self, prompt_ids: list[int], settings: AgentSettings) -> None:
        self.all_ids = list(prompt_ids)
        self.ids: list[int] = []
        self.mask: list[bool] = []
        self.logprobs: list[float] = []
        self._limit = min(settings.sampling.max_new_tokens, settings.max_model_len - len(prompt_ids))

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return self._limit - len(self.ids)

    def append_sampled(self, generation: Generation) -> None:
        self._append(generation.token_ids, True, generation.logprobs)

    def append_environment(self, ids: list[int]) -> bool:
        """Add what the policy only reads; False (and nothing added) if no sampled token would fit after it."""
        if len(ids) >= self.room:
            return False
        self._append(ids, False, [0.0] * len(ids))
        return True

    def _append(self, ids: list[int], sampled: bool, logprobs: list[float]) -> None:
        if len(ids) != len(logprobs):
            raise ValueError(f"{len(ids)} tokens with {len(logprobs)} log-probabilities")
        self.ids += ids
        # A new list for the engine: it may still hold the one it was given.
        self.all_ids = self.all_ids + ids
        self.mask += [sampled] * len(ids)
        self.logprobs += logprobs


async def _call_tool(turn: Turn, tool: Tool, tokenizer: Any, settings: AgentSettings) -> list[int]:
    """Call the tool and put its answer between the tags. Returns the tokens of the whole tool text."""
    started = time.perf_counter()
    try:
        async with asyncio.timeout(settings.tool_timeout_s):
            result = await tool.call(turn.queries)
    except TimeoutError:
        result = ToolResult("The tool did not answer in time.", f"no answer within {settings.tool_timeout_s:g} s")
    turn.tool_seconds = time.perf_counter() - started
    turn.tool_error = result.error
    before, after = frame(settings.information_style)
    whole_ids = _encode(tokenizer, before + result.body + after)
    before_ids, after_ids = _encode(tokenizer, before), _encode(tokenizer, after)
    limit = settings.max_tool_response_length
    if len(whole_ids) <= limit + len(before_ids) + len(after_ids):
        turn.tool_text = before + result.body + after
        return whole_ids
    # Too long: the body is cut between its tags, so the closing tag always stays.
    body_ids = truncate_ids(_encode(tokenizer, result.body), limit, settings.truncate_side)
    ids = before_ids + body_ids + after_ids
    turn.tool_text = tokenizer.decode(ids)
    return ids


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _turn_seed(seed: int, sample_id: str, replica: int, turn: int) -> int:
    """A stable seed of one generation, independent of everything else."""
    digest = hashlib.blake2b(f"{seed}/{sample_id}/{replica}/{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def resolve_generate_fn(path: str | None) -> GenerateFn:
    """`run_trajectory`, or the user's own function with the same keyword arguments.

    Raises:
        UserError: no such function.
    """
    if path is None:
        return run_trajectory
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"agentloop.generate_fn: cannot import {path!r}: {error}") from error
    if not asyncio.iscoroutinefunction(function):
        raise UserError(f"agentloop.generate_fn: {path} is not an async function")
    return function
