"""The critic's part of a step: values, advantages from them, and its own training."""

from __future__ import annotations

from collections.abc import Sequence

from searchr1.agent.trajectory import Trajectory
from searchr1.cluster.critic_worker import CriticGroup
from searchr1.config.schema import AlgorithmConfig
from searchr1.training.advantages import Advantage, compute_token_advantages


def update_critic(
    critic: CriticGroup, trajectories: Sequence[Trajectory], minibatch_ids: Sequence[int], algorithm: AlgorithmConfig
) -> tuple[list[Advantage], dict[str, float]]:
    """Train the critic on a step's trajectories. Return their advantages from the critic as it was, and its metrics."""
    shares = critic.shares(trajectories)
    values = critic.values(trajectories, shares)
    advantages, returns = compute_token_advantages(trajectories, algorithm, values)
    metrics = critic.train_step(returns, minibatch_ids, shares).wait()[0]
    return list(advantages), metrics
