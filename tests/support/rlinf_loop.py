"""RLinf's own Search-R1 agent loop and search tool, driven without Ray, and the settings of ours that stand for them."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

RLINF_SETTINGS = {
    "force_final_turn": True,
    "information_style": "rlinf",
    "toolcall_parser": "searchr1-qwen",
    "no_call_ends": True,
    "no_results_message": None,
    "tool_text_tokens": "whole",
}
"""Of `AgentSettings`, for any Search-R1 YAML of RLinf. Beside them: one `max_turns` less than there, because the last
generation there gets no results either, and no limit of its own for a tool text."""


def import_rlinf() -> tuple[Any, Any, Any]:
    """RLinf's loop worker, search tool worker and parser lookup. Its other rewards, with what they need, stay out."""
    package = Path(importlib.util.find_spec("rlinf").origin).parent
    name = "rlinf.algorithms.rewards"
    shell = types.ModuleType(name)
    shell.__path__ = [str(package / "algorithms/rewards")]
    had = sys.modules.get(name)
    sys.modules[name] = shell
    try:
        from rlinf.agents.searchr1.search_tool_worker import AsyncSearchClient, SearchToolWorker
        from rlinf.agents.searchr1.searchr1_agent_loop import Searchr1AgentLoopWorker
        from rlinf.algorithms.registry import get_toolcall_parser
    finally:
        if had is None:
            del sys.modules[name]
        else:
            sys.modules[name] = had
    return Searchr1AgentLoopWorker, (SearchToolWorker, AsyncSearchClient), get_toolcall_parser


class _Done:
    """What a channel returns with `async_op=True`."""

    def __init__(self, awaitable: Any) -> None:
        self._awaitable = awaitable

    async def async_wait(self) -> Any:
        return await self._awaitable


class Channel:
    """A channel of RLinf in this process: a queue for each key."""

    def __init__(self) -> None:
        self._queues: dict[str, asyncio.Queue[Any]] = {}

    def put(self, item: Any, key: str = "", async_op: bool = True) -> _Done:
        return _Done(self._queues.setdefault(key, asyncio.Queue()).put(item))

    def get(self, key: str = "", async_op: bool = True) -> _Done:
        return _Done(self._queues.setdefault(key, asyncio.Queue()).get())


class _EngineChannel:
    """Where RLinf puts requests for generations: the scripted engine answers them."""

    def __init__(self, engine: Any, answers: Channel) -> None:
        self._engine, self._answers = engine, answers

    def put(self, item: dict[str, Any], async_op: bool = True) -> _Done:
        ids = self._engine.sample(item["prompt_ids"], item["sampling_params"]["max_new_tokens"])
        return self._answers.put({"output_ids": ids}, key=item["channel_key"])


class _Recorder(Channel):
    """A channel that keeps what went through it."""

    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self._seen = seen

    def put(self, item: Any, key: str = "", async_op: bool = True) -> _Done:
        self._seen.append(item)
        return super().put(item, key, async_op)


@dataclass
class Rollout:
    """One rollout of RLinf."""

    responses: list[list[int]] = field(default_factory=list)
    """Policy tokens of each turn."""
    tool_texts: list[str] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    reward: float = 0.0


async def run_rlinf(
    engine: Any,
    tokenizer: Any,
    address: str,
    *,
    prompt_ids: list[int],
    golds: list[str],
    max_turns: int,
    max_response: int,
    max_prompt: int = 64,
    topk: int = 3,
) -> Rollout:
    """One rollout of RLinf's loop with `engine`, and with its own search tool asking the server at `address`."""
    loop_class, (tool_class, client_class), get_toolcall_parser = import_rlinf()
    cfg = OmegaConf.create(
        {
            "agentloop": {"max_turns": max_turns, "print_outputs": False},
            "tools": {"search": {"server_addr": address, "topk": topk}},
        }
    )
    found = Rollout()
    requests, answers, generations = Channel(), Channel(), Channel()
    texts: list[Any] = []

    tool = object.__new__(tool_class)
    tool.cfg, tool.topk, tool.dummy_mode = cfg, topk, False
    tool.search_client = client_class(cfg)
    tool.init_worker(requests, _Recorder(texts))
    recorder = tool.output_channel

    worker = object.__new__(loop_class)
    worker.cfg, worker.tokenizer = cfg, tokenizer
    worker.print_outputs, worker.is_eval, worker.return_logprobs = False, True, False
    worker.max_prompt_len, worker.max_resp_len = max_prompt, max_response
    worker.toolcall_parser = get_toolcall_parser("searchr1-qwen")
    info = types.SimpleNamespace(input_channel=requests)
    worker.init_worker(_EngineChannel(engine, generations), generations, {"search": info}, {"search": "search"}, recorder)
    del answers

    tool.start_server()
    try:
        output = await asyncio.wait_for(worker.run_one_query(list(prompt_ids), answer=golds), 30)
    finally:
        tool.stop_server()
    found.responses = [list(turn.response_ids) for turn in output.single_turn_outputs]
    found.tool_texts = [str(response.result) for response in texts]
    found.reward = float(output.extra_fields["llm_reward"])
    return found
