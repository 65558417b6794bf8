"""CriticGroup: values of states, for PPO."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlinf.scheduler import Worker

from searchr1.agent.trajectory import Trajectory
from searchr1.cluster import channels
from searchr1.cluster.failure import reported
from searchr1.config.schema import Config
from searchr1.device import Device


@dataclass(slots=True)
class CriticTargets:
    """What the values of a data-parallel rank's trajectories should have been. All arrays are response-aligned."""

    returns: list[Any]
    minibatch_ids: list[int]


class CriticWorker(Worker):
    """One rank of the critic."""

    def __init__(self, config: Config, device: Device, channel: Any, optimizer_steps: int) -> None:
        super().__init__()
        self._config = config
        self._device = device
        self._channel = channel
        self._optimizer_steps = optimizer_steps
        os.environ.update(device.worker_env("actor", self._world_size))

    @reported
    async def start(self) -> None:
        """Join the process group and load the critic and its optimizer."""
        import torch

        from searchr1.learner.critic import Critic

        # Ray starts workers with one OpenMP thread.
        torch.set_num_threads(self._device.threads_for("actor", self._world_size))
        self._critic = Critic.start(self._config, self._device, self._optimizer_steps)
        self._leave_gpu()

    @reported
    async def values(self) -> list[Any] | None:
        """Take this data-parallel rank's share of a step and keep it for `train_step`. The leader returns its values."""
        self._trajectories: list[Trajectory] = await self._share()
        self._values = self._critic.values(self._trajectories)
        self._device.empty_cache()
        return self._values if self._critic.is_dp_leader else None

    @reported
    async def train_step(self) -> dict[str, float]:
        """Train on the share that `values` has seen. Returns metrics of all ranks."""
        targets: CriticTargets = await self._share()
        metrics = self._critic.train_step(self._trajectories, targets.returns, self._values, targets.minibatch_ids)
        self._device.empty_cache()
        return metrics

    async def _share(self) -> Any:
        timeout_s = self._config.runner.step_timeout_s
        return await channels.get_share(self._channel, self._critic, channels.critic_key, timeout_s)

    @reported
    async def save(self, folder: Path, in_background: bool) -> None:
        """Write this rank's part of a checkpoint into `folder`, or begin to."""
        self._critic.save(folder, in_background)
        self._leave_gpu()

    @reported
    async def finish_save(self) -> None:
        """Wait until a save in the background has been written."""
        self._critic.finish_save()

    @reported
    async def load(self, folder: Path) -> None:
        """Continue from a checkpoint, which the runner has verified."""
        self._critic.load(folder, verified=True)
        self._leave_gpu()

    def _leave_gpu(self) -> None:
        """As far as `actor.offload_…` says so."""
        self._critic.offload("weight", "grad", "optimizer")
        self._device.empty_cache()
