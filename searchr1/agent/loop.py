"""The multi-turn loop of one trajectory: generate until a stop, call the tool, append, generate again.

Tokens in, tokens out: what the engine sampled is kept as sampled, what a tool answers is tokenized once, on its own. No
trajectory waits for another.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from searchr1.agent.calls import cut_turn, read_call
from searchr1.agent.protocol import InformationStyle, frame, truncate_block, truncate_ids
from searchr1.agent.settings import AgentSettings, Engine, Generation
from searchr1.agent.tools import Tool, ToolResult
from searchr1.agent.trajectory import Sample, StopReason, Trajectory, Turn
from searchr1.errors import UserError
from searchr1.files.text_rows import whole_text
from searchr1.importing import import_function

GenerateFn = Callable[..., Coroutine[Any, Any, Trajectory]]

END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>")
"""Beside the tokenizer's own end: chat models end a turn with one of these, base models a text with another."""
LONG_TEXT = 20_000
"""Characters above which a tool text is tokenized in a thread, so that a whole web page holds up nobody."""


async def run_trajectory(
    *,
    sample: Sample,
    rollout_id: int,
    engine: Engine,
    tools: Mapping[str, Tool],
    tokenizer: Any,
    settings: AgentSettings,
    seed: int,
) -> Trajectory:
    """Answer `sample` once.

    Args:
        sample: the question.
        rollout_id: which rollout of its group this is.
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
    version: int | None = None
    forced = False
    fixed = _fixed(tokenizer, settings.information_style, settings.invalid_action_message)
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
            seed=_turn_seed(seed, sample.id, rollout_id, len(turns)),
        )
        generation = cut_turn(await engine.generate(response.all_ids, params), settings.toolcall_parser, tokenizer)
        # The oldest weights that took part: an update may fall between two turns.
        version = generation.weight_version if version is None else min(version, generation.weight_version)
        response.append_sampled(generation)
        action = read_call(generation.text, settings.toolcall_parser)
        turn = Turn(generation.text, action.kind, policy_tokens=len(generation.token_ids))
        turns.append(turn)
        if action.kind == "answer":
            stop = "answer"
            break
        if action.kind not in tools:
            turn.action = "invalid"
        if generation.finish_reason == "abort":
            stop = "error"
            break
        out_of_tokens = generation.finish_reason == "length" and response.room <= 0
        if forced:
            stop = "length" if out_of_tokens else "turns"
            break
        if turn.action == "invalid":
            if out_of_tokens:
                stop = "length"
                break
            ended = bool(generation.token_ids) and generation.token_ids[-1] in fixed.end_ids
            if settings.no_call_ends or (ended and settings.end_token_ends):
                stop = "length" if generation.finish_reason == "length" else "eos"
                break
            if ended:
                response.take_back_last()
                turn.policy_tokens -= 1
                turn.policy_text = turn.policy_text.removesuffix(tokenizer.decode(generation.token_ids[-1:]))
            text_ids = fixed.invalid_ids
            turn.tool_text = settings.invalid_action_message
        else:
            turn.queries = action.arguments
            text_ids = await _call_tool(turn, tools[turn.action], tokenizer, fixed, settings)
        if not response.append_environment(text_ids):
            stop = "length"
            turn.tool_text = ""
            break
        turn.tool_tokens = len(text_ids)
    return Trajectory(
        sample=sample,
        rollout_id=rollout_id,
        response_ids=np.array(response.ids, dtype=np.int32),
        loss_mask=np.array(response.mask, dtype=np.bool_),
        rollout_logprobs=np.array(response.logprobs, dtype=np.float32),
        turns=turns,
        stop=stop,
        weight_version=version or 0,
        forced_final=forced and settings.force_final_turn,
    )


async def run_group(run: GenerateFn, group_size: int, **arguments: Any) -> list[Trajectory]:
    """Answer one question `group_size` times at once. Return the trajectories in the order of their rollout ids.

    Args:
        run: `run_trajectory` or the user's own.
        group_size: number of rollouts.
        **arguments: those of `run_trajectory` without `rollout_id`.

    Raises:
        Exception: the first failure of a rollout; the others are cancelled.
    """
    try:
        async with asyncio.TaskGroup() as group:
            rollouts = [group.create_task(run(rollout_id=rollout_id, **arguments)) for rollout_id in range(group_size)]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [rollout.result() for rollout in rollouts]


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

    def take_back_last(self) -> None:
        """Forget the last token."""
        self.all_ids = self.all_ids[:-1]
        del self.ids[-1], self.mask[-1], self.logprobs[-1]

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


@dataclass(frozen=True, slots=True)
class _Fixed:
    """Texts that are the same in every trajectory, tokenized once."""

    before: str
    after: str
    before_ids: list[int]
    after_ids: list[int]
    invalid_ids: list[int]
    end_ids: frozenset[int]
    """Tokens that end a generation by themselves."""
    control_ids: frozenset[int]
    """Tokens that steer a model (end of text, roles) and that no retrieved text may carry."""


@functools.lru_cache(maxsize=16)
def _fixed(tokenizer: Any, style: InformationStyle, invalid_action_message: str) -> _Fixed:
    before, after = frame(style)
    before_ids, after_ids = _encode(tokenizer, before), _encode(tokenizer, after)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ends = {index for index, token in added.items() if token.content in END_TOKENS} | {tokenizer.eos_token_id}
    control = {index for index, token in added.items() if token.special} | ends
    return _Fixed(
        before=before,
        after=after,
        before_ids=before_ids,
        after_ids=after_ids,
        invalid_ids=_encode(tokenizer, invalid_action_message),
        end_ids=frozenset(ends),
        control_ids=frozenset(control.difference(before_ids, after_ids)),
    )


async def _call_tool(turn: Turn, tool: Tool, tokenizer: Any, fixed: _Fixed, settings: AgentSettings) -> list[int]:
    """Call the tool and put its answer between the tags. Returns the tokens of the whole tool text."""
    started = time.perf_counter()
    try:
        async with asyncio.timeout(settings.tool_timeout_s):
            result = await tool.call(turn.queries)
    except TimeoutError:
        result = ToolResult("The tool did not answer in time.", f"no answer within {settings.tool_timeout_s:g} s")
    turn.tool_seconds = time.perf_counter() - started
    turn.tool_error = result.error
    whole = settings.tool_text_tokens == "whole"
    body = whole_text(result.body)  # a tool of the user's own may return anything
    text = fixed.before + body + fixed.after if whole else body
    if len(text) > LONG_TEXT:
        encoded = await asyncio.to_thread(_encode, tokenizer, text)
    else:
        encoded = _encode(tokenizer, text)
    kept = [token for token in encoded if token not in fixed.control_ids]
    limit, side = settings.max_tool_response_length, settings.truncate_side
    if whole:
        ids = truncate_block(kept, fixed.before_ids, fixed.after_ids, limit, side)
        turn.tool_text = text if ids == encoded else tokenizer.decode(ids)
        return ids
    # The body is tokenized and cut between its tags, so they always stay, and look the same whether it was cut or not.
    body_ids = truncate_ids(kept, limit, side)
    body = body if len(body_ids) == len(encoded) else tokenizer.decode(body_ids)
    turn.tool_text = fixed.before + body + fixed.after
    return fixed.before_ids + body_ids + fixed.after_ids


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _turn_seed(seed: int, sample_id: str, rollout_id: int, turn: int) -> int:
    """Return a stable seed of one generation, independent of everything else."""
    digest = hashlib.blake2b(f"{seed}/{sample_id}/{rollout_id}/{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def resolve_generate_fn(path: str | None) -> GenerateFn:
    """`run_trajectory`, or the user's own function with the same keyword arguments.

    Raises:
        UserError: no such function.
    """
    if path is None:
        return run_trajectory
    function = import_function(path, "agentloop.generate_fn")
    if not asyncio.iscoroutinefunction(function):
        raise UserError("agentloop.generate_fn", f"{path} is not an async function")
    return function
