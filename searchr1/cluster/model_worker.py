"""What the workers of actor, critic and reference model have in common."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from searchr1.cluster.failure import reported
from searchr1.cluster.rlinf_compat import Worker
from searchr1.config.schema import Config
from searchr1.device import Device

if TYPE_CHECKING:
    from searchr1.learner.trained import TrainedModel


class ModelWorker(Worker):
    """One rank of a model."""

    role: ClassVar[Literal["actor", "inference"]] = "actor"
    """Whose share of the machine's threads it gets."""

    def __init__(self, config: Config, device: Device, channel: Any) -> None:
        super().__init__()
        self._config = config
        self._device = device
        self._channel = channel
        os.environ.update(device.worker_env(self.role, self._world_size))

    @reported
    async def start(self) -> None:
        """Load the model."""
        import torch

        # Ray starts workers with one OpenMP thread.
        torch.set_num_threads(self._device.threads_for(self.role, self._world_size))
        self._load_model()

    def _load_model(self) -> None:
        raise NotImplementedError


class TrainedWorker(ModelWorker):
    """One rank of a model in training."""

    _model: TrainedModel

    def __init__(self, config: Config, device: Device, channel: Any, optimizer_steps: int) -> None:
        super().__init__(config, device, channel)
        self._optimizer_steps = optimizer_steps

    @reported
    async def save(self, folder: Path, in_background: bool) -> None:
        """Write this rank's part of a checkpoint into `folder`, or begin to."""
        self._model.save(folder, in_background)
        self._leave_gpu()

    @reported
    async def finish_save(self) -> None:
        """Wait until a save in the background has been written."""
        self._model.finish_save()

    @reported
    async def load(self, folder: Path) -> None:
        """Continue from a checkpoint, which the driver has verified."""
        self._model.load(folder, verified=True)
        self._leave_gpu()

    def _leave_gpu(self) -> None:
        """Free the GPU's memory as far as `actor.offload_…` asks for it."""
        self._model.offload("weight", "grad", "optimizer")
        self._device.empty_cache()
