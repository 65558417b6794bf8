"""Keys of the one channel that all worker groups share, and how workers use it.

A channel is a process of its own; one with many keyed queues costs less than one per queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from searchr1.learner.trained import TrainedModel

CHANNEL = "searchr1"


def prompts_key(rank: int) -> str:
    """Driver -> rollout rank: one list of `Sample` per batch."""
    return f"prompts/{rank}"


ROLLOUTS = "rollouts"
"""Rollout -> reward: a `Chunk` of finished groups; None ends the batch."""


def scored_key(rank: int) -> str:
    """Reward -> inference rank: that rank's share of a `Chunk`; None ends the batch."""
    return f"scored/{rank}"


FINISHED = "finished"
"""Reward or inference -> driver: a finished `Chunk`; None ends the batch."""


def actor_key(dp_rank: int) -> str:
    """Driver -> the leader of the actor's data-parallel rank: its share of the step, an `ActorShare`."""
    return f"actor/{dp_rank}"


def critic_key(dp_rank: int) -> str:
    """Driver -> the leader of the critic's data-parallel rank: its share of the trajectories, then their `CriticTargets`."""
    return f"critic/{dp_rank}"


async def get(channel: Any, key: str, timeout_s: float) -> Any:
    """Return the next item of a queue.

    Raises:
        TimeoutError: nothing came in time.
    """
    async with asyncio.timeout(timeout_s):
        return await channel.get(key=key, async_op=True).async_wait()


async def get_share(channel: Any, model: TrainedModel, key: Callable[[int], str], timeout_s: float) -> Any:
    """Return a data-parallel rank's share of a step: its leader takes it from the channel, the others from the leader.

    Raises:
        TimeoutError: nothing came in time.
    """
    share = await get(channel, key(model.dp_rank), timeout_s) if model.is_dp_leader else None
    return model.broadcast_from_dp_leader(share)


async def put(channel: Any, item: Any, key: str, timeout_s: float) -> None:
    """Append to a queue.

    Raises:
        TimeoutError: the channel did not take it in time.
    """
    async with asyncio.timeout(timeout_s):
        await channel.put(item, key=key, async_op=True).async_wait()
