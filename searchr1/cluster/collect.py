"""Questions in, scored rollouts out, as they finish."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from searchr1.agent.settings import AgentSettings
from searchr1.agent.trajectory import Mode, Sample, Trajectory
from searchr1.cluster import channels
from searchr1.cluster.launch import EvaluationCluster
from searchr1.cluster.rollout_worker import RolloutReport
from searchr1.cluster.worker_group import POLL_SECONDS, Call
from searchr1.errors import UserError

TAKE_SECONDS = 0.1
"""How often the queue of what is finished is looked at."""


@dataclass(frozen=True, slots=True)
class RolloutStats:
    """How a collection went: seconds of each phase (what a later phase took beyond the earlier one's end), and counts."""

    rollout_seconds: float
    """Until the last rollout was finished."""
    reward_seconds: float
    """From then until the last one was scored."""
    reference_seconds: float
    """From then until the last one had its reference log-probabilities."""
    generated_tokens: int
    search_retries: int
    search_opens: int
    engine_busy_share: float
    """Share of the rollout during which the engines had something to do, mean over ranks."""

    def followed_by(self, other: RolloutStats) -> RolloutStats:
        """Return the statistics of both collections as of one that took their time together."""
        seconds = self.rollout_seconds + other.rollout_seconds
        busy = self.engine_busy_share * self.rollout_seconds + other.engine_busy_share * other.rollout_seconds
        return RolloutStats(
            rollout_seconds=seconds,
            reward_seconds=self.reward_seconds + other.reward_seconds,
            reference_seconds=self.reference_seconds + other.reference_seconds,
            generated_tokens=self.generated_tokens + other.generated_tokens,
            search_retries=self.search_retries + other.search_retries,
            search_opens=self.search_opens + other.search_opens,
            engine_busy_share=busy / max(seconds, 1e-9),
        )

    def metrics(self) -> dict[str, float]:
        """Return the seconds of each phase and the rollout's speed, for the log."""
        return {
            "time/rollout": self.rollout_seconds,
            "time/reward": self.reward_seconds,
            "time/reference": self.reference_seconds,
            "rollout/tokens_per_second": self.generated_tokens / max(self.rollout_seconds, 1e-9),
            "rollout/engine_busy": self.engine_busy_share,
            "tool/retries": float(self.search_retries),
            "tool/server_rests": float(self.search_opens),
        }


class Collection:
    """Iterate once over the scored rollouts of some questions: whole groups, several at a time, as they finish.

    Finished groups stream through reward and inference while others are still being generated, and come out within about
    half a second.

    Args:
        cluster: what answers and scores.
        samples: the questions, split evenly over the rollout ranks.
        step: of the training.
        mode: "train" or "eval"; training rollouts get their reference log-probabilities where there is a reference model.
        group_size: rollouts of each question.
        seed: of all rollouts; a question's answers depend on it and on nothing else that is under way.
        settings: of the rollouts, in place of the mode's.
        in_flight: groups under way at once on each rank. With it there is no limit for the whole, but
            `runner.step_timeout_s` until the next group is finished; without it all groups begin at once and all have
            `runner.step_timeout_s` together.

    Raises:
        UserError, WorkerError: a worker group failed, or took too long. In an evaluation what had been finished comes
            before a UserError.
    """

    def __init__(
        self,
        cluster: EvaluationCluster,
        samples: Sequence[Sample],
        *,
        step: int,
        mode: Mode,
        group_size: int,
        seed: int,
        settings: AgentSettings | None = None,
        in_flight: int | None = None,
    ) -> None:
        self._channel = cluster.channel
        self._timeout_s = cluster.timeout_s
        self._has_window = in_flight is not None
        self._mode = mode
        self._expected = len(samples) * group_size
        self._received = 0
        self._reward = cluster.reward
        self._inference = cluster.inference if mode == "train" else None
        self._rolling = cluster.rollout.rollout(
            samples, step=step, mode=mode, group_size=group_size, seed=seed, settings=settings, in_flight=in_flight
        )
        self._scoring = self._reward.score()
        self._referencing = self._inference.score() if self._inference is not None else None
        self._progress_at = time.monotonic()
        self._taken_at = 0.0
        self._reports: list[RolloutReport] = []

    def __iter__(self) -> Iterator[list[Trajectory]]:
        """Yield finished groups."""
        rolling, scoring, referencing = self._rolling, self._scoring, self._referencing
        try:
            yield from self._while_running(rolling, [scoring, *([referencing] if referencing else [])])
            self._reports = rolling.wait()
        except UserError:
            if self._mode == "eval":
                self._reward.end_batch()
                yield from self._while_running(scoring)
                yield from self._take()
            raise
        self._reward.end_batch()
        yield from self._while_running(scoring, [referencing] if referencing else [])
        scoring.wait()
        if self._inference is not None and referencing is not None:
            self._inference.end_batch()
            yield from self._while_running(referencing)
            referencing.wait()
        yield from self._take()
        if self._received != self._expected:
            raise RuntimeError(f"{self._received} rollouts came back, {self._expected} were asked for")

    def stats(self) -> RolloutStats:
        """Return how it went, once everything has come."""
        reports, rollout_seconds = self._reports, self._rolling.seconds
        reward_seconds = max(self._scoring.seconds - rollout_seconds, 0.0)
        reference_seconds = 0.0
        if self._referencing is not None:
            reference_seconds = max(self._referencing.seconds - rollout_seconds - reward_seconds, 0.0)
        return RolloutStats(
            rollout_seconds=rollout_seconds,
            reward_seconds=reward_seconds,
            reference_seconds=reference_seconds,
            generated_tokens=sum(report.generated_tokens for report in reports),
            search_retries=sum(report.search_retries for report in reports),
            search_opens=sum(report.search_opens for report in reports),
            engine_busy_share=sum(report.engine_busy_seconds / report.seconds for report in reports) / len(reports),
        )

    def _while_running(self, call: Call[Any], open_ended: Sequence[Call[Any]] = ()) -> Iterator[list[Trajectory]]:
        """Yield what is finished until a call is done.

        Args:
            call: to wait for.
            open_ended: calls whose end has not been asked for: one that is done has failed, and nothing would come of it.
        """
        while not call.done:
            if time.monotonic() - self._taken_at >= TAKE_SECONDS:
                yield from self._take()
            for other in open_ended:
                if other.done:
                    other.wait()
            if not self._has_window:
                call.require_time()
            elif time.monotonic() - self._progress_at > self._timeout_s:
                raise UserError(
                    f"no question was finished for {self._timeout_s:.0f} s (runner.step_timeout_s); raise it if one rollout "
                    "really takes that long"
                )
            time.sleep(POLL_SECONDS)

    def _take(self) -> Iterator[list[Trajectory]]:
        for _ in range(self._channel.qsize(key=channels.FINISHED)):
            trajectories: list[Trajectory] = self._channel.get(key=channels.FINISHED).trajectories
            self._received += len(trajectories)
            self._progress_at = time.monotonic()
            yield trajectories
        self._taken_at = time.monotonic()


@dataclass(frozen=True, slots=True)
class Batch:
    """All rollouts of some questions, sorted by question and `rollout_id`: the order in which they finished is gone."""

    trajectories: list[Trajectory]
    stats: RolloutStats
    refills: int = 0
    """How often further questions were asked (`training/dynamic_sampling.py`)."""
    groups_replaced: int = 0
    asked: dict[str, float] = field(default_factory=dict)
    """Metrics of all groups that were asked, before any was replaced."""

    def metrics(self) -> dict[str, float]:
        """Return speed and refills, for the log."""
        refills = {"rollout/refills": float(self.refills), "rollout/groups_replaced": float(self.groups_replaced)}
        return self.stats.metrics() | refills | self.asked


def collect_batch(
    cluster: EvaluationCluster, samples: Sequence[Sample], *, step: int, mode: Mode, group_size: int, seed: int
) -> Batch:
    """Wait for all rollouts of some questions; arguments and errors as of `Collection`."""
    collection = Collection(cluster, samples, step=step, mode=mode, group_size=group_size, seed=seed)
    trajectories = [trajectory for finished in collection for trajectory in finished]
    trajectories.sort(key=lambda trajectory: (trajectory.sample.index, trajectory.rollout_id))
    return Batch(trajectories, collection.stats())
