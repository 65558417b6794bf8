"""How much of the engine's speed the agent loop keeps, and what waiting for searches costs.

    python benchmarks/agent_loop.py [--model PATH] [--trajectories 256] [--repeats 3] [--out results.json]

One run, one model, one engine, three ways to generate the same tokens:

(a) engine alone: every request of every turn is submitted at once (first turns first), so nothing ever waits.
(b) agent loop: `searchr1.agent.loop.run_trajectory`, one coroutine per trajectory.
(c) turn-synchronous: all trajectories generate, then all search, then all generate again, as Search-R1 does.

Searches take 0, 50 and 500 ms (median of a log-normal distribution, drawn from a seed per trajectory and turn, so (b) and
(c) wait for the same searches). In (c) all searches of a turn run at once and the turn takes as long as the slowest.

A random model never writes a tag, so the script decides: each trajectory has 2 to 4 turns whose lengths come from a
seeded log-normal distribution. `ScriptedEngine` asks the real engine for exactly that many tokens (minimum = maximum, stop
strings on, as in a real run) and then reports the text of a search or, in the last turn, of an answer; the loop parses
it, calls the tool and tokenizes the tool's text as always. A first pass of (b) records every request; (a) and (c) replay
those, with their seeds, and every later pass of (b) must make the same ones. The prefix cache is emptied before each pass.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from searchr1.device import Device

DEVICE = Device.detect()
# Before torch is imported.
os.environ.update(DEVICE.worker_env("rollout"))

from transformers import AutoTokenizer  # noqa: E402

from searchr1.agent.loop import run_trajectory  # noqa: E402
from searchr1.agent.settings import AgentSettings, GenerateParams, Generation  # noqa: E402
from searchr1.agent.tools import ToolResult  # noqa: E402
from searchr1.agent.trajectory import Sample  # noqa: E402
from searchr1.rollout.engine import Engine  # noqa: E402
from searchr1.rollout.settings import EngineSettings  # noqa: E402

SEARCH_STOPS = ("</search>", "</search>\n", "</search><", "</answer>", "</answer>\n", "</answer><", "<|im_end|>")


@dataclass(frozen=True, slots=True)
class Workload:
    """What every pass has to do."""

    trajectories: int
    prompt_tokens: int
    tool_tokens: int
    mean_turn_tokens: int
    sigma: float
    seed: int

    def turn_lengths(self, number: int) -> list[int]:
        """Tokens to sample in each turn of this trajectory; the last turn is the answer."""
        rng = random.Random(f"{self.seed}/lengths/{number}")
        turns = rng.randint(2, 4)
        spread = 0.5
        mu = math.log(self.mean_turn_tokens) - spread**2 / 2
        return [min(max(round(rng.lognormvariate(mu, spread)), 8), 4 * self.mean_turn_tokens) for _ in range(turns)]

    def latency(self, number: int, turn: int, median_ms: float) -> float:
        """Seconds that this trajectory's search takes in this turn."""
        if median_ms == 0:
            return 0.0
        rng = random.Random(f"{self.seed}/latency/{number}/{turn}")
        return rng.lognormvariate(math.log(median_ms / 1000), self.sigma)


@dataclass(frozen=True, slots=True)
class Request:
    """One call of the engine."""

    prompt_ids: tuple[int, ...]
    params: GenerateParams


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the repeats, at one search latency."""

    latency_ms: float
    engine_seconds: float
    loop_seconds: float
    synchronous_seconds: float
    tokens: int

    @property
    def loop_of_engine(self) -> float:
        """(b)'s speed as a share of (a)'s."""
        return self.engine_seconds / self.loop_seconds

    @property
    def loop_over_synchronous(self) -> float:
        """How many times faster (b) is than (c)."""
        return self.synchronous_seconds / self.loop_seconds


class ScriptedEngine:
    """The engine as one trajectory sees it: real tokens, scripted length and text."""

    def __init__(self, engine: Engine, number: int, lengths: list[int]) -> None:
        self._engine = engine
        self._number = number
        self._lengths = lengths
        self.requests: list[Request] = []

    async def generate(self, prompt_ids: Sequence[int], params: GenerateParams) -> Generation:
        """Samples exactly the scripted number of tokens."""
        turn = len(self.requests)
        length = self._lengths[turn]
        params = replace(params, max_new_tokens=length, min_new_tokens=length)
        self.requests.append(Request(tuple(prompt_ids), params))
        generation = await self._engine.generate(list(prompt_ids), params)
        last = turn == len(self._lengths) - 1
        text = "<answer> done </answer>" if last else f"<search> {self._number} {turn} </search>"
        return replace(generation, text=text, finish_reason="stop")


async def engine_alone(engine: Engine, requests: list[list[Request]]) -> None:
    """(a)"""
    longest = max(len(turns) for turns in requests)
    by_turn = [turns[k] for k in range(longest) for turns in requests if k < len(turns)]
    await asyncio.gather(*(engine.generate(list(one.prompt_ids), one.params) for one in by_turn))


async def turn_synchronous(engine: Engine, requests: list[list[Request]], latency: Callable[[int, int], float]) -> None:
    """(c)"""
    for turn in range(max(len(turns) for turns in requests)):
        active = [(number, turns[turn]) for number, turns in enumerate(requests) if turn < len(turns)]
        await asyncio.gather(*(engine.generate(list(one.prompt_ids), one.params) for _, one in active))
        searching = [number for number, _ in active if turn + 1 < len(requests[number])]
        await asyncio.gather(*(asyncio.sleep(latency(number, turn)) for number in searching))


def make_model(path: Path) -> None:
    """Saves a random Qwen2 of about 1.5M parameters (tied embeddings) with a byte-level BPE tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((words(seed, 200) for seed in range(50)), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    Qwen2ForCausalLM(config).save_pretrained(path)


def words(seed: int | str, count: int) -> str:
    """Made-up words, the same for the same seed."""
    rng = random.Random(f"words/{seed}")
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    return " ".join("".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(count))


class SlowSearch:
    """The search tool: waits as long as the workload says, finds the same made-up text every time."""

    def __init__(self, workload: Workload, median_ms: float) -> None:
        self._workload = workload
        self._median_ms = median_ms

    async def call(self, arguments: Sequence[str]) -> ToolResult:
        """The argument is "number turn", as `ScriptedEngine` writes it."""
        number, turn = (int(part) for part in arguments[0].split())
        await asyncio.sleep(self._workload.latency(number, turn, self._median_ms))
        # More than fits; the loop cuts it to `tool_tokens`.
        return ToolResult(words(f"{number}/{turn}", self._workload.tool_tokens))

    async def aclose(self) -> None:
        """Nothing to close."""


class Bench:
    """One engine and one workload."""

    def __init__(self, engine: Engine, tokenizer: Any, workload: Workload, max_model_len: int) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._workload = workload
        self._settings = AgentSettings(
            sampling=GenerateParams(max_new_tokens=max_model_len, stop=SEARCH_STOPS),
            max_model_len=max_model_len,
            max_turns=4,
            max_tool_response_length=workload.tool_tokens,
        )
        self._samples = [self._sample(number) for number in range(workload.trajectories)]

    async def agent_loop(self, median_ms: float) -> list[list[Request]]:
        """(b); returns what it asked of the engine."""
        tools = {"search": SlowSearch(self._workload, median_ms)}
        engines = [
            ScriptedEngine(self._engine, number, self._workload.turn_lengths(number))
            for number in range(self._workload.trajectories)
        ]
        trajectories = await asyncio.gather(
            *(
                run_trajectory(
                    sample=sample,
                    rollout_id=0,
                    engine=engine,
                    tools=tools,
                    tokenizer=self._tokenizer,
                    settings=self._settings,
                    seed=self._workload.seed,
                )
                for sample, engine in zip(self._samples, engines, strict=True)
            )
        )
        for number, trajectory in enumerate(trajectories):
            lengths = self._workload.turn_lengths(number)
            if trajectory.stop != "answer" or trajectory.policy_length != sum(lengths):
                raise RuntimeError(f"trajectory {number} left its script: {trajectory.stop}, {trajectory.policy_length}")
        return [engine.requests for engine in engines]

    async def timed(self, work: Callable[[], Awaitable[Any]]) -> tuple[float, Any]:
        """Seconds and result of one pass over an empty prefix cache."""
        await self._engine.reset_prefix_cache()
        started = time.perf_counter()
        result = await work()
        return time.perf_counter() - started, result

    async def compare(self, latencies_ms: Sequence[float], repeats: int) -> list[Row]:
        """All passes, interleaved so that a busy moment of the machine hits all three alike."""
        _, requests = await self.timed(partial(self.agent_loop, 0.0))
        tokens = sum(one.params.max_new_tokens for turns in requests for one in turns)
        alone: list[float] = []
        loop: dict[float, list[float]] = {ms: [] for ms in latencies_ms}
        synchronous: dict[float, list[float]] = {ms: [] for ms in latencies_ms}
        for repeat in range(repeats):
            for ms in latencies_ms:
                seconds, _ = await self.timed(partial(engine_alone, self._engine, requests))
                alone.append(seconds)
                seconds, again = await self.timed(partial(self.agent_loop, ms))
                if again != requests:
                    raise RuntimeError("a pass made other requests than the first one")
                loop[ms].append(seconds)
                latency = partial(self._workload.latency, median_ms=ms)
                seconds, _ = await self.timed(partial(turn_synchronous, self._engine, requests, latency))
                synchronous[ms].append(seconds)
                print(
                    f"  repeat {repeat + 1}, {ms:g} ms: alone {alone[-1]:.2f} s, loop {loop[ms][-1]:.2f} s, "
                    f"turn-synchronous {seconds:.2f} s",
                    file=sys.stderr,
                    flush=True,
                )
        median = statistics.median
        return [Row(ms, median(alone), median(loop[ms]), median(synchronous[ms]), tokens) for ms in latencies_ms]

    def _sample(self, number: int) -> Sample:
        # Four attempts at each question share its prompt, as in a group.
        text = words(f"prompt/{number // 4}", self._workload.prompt_tokens)
        prompt_ids = self._tokenizer.encode(text, add_special_tokens=False)[: self._workload.prompt_tokens]
        return Sample(f"bench/{number}", number, prompt_ids, "", [])


def print_table(rows: list[Row]) -> None:
    """The comparison, for reading."""
    print(f"{rows[0].tokens} sampled tokens")
    print("search ms |  engine alone |    agent loop | turn-synchronous | loop / alone | loop vs synchronous")
    for row in rows:
        speeds = [row.tokens / s for s in (row.engine_seconds, row.loop_seconds, row.synchronous_seconds)]
        print(
            f"{row.latency_ms:9g} | {speeds[0]:7.0f} tok/s | {speeds[1]:7.0f} tok/s | {speeds[2]:10.0f} tok/s | "
            f"{row.loop_of_engine:12.2f} | {row.loop_over_synchronous:18.2f}x"
        )


async def benchmark(arguments: argparse.Namespace, device: Device) -> list[Row]:
    """Starts the engine and compares."""
    workload = Workload(
        trajectories=arguments.trajectories,
        prompt_tokens=arguments.prompt_tokens,
        tool_tokens=arguments.tool_tokens,
        mean_turn_tokens=arguments.turn_tokens,
        sigma=arguments.sigma,
        seed=arguments.seed,
    )
    # Four turns of at most four times the mean, the tool texts with their tags, the prompt.
    max_model_len = workload.prompt_tokens + 16 * workload.mean_turn_tokens + 3 * (workload.tool_tokens + 40)
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model is None:
            make_model(Path(folder))
            model = folder
        settings = EngineSettings(
            max_model_len=max_model_len, dtype=arguments.dtype, max_num_seqs=arguments.max_num_seqs, request_timeout_s=3600
        )
        engine = await Engine.start(model, device, settings)
        try:
            bench = Bench(engine, AutoTokenizer.from_pretrained(model), workload, max_model_len)
            return await bench.compare(arguments.latencies, arguments.repeats)
        finally:
            await engine.close()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Engine alone, agent loop and turn-synchronous loop on the same tokens.")
    parser.add_argument("--model", help="a Hugging Face folder; default: a random 1.5M-parameter model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--trajectories", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--tool-tokens", type=int, default=100)
    parser.add_argument("--turn-tokens", type=int, default=48, help="mean tokens of a turn")
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--sigma", type=float, default=0.75, help="spread of the search latencies (log-normal)")
    parser.add_argument("--latencies", type=float, nargs="+", default=[0, 50, 500], help="median search latencies in ms")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    return parser.parse_args()


def main() -> None:
    """Runs the benchmark."""
    arguments = parse_arguments()
    rows = asyncio.run(benchmark(arguments, DEVICE))
    print_table(rows)
    if arguments.out is not None:
        results = [
            asdict(row) | {"loop_of_engine": row.loop_of_engine, "loop_over_synchronous": row.loop_over_synchronous}
            for row in rows
        ]
        settings = {name: str(value) for name, value in vars(arguments).items()}
        arguments.out.write_text(
            json.dumps({"device": DEVICE.kind, "settings": settings, "rows": results}, indent=2), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
