"""The driver's side of a worker group: start a method of the worker on every rank, and wait for what the ranks return."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from searchr1.agent.trajectory import Trajectory
from searchr1.cluster.failure import Failure, WorkerError, unwrap
from searchr1.cluster.model_worker import TrainedWorker
from searchr1.learner.packing import sequence_length, split_balanced

P = ParamSpec("P")
T = TypeVar("T")

POLL_SECONDS = 0.005
START_TIMEOUT_S = 900.0


class Call(Generic[T]):
    """A method that runs on all ranks of a worker group."""

    def __init__(self, result: Any, name: str, timeout_s: float) -> None:
        self._result = result
        self._timeout_s = timeout_s
        self._started = time.perf_counter()
        self.name = name
        self.seconds = 0.0
        """Wall time until `wait` returned."""

    @property
    def done(self) -> bool:
        """Whether every rank has returned."""
        return bool(self._result.done())

    def require_time(self, timeout_s: float | None = None) -> None:
        """Raise if the call has taken too long.

        Args:
            timeout_s: since it was made; None is the worker group's limit.

        Raises:
            WorkerError: it has.
        """
        limit = self._timeout_s if timeout_s is None else timeout_s
        if time.perf_counter() - self._started > limit:
            raise WorkerError(
                f"{self.name} did not finish within {limit:.0f} s (runner.step_timeout_s); "
                "raise it if the work is really that long"
            )

    def wait(self, timeout_s: float | None = None) -> list[T]:
        """Return what the ranks return, in their order.

        Args:
            timeout_s: since the call was made; None is the worker group's limit.

        Raises:
            UserError, WorkerError: a rank failed, or did not return in time.
        """
        while not self.done:
            self.require_time(timeout_s)
            time.sleep(POLL_SECONDS)
        self.seconds = time.perf_counter() - self._started
        return unwrap(self._result.wait(), self.name)


class WorkerGroup:
    """The ranks of one worker class; a subclass has a method for each method of its workers."""

    def __init__(self, handle: Any, name: str, size: int, channel: Any, timeout_s: float) -> None:
        """Wrap what RLinf has launched.

        Args:
            handle: RLinf's worker group.
            name: for messages.
            size: number of ranks.
            channel: the channel between all worker groups.
            timeout_s: limit of a call.
        """
        self._handle = handle
        self._channel = channel
        self._timeout_s = timeout_s
        self.name = name
        self.size = size

    def start(self) -> Call[None]:
        """Load what the workers need."""
        return Call(self._handle.start(), f"{self.name}.start", START_TIMEOUT_S)

    def call(
        self, method: Callable[Concatenate[Any, P], Awaitable[T | Failure]], *args: P.args, **kwargs: P.kwargs
    ) -> Call[T]:
        """Start a method of the worker class on every rank."""
        name = method.__name__
        return Call(getattr(self._handle, name)(*args, **kwargs), f"{self.name}.{name}", self._timeout_s)


class TrainedGroup(WorkerGroup):
    """The ranks of a model in training."""

    dp_size = 1
    """Number of data-parallel ranks."""

    def shares(self, trajectories: Sequence[Trajectory]) -> list[list[int]]:
        """Deal trajectories to the data-parallel ranks: the indexes of each one's share, about equal in tokens."""
        return split_balanced([sequence_length(trajectory) for trajectory in trajectories], self.dp_size)

    def save(self, folder: Path, in_background: bool) -> Call[None]:
        """Write a checkpoint into `folder`, or begin to."""
        return self.call(TrainedWorker.save, folder, in_background)

    def finish_save(self) -> Call[None]:
        """Complete a save in the background."""
        return self.call(TrainedWorker.finish_save)

    def load(self, folder: Path) -> Call[None]:
        """Continue from a checkpoint, which the driver has verified."""
        return self.call(TrainedWorker.load, folder)
