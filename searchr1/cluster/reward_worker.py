"""The reward group: score finished trajectories and pass them on."""

from __future__ import annotations

import asyncio
from typing import Any

from searchr1.agent.trajectory import Chunk
from searchr1.cluster import channels
from searchr1.cluster.failure import reported
from searchr1.cluster.rlinf_compat import Worker
from searchr1.cluster.worker_group import Call, WorkerGroup
from searchr1.config.schema import Config
from searchr1.errors import UserError
from searchr1.learner.packing import sequence_length, split_balanced


class RewardWorker(Worker):
    """One scorer; several share the queue of finished groups."""

    def __init__(self, config: Config, channel: Any, inference_ranks: int) -> None:
        super().__init__()
        self._config = config
        self._channel = channel
        self._inference_ranks = inference_ranks
        self._sending = asyncio.Lock()

    @reported
    async def start(self) -> None:
        """Find the reward functions, so that a wrong name or a judge without its key is reported before anything runs."""
        from searchr1.rewards.scorer import Scorer

        self._scorer = Scorer(self._config.reward)

    @reported
    async def score(self) -> int:
        """Score chunks until the batch's end. Return the number of trajectories.

        While one chunk waits for a judge the next ones are scored, up to `reward.concurrency` trajectories: no more, so
        that the other reward processes get theirs.
        """
        count = 0
        under_way: set[asyncio.Task[None]] = set()
        try:
            async with asyncio.TaskGroup() as tasks:
                timeout = self._config.runner.step_timeout_s
                while (chunk := await channels.get(self._channel, channels.ROLLOUTS, timeout)) is not None:
                    count += len(chunk.trajectories)
                    under_way.add(tasks.create_task(self._score_chunk(chunk)))
                    most = max(1, self._config.reward.concurrency // max(1, len(chunk.trajectories)))
                    while len(under_way) >= most:
                        _, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            await self._scorer.aclose()
        return count

    async def _score_chunk(self, chunk: Chunk) -> None:
        """Score a chunk and pass it on.

        Training chunks go to the inference group if there is one: each of its ranks gets a share of every chunk (an empty
        one too), because its ranks must run in lockstep.
        """
        timeout = self._config.runner.step_timeout_s
        try:
            async with asyncio.timeout(timeout):
                untagged = self._config.evaluation.untagged if chunk.mode == "eval" else "reject"
                await self._scorer.score_all(chunk.trajectories, untagged)
        except TimeoutError:
            raise UserError(f"runner.step_timeout_s: the reward took longer than {timeout:g} s") from None
        if chunk.mode == "eval" or not self._inference_ranks:
            await channels.put(self._channel, chunk, channels.FINISHED, timeout)
            return
        shares = split_balanced([sequence_length(t) for t in chunk.trajectories], self._inference_ranks)
        async with self._sending:
            for rank, share in enumerate(shares):
                part = Chunk(chunk.step, chunk.mode, [chunk.trajectories[i] for i in share])
                await channels.put(self._channel, part, channels.scored_key(rank), timeout)


class RewardGroup(WorkerGroup):
    """The scorers."""

    def score(self) -> Call[int]:
        """Score chunks until `end_batch`; every rank returns the number of its trajectories."""
        return self.call(RewardWorker.score)

    def end_batch(self) -> None:
        """Let `score` return once it has scored what it has got."""
        for _ in range(self.size):
            self._channel.put(None, key=channels.ROLLOUTS)
