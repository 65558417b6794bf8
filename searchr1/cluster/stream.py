"""Questions in, scored attempts out as they finish: an evaluation without batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from searchr1.agent.settings import AgentSettings
from searchr1.agent.trajectory import Sample, Trajectory
from searchr1.cluster import channels
from searchr1.cluster.groups import Call, Groups
from searchr1.cluster.rollout_worker import RolloutReport
from searchr1.errors import UserError

POLL_SECONDS = 0.1

Receive = Callable[[list[Trajectory]], None]


@dataclass(frozen=True, slots=True)
class Streamed:
    """How it went."""

    seconds: float
    generated_tokens: int
    engine_busy_share: float
    """Share of the time during which the engines had something to do, mean over ranks."""
    search_retries: int


def stream(
    groups: Groups,
    samples: Sequence[Sample],
    receive: Receive,
    *,
    group_size: int,
    seed: int,
    settings: AgentSettings,
    in_flight: int,
    timeout_s: float,
) -> Streamed:
    """Answer `samples`, `group_size` times each, and hand finished questions over within about half a second.

    Args:
        groups: that run.
        samples: split evenly over the rollout ranks.
        receive: called in this thread with whole groups.
        group_size: attempts at each question.
        seed: of all attempts; a question's answers depend on it and on nothing else that is under way.
        settings: of the attempts.
        in_flight: groups under way at once on each rank.
        timeout_s: how long it may take until the next question is finished.

    Raises:
        UserError, WorkerError: a group failed, or stood still; after a UserError what had been finished was handed over.
    """
    channel = groups.channel
    ranks = groups.rollout.size
    for rank in range(ranks):
        channel.put(list(samples[rank::ranks]), key=channels.prompts_key(rank))
    rollout = groups.rollout.call("rollout", 0, "eval", group_size, seed, settings, in_flight)
    reward = groups.reward.call("score")
    inbox = _Inbox(groups, receive, timeout_s)
    try:
        inbox.empty_until(rollout, scoring=reward)
        reports: list[RolloutReport] = rollout.wait(timeout_s)
    except UserError:
        inbox.empty_after(reward)
        raise
    inbox.empty_after(reward)
    reward.wait(timeout_s)
    if inbox.received != len(samples) * group_size:
        raise RuntimeError(f"{inbox.received} attempts came back, {len(samples) * group_size} were asked for")
    return Streamed(
        seconds=rollout.seconds,
        generated_tokens=sum(report.generated_tokens for report in reports),
        engine_busy_share=sum(report.engine_busy_seconds / report.seconds for report in reports) / len(reports),
        search_retries=sum(report.search_retries for report in reports),
    )


class _Inbox:
    """The queue of finished attempts, emptied while calls run."""

    def __init__(self, groups: Groups, receive: Receive, timeout_s: float) -> None:
        self._groups = groups
        self._receive = receive
        self._timeout_s = timeout_s
        self._last = time.monotonic()
        self.received = 0

    def empty_until(self, call: Call, scoring: Call | None = None) -> None:
        """Hand over what comes until the call is done.

        Args:
            call: to wait for.
            scoring: a call that has not been told to end yet: if it does, it has failed, and nothing would ever come.

        Raises:
            UserError, WorkerError: nothing came for too long, or the scoring failed.
        """
        while not call.done:
            self._take()
            if scoring is not None and scoring.done:
                scoring.wait(self._timeout_s)
            if time.monotonic() - self._last > self._timeout_s:
                raise UserError(
                    f"no question was finished for {self._timeout_s:.0f} s (runner.step_timeout_s); raise it if one attempt "
                    "really takes that long"
                )
            time.sleep(POLL_SECONDS)

    def empty_after(self, reward: Call) -> None:
        """Let the reward group score what it has got, and hand that over."""
        for _ in range(self._groups.reward.size):
            self._groups.channel.put(None, key=channels.ROLLOUTS)
        self.empty_until(reward)
        self._take()

    def _take(self) -> None:
        channel = self._groups.channel
        for _ in range(channel.qsize(key=channels.FINISHED)):
            trajectories = channel.get(key=channels.FINISHED).trajectories
            self._receive(trajectories)
            self.received += len(trajectories)
            self._last = time.monotonic()
