"""The driver's side of the critic: a share per data-parallel copy, values back in the trajectories' order."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from support.trajectories import random_trajectories

from searchr1.cluster.critic_worker import CriticGroup
from searchr1.config.layout import critic_layout
from searchr1.config.schema import Config
from searchr1.training.train import update_critic


class FakeChannel:
    def __init__(self):
        self.queues = {}

    def put(self, item, key):
        self.queues.setdefault(key, []).append(item)


SIZE = 4


class FakeCritic:
    """RLinf's handle of four ranks whose values are 1 for every token of question 0, 2 for question 1, and so on."""

    def __init__(self, channel, leaders):
        self._channel, self._leaders, self.targets = channel, leaders, []

    def _taken(self):
        return [self._channel.queues[f"critic/{dp_rank}"].pop(0) for dp_rank in range(len(self._leaders))]

    def train_step(self):
        self.targets = self._taken()
        return returned([{"critic/loss": 0.5}] * SIZE)

    def values(self):
        self.shares = self._taken()
        given = [[np.where(t.loss_mask, 1.0 + t.sample.index, 0).astype(np.float32) for t in s] for s in self.shares]
        return returned([given[self._leaders.index(rank)] if rank in self._leaders else None for rank in range(SIZE)])


def returned(results):
    return SimpleNamespace(done=lambda: True, wait=lambda: results)


@pytest.mark.parametrize(
    ("backend", "tensor", "pipeline", "leaders"),
    [("fsdp", None, None, [0, 1, 2, 3]), ("megatron", 2, None, [0, 2]), ("megatron", 2, 2, [0]), ("megatron", 1, 2, [0, 1])],
)
def test_each_copy_gets_a_share_and_its_first_rank_answers(backend, tensor, pipeline, leaders):
    config = Config()
    config.critic.training_backend = backend
    config.critic.model.tensor_model_parallel_size, config.critic.model.pipeline_model_parallel_size = tensor, pipeline
    config.algorithm.kl_beta = 0.0
    trajectories, _ = random_trajectories(0)
    for trajectory in trajectories:
        trajectory.reward = 10.0
    channel = FakeChannel()
    critic = FakeCritic(channel, leaders)
    group = CriticGroup(critic, "critic", SIZE, channel, timeout_s=1.0)
    group.dp_size = critic_layout(config, SIZE).data_parallel
    minibatches = [t.sample.index % 2 for t in trajectories]
    advantages, metrics = update_critic(group, trajectories, minibatches, config.algorithm)
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
