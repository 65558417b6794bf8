"""From a run's first process to its last: what is started with it, who watches it, and how all of it ends."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from searchr1.cluster import ray_start, rlinf_compat
from searchr1.cluster.deaths import NOTICE_SECONDS, Watcher, death_by_ray
from searchr1.cluster.failure import WorkerError
from searchr1.cluster.guardian import Guardian
from searchr1.cluster.processes import Family, end_all, marked
from searchr1.rollout.shared_memory import PREFIX, remove_abandoned
from searchr1.shutdown import ended_at_once, is_stopping

RAY_SECONDS = 15.0
SILENT_RAY_SECONDS = 1.0
"""Ray may take to shut down. If its GCS is dead or stopped it would wait 7 s and more for an answer."""
FOREIGN_RAY_SECONDS = 5.0
WAITS_SECONDS = 2.0
"""Threads that wait for calls may take to leave Ray."""
PATIENCE_SECONDS, GRACE_SECONDS = 1.0, 4.0


class Lifetime:
    """The processes of one run, and their end. Use `lifetime`."""

    def __init__(self, owns_ray: bool, weight_folders: Sequence[Path]) -> None:
        self._run_id = uuid.uuid4().hex
        self._owns_ray = owns_ray
        self._weight_folders = weight_folders
        self._guardian = Guardian(self._run_id, weight_folders) if owns_ray else None
        self._failures: list[BaseException] = []
        self._waits: rlinf_compat.Waits | None = None
        self._family = Family(self._run_id)
        self._watcher = Watcher(self._family, rlinf_compat.logs_folder, lambda: os.kill(os.getpid(), signal.SIGUSR1))

    @contextmanager
    def starting_ray(self) -> Iterator[None]:
        """Make what is started in the block a part of the run, and wake this process when a part of it dies."""
        self._waits = rlinf_compat.report_failures(self._failures)
        with (
            rlinf_compat.own_failure_handler(self._died),
            rlinf_compat.own_sigterm_handler(self._ray_is_up),
            marked(self._run_id) if self._owns_ray else nullcontext(),
        ):
            yield

    def _ray_is_up(self) -> None:
        if self._owns_ray:
            self._watcher.start()

    def end(self) -> None:
        """End all processes of the run, and remove what they left in shared memory."""
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if self._owns_ray:
            self._watcher.stop()
        if self._waits is not None:
            self._waits.end(WAITS_SECONDS)
        stopped = any(stat.state == "T" for stat in self._family.members.values())
        if self._watcher.ray_is_dead or stopped:
            end_all(self._family, patience_s=0.0, grace_s=1.0)  # the raylet would wait for its GCS
            ray_start.shut_down(SILENT_RAY_SECONDS)
        else:
            ray_start.shut_down(RAY_SECONDS)
        if self._owns_ray:
            end_all(self._family, patience_s=PATIENCE_SECONDS, grace_s=GRACE_SECONDS)
        self._remove_weights()
        if self._guardian is not None:
            self._guardian.dismiss()

    def _remove_weights(self) -> None:
        # A Ray that is not ours ends our workers, and with them their locks, some time after we have left it.
        deadline = time.monotonic() + (0.0 if self._owns_ray else FOREIGN_RAY_SECONDS)
        while True:
            for folder in self._weight_folders:
                remove_abandoned(folder)
            if time.monotonic() >= deadline or not any(any(f.glob(f"{PREFIX}*")) for f in self._weight_folders):
                return
            time.sleep(0.2)

    def kill(self) -> None:
        """End all processes of the run at once, when there is no time to ask them. The guardian removes what they left."""
        if self._owns_ray:
            end_all(Family(self._run_id), patience_s=0.0, grace_s=0.0)

    def explain(self, error: BaseException | None) -> Exception | None:
        """Return the death behind an error, as one sentence; None if no process has died.

        Ray, and processes that were connected with the one that died, may notice before the watcher does.
        """
        from ray.exceptions import OutOfMemoryError, RayActorError, RayError

        death = self._watcher.death(NOTICE_SECONDS) if self._owns_ray else None
        if death is not None:
            return death
        if error is None or isinstance(error, (RayActorError, OutOfMemoryError)):
            return death_by_ray(str(error), rlinf_compat.logs_folder())
        return WorkerError(f"a call of a worker group failed: {error}") if isinstance(error, RayError) else None

    def _died(self, signum: int, frame: object) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        # Whoever ends all processes of a job ends this one too, and that is then the reason: `Stopped` is raised here.
        time.sleep(0.2)
        if is_stopping():
            return
        error = self.explain(self._failures[0] if self._failures else None)
        raise error if error is not None else WorkerError(f"a call of a worker group failed: {self._failures[0]!r}")


@contextmanager
def lifetime(num_nodes: int, weight_folders: Sequence[Path]) -> Iterator[Lifetime]:
    """Keep track of a run's processes in the block; all of them have ended after it.

    Args:
        num_nodes: of the cluster.
        weight_folders: in which weights are published.
    """
    from ray.exceptions import RayError

    run = Lifetime(ray_start.is_own(num_nodes), weight_folders)
    try:
        with ended_at_once(run.kill):
            yield run
    except (RayError, WorkerError) as error:
        death = run.explain(error)
        if death is None:
            raise
        raise death from None
    finally:
        run.end()
