"""DAPO's dynamic sampling: groups without reward variance give no gradient and are replaced by groups of new questions.

https://arxiv.org/abs/2503.14476, section 3.2. `algorithm.max_refills` bounds how often a step asks again; 0 turns it off.
What is still missing then is made up with groups without reward variance, so that a batch always has the same size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from searchr1.agent.trajectory import Trajectory
from searchr1.cluster.collect import Batch


@dataclass(slots=True)
class _Pool:
    varied: list[list[Trajectory]] = field(default_factory=list)
    uniform: list[list[Trajectory]] = field(default_factory=list)

    def add(self, trajectories: Sequence[Trajectory]) -> None:
        for group in groups_of(trajectories):
            (self.varied if has_reward_variance(group) else self.uniform).append(group)

    def metrics(self) -> dict[str, float]:
        """Return metrics of all groups: a batch's own look the same however the policy does, because only groups with
        reward variance are in it.
        """
        groups = self.varied + self.uniform
        rewards = [trajectory.reward for group in groups for trajectory in group]
        return {
            "rollout/asked_reward": sum(rewards) / len(rewards),
            "rollout/asked_uniform_groups": len(self.uniform) / len(groups),
        }


def replace_uniform_groups(batch: Batch, rollout: Callable[[int], Batch], max_refills: int) -> Batch:
    """Return a batch of as many questions, in which groups without reward variance are replaced as far as possible.

    Args:
        batch: of a step.
        rollout: number of the refill -> the scored rollouts of as many further questions.
        max_refills: at most so many times.
    """
    pool, refills, stats = _Pool(), 0, batch.stats
    pool.add(batch.trajectories)
    questions = len(pool.varied) + len(pool.uniform)
    while len(pool.varied) < questions and refills < max_refills:
        refills += 1
        more = rollout(refills)
        pool.add(more.trajectories)
        stats = stats.followed_by(more.stats)
    if refills == 0:
        return replace(batch, asked=pool.metrics())
    chosen = (pool.varied + pool.uniform)[:questions]
    kept_uniform = max(0, questions - len(pool.varied))
    # Two batches may have numbered different questions alike.
    renumbered = [
        replace(trajectory, sample=replace(trajectory.sample, index=index))
        for index, group in enumerate(chosen)
        for trajectory in group
    ]
    return Batch(renumbered, stats, refills, len(pool.uniform) - kept_uniform, pool.metrics())


def groups_of(trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
    """Return the rollouts of each question together, in the order given."""
    groups: dict[int, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.sample.index, []).append(trajectory)
    return list(groups.values())


def has_reward_variance(group: Sequence[Trajectory]) -> bool:
    """Return whether the rollouts' rewards differ."""
    return any(trajectory.reward != group[0].reward for trajectory in group)
