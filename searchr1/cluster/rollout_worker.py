"""The rollout group: engines with the agent loop beside them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from searchr1.agent.loop import run_group
from searchr1.agent.settings import AgentSettings
from searchr1.agent.tools import build_tools, client_stats
from searchr1.agent.trajectory import Chunk, Mode, Sample, Trajectory
from searchr1.cluster import channels
from searchr1.cluster.failure import reported
from searchr1.cluster.rlinf_compat import Worker
from searchr1.cluster.worker_group import Call, WorkerGroup
from searchr1.config.schema import Config
from searchr1.device import Device

if TYPE_CHECKING:
    from searchr1.rollout.weights import WeightManifest

FLUSH_SECONDS = 0.2
"""Finished groups wait at most this long for company: a channel message costs about 10 ms whatever is in it."""


@dataclass(frozen=True, slots=True)
class RolloutReport:
    """What one rank did in one batch."""

    trajectories: int
    generated_tokens: int
    seconds: float
    engine_busy_seconds: float
    search_retries: int = 0
    """Requests of the search client beyond the first of each call."""
    search_opens: int = 0
    """How often it left a server alone for a while."""


class RolloutWorker(Worker):
    """One engine and its share of the questions."""

    def __init__(self, config: Config, device: Device, channel: Any, sleep_mode: bool) -> None:
        super().__init__()
        self._config = config
        self._device = device
        self._channel = channel
        self._sleep_mode = sleep_mode
        os.environ.update(device.worker_env("rollout", self._world_size))

    @reported
    async def start(self) -> None:
        """Load the model, the tokenizer and the tools."""
        from transformers import AutoTokenizer

        from searchr1.agent.loop import resolve_generate_fn
        from searchr1.rollout.engine import Engine
        from searchr1.rollout.settings import EngineSettings

        config = self._config
        self._tokenizer = AutoTokenizer.from_pretrained(config.rollout.model.model_path, trust_remote_code=False)
        self._settings: dict[Mode, AgentSettings] = {
            "train": AgentSettings.from_config(config, "train"),
            "eval": AgentSettings.from_config(config, "eval"),
        }
        settings = self._settings["train"]
        self._tools = build_tools(config.tools, settings.information_style, settings.no_results_message)
        self._run = resolve_generate_fn(config.agentloop.generate_fn)
        engine_settings = EngineSettings.from_config(config, self._sleep_mode)
        # Where updates are adapters nothing brings the weights again.
        self._sleep_level = 1 if engine_settings.adapter_rank else 2
        self._engine = await Engine.start(config.rollout.model.model_path, self._device, engine_settings)

    @reported
    async def rollout(
        self,
        step: int,
        mode: Mode,
        group_size: int,
        seed: int,
        settings: AgentSettings | None = None,
        in_flight: int | None = None,
    ) -> RolloutReport:
        """Answer one batch of questions `group_size` times each; finished groups leave as they finish.

        Args:
            step: of the training.
            mode: whose settings count.
            group_size: rollouts of each question.
            seed: of all rollouts.
            settings: in place of the mode's.
            in_flight: groups under way at once, begun in the questions' order, for as long as it takes; None begins all of
                them at once and gives them `runner.step_timeout_s`.
        """
        timeout = self._config.runner.step_timeout_s
        settings = settings or self._settings[mode]
        started = time.perf_counter()
        before, searched = self._engine.stats(), client_stats(self._tools)
        samples: list[Sample] = await channels.get(self._channel, channels.prompts_key(self._rank), timeout)
        finished: list[Trajectory] = []
        done = asyncio.Event()
        slots = asyncio.Semaphore(in_flight or max(len(samples), 1))

        async def one_group(sample: Sample) -> None:
            async with slots:
                group = await run_group(
                    self._run,
                    group_size,
                    sample=sample,
                    engine=self._engine,
                    tools=self._tools,
                    tokenizer=self._tokenizer,
                    settings=settings,
                    seed=seed,
                )
            finished.extend(group)

        async def flush() -> None:
            last = False
            while not last:
                try:
                    async with asyncio.timeout(FLUSH_SECONDS):
                        await done.wait()
                    last = True
                except TimeoutError:
                    pass
                if finished:
                    chunk = Chunk(step, mode, list(finished))
                    finished.clear()
                    await channels.put(self._channel, chunk, channels.ROLLOUTS, timeout)

        flusher = asyncio.create_task(flush())
        try:
            # With a window every generation and every tool call still has its own deadline.
            async with asyncio.timeout(None if in_flight else timeout), asyncio.TaskGroup() as groups:
                for sample in samples:
                    groups.create_task(one_group(sample))
        except ExceptionGroup as errors:
            # Every other trajectory has been cancelled; the first cause is what the user needs.
            raise errors.exceptions[0] from None
        finally:
            done.set()
            await flusher
        after, search = self._engine.stats(), client_stats(self._tools)
        return RolloutReport(
            trajectories=len(samples) * group_size,
            generated_tokens=after.generated_tokens - before.generated_tokens,
            seconds=time.perf_counter() - started,
            engine_busy_seconds=after.busy_seconds - before.busy_seconds,
            search_retries=search.retries - searched.retries,
            search_opens=search.opens - searched.opens,
        )

    @reported
    async def update_weights(self, manifest: WeightManifest) -> list[str]:
        """Load published weights. Return what made it slower than it should be."""
        return await self._engine.update_weights(manifest)

    @reported
    async def probe_logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """Score sequences under the current weights: a log-probability per token (0 for the first)."""
        return await self._engine.logprobs(sequences)

    @reported
    async def sleep(self) -> None:
        """Lend the GPU's memory to the trainer, and drop the weights unless updates bring adapters alone."""
        await self._engine.sleep(self._sleep_level)

    @reported
    async def wake(self, tags: tuple[str, ...]) -> None:
        """Take back the GPU's memory of the weights or of the KV cache."""
        await self._engine.wake(tags)

    @reported
    async def stop(self) -> None:
        """Close the engine and the connections."""
        for tool in self._tools.values():
            await tool.aclose()
        await self._engine.close()


class RolloutGroup(WorkerGroup):
    """The engines."""

    def rollout(
        self,
        samples: Sequence[Sample],
        *,
        step: int,
        mode: Mode,
        group_size: int,
        seed: int,
        settings: AgentSettings | None = None,
        in_flight: int | None = None,
    ) -> Call[RolloutReport]:
        """Answer questions, dealt to the ranks in turn; arguments as of `RolloutWorker.rollout`."""
        for rank in range(self.size):
            self._channel.put(list(samples[rank :: self.size]), key=channels.prompts_key(rank))
        return self.call(RolloutWorker.rollout, step, mode, group_size, seed, settings, in_flight)

    def update_weights(self, manifest: WeightManifest) -> Call[list[str]]:
        """Load published weights; every rank returns what made it slower than it should be."""
        return self.call(RolloutWorker.update_weights, manifest)

    def probe_logprobs(self, sequences: list[list[int]]) -> Call[list[list[float]]]:
        """Score sequences under the current weights: a log-probability per token (0 for the first)."""
        return self.call(RolloutWorker.probe_logprobs, sequences)

    def sleep(self) -> Call[None]:
        """Lend the GPUs' memory to the other worker groups."""
        return self.call(RolloutWorker.sleep)

    def wake(self, tag: str) -> Call[None]:
        """Take back the GPUs' memory of the weights or of the KV cache (names in `rollout/backend.py`)."""
        return self.call(RolloutWorker.wake, (tag,))
