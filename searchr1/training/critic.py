"""The critic's part of a step: values, advantages from them, and its own training."""

from __future__ import annotations

from typing import Any

from searchr1.agent.trajectory import Trajectory
from searchr1.cluster import channels
from searchr1.cluster.critic_worker import CriticTargets
from searchr1.cluster.groups import Group
from searchr1.config.layout import critic_layout
from searchr1.config.schema import Config
from searchr1.learner.packing import sequence_length, split_balanced
from searchr1.training.advantages import Advantage, assign_token_credit


def train_critic(
    critic: Group, channel: Any, trajectories: list[Trajectory], minibatch_ids: list[int], config: Config
) -> tuple[list[Advantage], dict[str, float]]:
    """Advantages from the critic as it was, which is then trained on the same trajectories. Also its metrics."""
    timeout_s = config.runner.step_timeout_s
    replicas = critic_layout(config, critic.size).data_parallel
    shares = split_balanced([sequence_length(t) for t in trajectories], replicas)
    for replica, share in enumerate(shares):
        channel.put([trajectories[i] for i in share], key=channels.critic_key(replica))
    # The replicas' first ranks answer, which are in the replicas' order.
    found = [given for given in critic.call("values").wait(timeout_s) if given is not None]
    values: list[Any] = [None] * len(trajectories)
    for share, given in zip(shares, found, strict=True):
        for index, array in zip(share, given, strict=True):
            values[index] = array
    advantages, returns = assign_token_credit(trajectories, config.algorithm, values)
    for replica, share in enumerate(shares):
        targets = CriticTargets([returns[i] for i in share], [minibatch_ids[i] for i in share])
        channel.put(targets, key=channels.critic_key(replica))
    metrics: dict[str, float] = critic.call("train_step").wait(timeout_s)[0]
    return list(advantages), metrics
