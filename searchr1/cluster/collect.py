"""One batch through the groups: questions in, scored trajectories out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from searchr1.agent.trajectory import Mode, Sample, Trajectory
from searchr1.cluster import channels
from searchr1.cluster.groups import Groups


@dataclass(slots=True)
class Batch:
    """All trajectories of one step, sorted by question and rollout: the order in which they finished is gone."""

    trajectories: list[Trajectory]
    rollout_seconds: float
    """Until the last trajectory was finished."""
    reward_seconds: float
    """From then until the last one was scored."""
    reference_seconds: float
    """From then until the last one had its reference log-probabilities."""
    generated_tokens: int
    search_retries: int
    search_rests: int
    engine_busy_share: float
    """Share of the rollout during which the engines had something to do, mean over ranks."""

    def followed_by(self, other: Batch) -> Batch:
        """Both as one that was collected in their time together; `other`'s questions must be renumbered by the caller."""
        seconds = self.rollout_seconds + other.rollout_seconds
        busy = self.engine_busy_share * self.rollout_seconds + other.engine_busy_share * other.rollout_seconds
        return Batch(
            trajectories=self.trajectories + other.trajectories,
            rollout_seconds=seconds,
            reward_seconds=self.reward_seconds + other.reward_seconds,
            reference_seconds=self.reference_seconds + other.reference_seconds,
            generated_tokens=self.generated_tokens + other.generated_tokens,
            search_retries=self.search_retries + other.search_retries,
            search_rests=self.search_rests + other.search_rests,
            engine_busy_share=busy / max(seconds, 1e-9),
        )

    def metrics(self) -> dict[str, float]:
        """Seconds of each phase (what a later phase took beyond the earlier one's end) and the rollout's speed."""
        return {
            "time/rollout": self.rollout_seconds,
            "time/reward": self.reward_seconds,
            "time/reference": self.reference_seconds,
            "rollout/tokens_per_second": self.generated_tokens / max(self.rollout_seconds, 1e-9),
            "rollout/engine_busy": self.engine_busy_share,
            "tool/retries": float(self.search_retries),
            "tool/server_rests": float(self.search_rests),
        }


def collect(
    groups: Groups, samples: list[Sample], *, step: int, mode: Mode, group_size: int, seed: int, timeout_s: float
) -> Batch:
    """Answer `samples`, `group_size` times each.

    Finished groups stream through reward and inference while others are still being generated; nothing waits for a
    whole batch but the end of this function.

    Raises:
        UserError, WorkerError: a group failed.
    """
    channel = groups.channel
    ranks = groups.rollout.size
    for rank in range(ranks):
        channel.put(samples[rank::ranks], key=channels.prompts_key(rank))
    rollout = groups.rollout.call("rollout", step, mode, group_size, seed)
    reward = groups.reward.call("score")
    inference = groups.inference.call("score") if groups.inference is not None and mode == "train" else None

    reports = rollout.wait(timeout_s)
    for _ in range(groups.reward.size):
        channel.put(None, key=channels.ROLLOUTS)
    reward.wait(timeout_s)
    if inference is not None and groups.inference is not None:
        for rank in range(groups.inference.size):
            channel.put(None, key=channels.scored_key(rank))
        inference.wait(timeout_s)
    channel.put(None, key=channels.FINISHED)
    trajectories = _drain(channel)

    expected = len(samples) * group_size
    if len(trajectories) != expected:
        raise RuntimeError(f"{len(trajectories)} trajectories came back, {expected} went out")
    trajectories.sort(key=lambda t: (t.sample.index, t.rollout_id))
    reward_end = max(reward.seconds - rollout.seconds, 0.0)
    return Batch(
        trajectories=trajectories,
        rollout_seconds=rollout.seconds,
        reward_seconds=reward_end,
        reference_seconds=max(inference.seconds - rollout.seconds - reward_end, 0.0) if inference else 0.0,
        generated_tokens=sum(report.generated_tokens for report in reports),
        search_retries=sum(report.search_retries for report in reports),
        search_rests=sum(report.search_rests for report in reports),
        engine_busy_share=sum(report.engine_busy_seconds / report.seconds for report in reports) / len(reports),
    )


def _drain(channel: Any) -> list[Trajectory]:
    trajectories: list[Trajectory] = []
    while (chunk := channel.get(key=channels.FINISHED)) is not None:
        trajectories.extend(chunk.trajectories)
    return trajectories
