"""The runner's side of the critic: one share per replica, values back in the trajectories' order."""

from __future__ import annotations

import numpy as np
import pytest
from support import policy_ranks as ranks

from searchr1.config.schema import Config
from searchr1.training.critic import train_critic


class FakeChannel:
    def __init__(self):
        self.queues = {}

    def put(self, item, key):
        self.queues.setdefault(key, []).append(item)


class FakeCritic:
    """Four ranks whose values are 1 for every token of question 0, 2 for question 1, and so on."""

    size = 4

    def __init__(self, channel, leaders):
        self._channel, self._leaders, self.targets = channel, leaders, []

    def call(self, method):
        self._method = method
        return self

    def wait(self, timeout_s):
        if self._method == "train_step":
            self.targets = [self._channel.queues[f"critic/{replica}"].pop(0) for replica in range(len(self._leaders))]
            return [{"critic/loss": 0.5}] * self.size
        self.shares = [self._channel.queues[f"critic/{replica}"].pop(0) for replica in range(len(self._leaders))]
        given = [[np.where(t.loss_mask, 1.0 + t.sample.index, 0).astype(np.float32) for t in s] for s in self.shares]
        return [given[self._leaders.index(rank)] if rank in self._leaders else None for rank in range(self.size)]


@pytest.mark.parametrize(
    ("backend", "tensor", "pipeline", "leaders"),
    [("fsdp", None, None, [0, 1, 2, 3]), ("megatron", 2, None, [0, 2]), ("megatron", 2, 2, [0]), ("megatron", 1, 2, [0, 1])],
)
def test_each_replica_gets_a_share_and_its_first_rank_answers(backend, tensor, pipeline, leaders):
    config = Config()
    config.critic.training_backend = backend
    config.critic.model.tensor_model_parallel_size, config.critic.model.pipeline_model_parallel_size = tensor, pipeline
    config.algorithm.kl_beta = 0.0
    trajectories, _ = ranks.make_trajectories(0)
    for trajectory in trajectories:
        trajectory.reward = 10.0
    channel = FakeChannel()
    critic = FakeCritic(channel, leaders)
    minibatches = [t.sample.index % 2 for t in trajectories]
    advantages, metrics = train_critic(critic, channel, trajectories, minibatches, config)
    assert metrics == {"critic/loss": 0.5}
    # gamma and lambda are 1: the reward, less the value of the state.
    for t, advantage in zip(trajectories, advantages, strict=True):
        assert np.allclose(advantage, np.where(t.loss_mask, 9.0 - t.sample.index, 0))
    seen = [t.sample.id for share in critic.shares for t in share]
    assert sorted(seen) == sorted(t.sample.id for t in trajectories)
    for share, targets in zip(critic.shares, critic.targets, strict=True):
        assert targets.minibatch_ids == [t.sample.index % 2 for t in share]
        for t, target in zip(share, targets.returns, strict=True):
            assert np.allclose(target, np.where(t.loss_mask, 10.0, 0))
    assert not any(channel.queues.values())
