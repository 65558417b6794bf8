"""InferenceGroup: log-probabilities under the reference model."""

from __future__ import annotations

import os
from typing import Any

from rlinf.scheduler import Worker

from searchr1.cluster import channels
from searchr1.cluster.failure import reported
from searchr1.config.schema import Config
from searchr1.device import Device


class InferenceWorker(Worker):
    """One rank of the reference model."""

    def __init__(self, config: Config, device: Device, channel: Any) -> None:
        super().__init__()
        self._config = config
        self._device = device
        self._channel = channel
        os.environ.update(device.worker_env("inference", self._world_size))

    @reported
    async def start(self) -> None:
        """Load the reference model: the weights that training started from."""
        import torch

        from searchr1.learner.policy import ScoringModel

        # Ray starts workers with one OpenMP thread.
        torch.set_num_threads(self._device.threads_for("inference", self._world_size))
        self._model = ScoringModel.start_reference(self._config, self._device)

    @reported
    async def score(self) -> int:
        """Fill in `ref_logprobs` of every chunk until the batch's end. Returns the number of trajectories."""
        timeout = self._config.runner.step_timeout_s
        count = 0
        key = channels.scored_key(self._rank)
        while (chunk := await channels.get(self._channel, key, timeout)) is not None:
            logprobs = self._model.logprobs(chunk.trajectories)
            for trajectory, ref_logprobs in zip(chunk.trajectories, logprobs, strict=True):
                trajectory.ref_logprobs = ref_logprobs
            count += len(chunk.trajectories)
            if chunk.trajectories:
                await channels.put(self._channel, chunk, channels.FINISHED, timeout)
        self._device.empty_cache()  # the actor on the same GPU trains next
        return count
