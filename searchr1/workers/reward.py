"""RewardGroup: scores finished trajectories and passes them on."""

from __future__ import annotations

import asyncio
from typing import Any

from rlinf.scheduler import Worker

from searchr1.actor.packing import sequence_length, split_balanced
from searchr1.agent.trajectory import Chunk
from searchr1.config.schema import Config
from searchr1.workers import channels
from searchr1.workers.failure import reported


class RewardWorker(Worker):
    """One scorer; several share the queue of finished groups."""

    def __init__(self, config: Config, channel: Any, inference_ranks: int) -> None:
        super().__init__()
        self._config = config
        self._channel = channel
        self._inference_ranks = inference_ranks

    @reported
    async def start(self) -> None:
        """Resolve the reward function, so that a wrong name is told before anything runs."""
        from searchr1.rewards.registry import reward_function

        reward_function(self._config.reward.reward_type)

    @reported
    async def score(self) -> int:
        """Score chunks until the batch's end. Returns the number of trajectories.

        Training chunks go on to the inference group if there is one: each of its ranks gets a share of every chunk (an
        empty one too), because its ranks must run in lockstep.
        """
        from searchr1.rewards.registry import score_trajectory

        timeout = self._config.runner.step_timeout_s
        reward = self._config.reward
        count = 0
        while (chunk := await channels.get(self._channel, channels.ROLLOUTS, timeout)) is not None:
            for trajectory in chunk.trajectories:
                # In a thread: a custom reward may call a model or a server, and must not hold up the queue.
                trajectory.reward, trajectory.reward_parts = await asyncio.to_thread(
                    score_trajectory, trajectory, reward.reward_type, reward.reward_scale
                )
            count += len(chunk.trajectories)
            if chunk.mode == "eval" or not self._inference_ranks:
                await channels.put(self._channel, chunk, channels.FINISHED, timeout)
                continue
            shares = split_balanced([sequence_length(t) for t in chunk.trajectories], self._inference_ranks)
            for rank, share in enumerate(shares):
                part = Chunk(chunk.step, chunk.mode, [chunk.trajectories[i] for i in share])
                await channels.put(self._channel, part, channels.scored_key(rank), timeout)
        return count
