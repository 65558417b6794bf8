"""DAPO's dynamic sampling: groups whose attempts all got the same reward teach nothing and are replaced by new questions.

https://arxiv.org/abs/2503.14476, section 3.2. `algorithm.max_refills` bounds how often a step asks again; 0 turns it off.
What is still missing then is made up with groups without spread, so that a batch always has the same size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from searchr1.agent.trajectory import Sample, Trajectory
from searchr1.cluster.collect import Batch

Collect = Callable[[list[Sample], int], Batch]
"""(questions, number of the refill) -> their scored trajectories."""


@dataclass(slots=True)
class Filled:
    """A batch of `groups` questions, and how it came about."""

    batch: Batch
    refills: int = 0
    dropped: int = 0
    """Groups without spread that were replaced."""
    asked: dict[str, float] = field(default_factory=dict)
    """Metrics of all groups that were asked, before any was replaced: the batch's own look the same however the policy
    does, because only groups with spread are in it. Empty if none may be replaced."""

    def metrics(self) -> dict[str, float]:
        """For the log."""
        return {"rollout/refills": float(self.refills), "rollout/groups_replaced": float(self.dropped)} | self.asked


@dataclass(slots=True)
class _Pool:
    useful: list[list[Trajectory]] = field(default_factory=list)
    equal: list[list[Trajectory]] = field(default_factory=list)

    def add(self, trajectories: list[Trajectory]) -> None:
        for group in groups_of(trajectories):
            (self.useful if has_spread(group) else self.equal).append(group)

    def metrics(self) -> dict[str, float]:
        groups = self.useful + self.equal
        rewards = [trajectory.reward for group in groups for trajectory in group]
        return {
            "rollout/asked_reward": sum(rewards) / len(rewards),
            "rollout/asked_uniform_groups": len(self.equal) / len(groups),
        }


def collect_with_spread(next_batch: Callable[[], list[Sample]], collect: Collect, max_refills: int) -> Filled:
    """Collect a batch, and again as long as groups without spread are in it and refills are left."""
    samples = next_batch()
    batch = collect(samples, 0)
    pool, refills = _Pool(), 0
    pool.add(batch.trajectories)
    while len(pool.useful) < len(samples) and refills < max_refills:
        refills += 1
        more = collect(next_batch(), refills)
        pool.add(more.trajectories)
        batch = batch.followed_by(more)
    asked = pool.metrics() if max_refills > 0 else {}
    if refills == 0:
        return Filled(batch, asked=asked)
    chosen = (pool.useful + pool.equal)[: len(samples)]
    kept_equal = max(0, len(samples) - len(pool.useful))
    # Two batches may have numbered different questions alike.
    renumbered = [
        replace(trajectory, sample=replace(trajectory.sample, index=index))
        for index, group in enumerate(chosen)
        for trajectory in group
    ]
    return Filled(replace(batch, trajectories=renumbered), refills, len(pool.equal) - kept_equal, asked)


def groups_of(trajectories: list[Trajectory]) -> list[list[Trajectory]]:
    """Attempts at one question together, in the order given."""
    groups: dict[int, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.sample.index, []).append(trajectory)
    return list(groups.values())


def has_spread(group: list[Trajectory]) -> bool:
    """Whether the attempts' rewards differ."""
    return any(trajectory.reward != group[0].reward for trajectory in group)
