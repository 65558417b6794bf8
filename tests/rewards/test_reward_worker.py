"""The worker between two queues: chunks are scored at once, shares stay whole, failures end it."""

from __future__ import annotations

import asyncio
import sys
import types
from collections import defaultdict

import pytest
from support.trajectories import trajectory, turn

from searchr1.agent.trajectory import Chunk
from searchr1.cluster import channels
from searchr1.cluster.failure import Failure
from searchr1.cluster.reward_worker import RewardWorker
from searchr1.config.schema import Config
from searchr1.config.schema_reward import RewardConfig
from searchr1.rewards.scorer import Scorer


class Done:
    def __init__(self, wait):
        self.async_wait = wait


class Channel:
    """RLinf's channel as far as the worker uses it, in this process."""

    def __init__(self):
        self.queues = defaultdict(asyncio.Queue)

    def get(self, *, key, async_op):
        return Done(self.queues[key].get)

    def put(self, item, *, key, async_op):
        return Done(lambda: self.queues[key].put(item))


class State(types.SimpleNamespace):
    """A worker's fields without RLinf's process around them."""

    score = RewardWorker.score
    _score_chunk = RewardWorker._score_chunk


@pytest.fixture
def own(monkeypatch):
    module = types.ModuleType("worker_rewards")
    module.running, module.most = 0, 0

    async def waits(policy_text, golden_answers, trajectory):
        module.running += 1
        module.most = max(module.most, module.running)
        await asyncio.sleep(0.02 if policy_text == "fast" else 0.2)
        module.running -= 1
        if policy_text == "bad":
            return None
        return 1.0

    module.waits = waits
    monkeypatch.setitem(sys.modules, "worker_rewards", module)
    return module


def run(texts, mode="train", ranks=0, concurrency=64):
    """Score one chunk of two trajectories per text. Returns the result and the channel."""

    async def go():
        config = Config(reward=RewardConfig(reward_type="worker_rewards:waits", concurrency=concurrency))
        channel = Channel()
        for step, text in enumerate(texts):
            chunk = Chunk(step, mode, [trajectory(turn(text)) for _ in range(2)])
            await channels.put(channel, chunk, channels.ROLLOUTS, 1)
        await channels.put(channel, None, channels.ROLLOUTS, 1)
        state = State(
            _config=config, _channel=channel, _inference_ranks=ranks, _sending=asyncio.Lock(), _scorer=Scorer(config.reward)
        )
        result = await state.score()
        return result, {key: list(queue._queue) for key, queue in channel.queues.items() if queue.qsize()}

    return asyncio.run(go())


def test_a_slow_chunk_holds_up_no_other(own):
    count, queues = run(["slow", "fast", "fast"])
    assert count == 6
    assert [chunk.step for chunk in queues[channels.FINISHED]] == [1, 2, 0]
    assert all(t.reward == 1 for chunk in queues[channels.FINISHED] for t in chunk.trajectories)


def test_no_more_at_once_than_configured(own):
    assert run(["fast"] * 6, concurrency=4)[0] == 12
    assert own.most == 4


def test_every_inference_rank_gets_a_share_of_every_chunk_in_the_same_order(own):
    _, queues = run(["slow", "fast", "fast"], ranks=3)
    steps = [[part.step for part in queues[channels.scored_key(rank)]] for rank in range(3)]
    assert steps == [[1, 2, 0]] * 3
    shares = [part for rank in range(3) for part in queues[channels.scored_key(rank)]]
    assert sum(len(part.trajectories) for part in shares) == 6


def test_evaluation_goes_past_the_inference_group(own):
    assert set(run(["fast"], mode="eval", ranks=3)[1]) == {channels.FINISHED}


def test_a_failure_is_the_users_and_ends_the_batch(own):
    result, queues = run(["bad", "fast"])
    assert isinstance(result, Failure)
    assert result.by_user
    assert "worker_rewards:waits returned None" in result.message
    assert [chunk.step for chunk in queues[channels.FINISHED]] == [1]
