"""Start the worker groups on a cluster, call them, and report their failures."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from searchr1.cluster import channels
from searchr1.cluster.failure import WorkerError, unwrap
from searchr1.cluster.lifetime import Lifetime, lifetime
from searchr1.cluster.ray_start import own_ray
from searchr1.config.layout import describe_device, group_ranks, shares_gpus, visible_gpus
from searchr1.config.schema import Config
from searchr1.device import Device
from searchr1.rollout.shared_memory import weight_folders

POLL_SECONDS = 0.005
START_TIMEOUT_S = 900.0


class Call:
    """A method running on all ranks of a group."""

    def __init__(self, result: Any, name: str) -> None:
        self._result = result
        self._name = name
        self._started = time.perf_counter()
        self.seconds = 0.0
        """Wall time until `wait` returned."""

    @property
    def done(self) -> bool:
        """Whether every rank has answered."""
        return bool(self._result.done())

    def wait(self, timeout_s: float) -> list[Any]:
        """The results of all ranks.

        Raises:
            UserError, WorkerError: a rank failed, or did not answer within `timeout_s`.
        """
        while not self.done:
            if time.perf_counter() - self._started > timeout_s:
                raise WorkerError(
                    f"{self._name} did not finish within {timeout_s:.0f} s (runner.step_timeout_s); "
                    "raise it if the work is really that long"
                )
            time.sleep(POLL_SECONDS)
        self.seconds = time.perf_counter() - self._started
        return unwrap(self._result.wait(), self._name)


class Group:
    """One worker group: `group.call("method", …)` runs it on all ranks."""

    def __init__(self, handle: Any, name: str, size: int) -> None:
        self._handle = handle
        self.name = name
        self.size = size

    def call(self, method: str, *args: Any) -> Call:
        """Start `method` on every rank."""
        return Call(getattr(self._handle, method)(*args), f"{self.name}.{method}")


class Groups:
    """The groups of one run and the channel between them. Use `launch` as a context manager."""

    def __init__(self, config: Config, device: Device, optimizer_steps: int | None, run: Lifetime) -> None:
        from rlinf.scheduler import Channel, Cluster

        from searchr1.cluster.actor_worker import ActorWorker
        from searchr1.cluster.critic_worker import CriticWorker
        from searchr1.cluster.gpu_placement import without_gpus
        from searchr1.cluster.inference_worker import InferenceWorker
        from searchr1.cluster.reward_worker import RewardWorker
        from searchr1.cluster.rollout_worker import RolloutWorker

        self._config = config
        self._device = device
        self._gpus = visible_gpus(device, os.environ) if device.is_cuda else []
        # Ray's workers inherit the driver's environment; some of it must be there before they import torch.
        for name, value in device.driver_env().items():
            os.environ.setdefault(name, value)
        with run.starting_ray(), own_ray(config.cluster.num_nodes):
            self._cluster = Cluster(num_nodes=config.cluster.num_nodes)
        with without_gpus(self._cluster):
            self.channel: Any = Channel.create(channels.CHANNEL)
        training = optimizer_steps is not None
        self.shares_gpus = training and shares_gpus(config, device)
        """Whether engines hand their memory to the other groups in between (`sleep_engines`)."""
        with_reference = training and config.algorithm.kl_beta > 0
        inference_ranks = len(group_ranks(config, "inference", device)) if with_reference else 0
        self.rollout = self._launch("rollout", RolloutWorker, config, device, self.channel, self.shares_gpus)
        self.reward = self._launch("reward", RewardWorker, config, self.channel, inference_ranks)
        self.inference: Group | None = None
        self.actor: Group | None = None
        if with_reference:
            self.inference = self._launch("inference", InferenceWorker, config, device, self.channel)
        self.critic: Group | None = None
        if training and config.critic.use_critic_model:
            self.critic = self._launch("critic", CriticWorker, config, device, self.channel, optimizer_steps)
        if training:
            self.actor = self._launch("actor", ActorWorker, config, device, self.channel, optimizer_steps)

    def start(self) -> None:
        """Load everything: all groups at once, or the engines before the groups that share their GPUs.

        An engine takes what is free beside its share of the GPU for its KV cache, and stops if that changes while it
        measures. Engines that share are asleep afterwards: what happens before the first rollout is not theirs either.
        """
        others = [g for g in (self.reward, self.inference, self.critic, self.actor) if g is not None]
        together = [self.rollout, *others]
        if self.shares_gpus:
            _start([self.rollout])
            self.sleep_engines(START_TIMEOUT_S)
            together = others
        _start(together)

    def sleep_engines(self, timeout_s: float) -> None:
        """Let the other groups have the engines' memory, where they share GPUs."""
        if self.shares_gpus:
            self.rollout.call("sleep").wait(timeout_s)

    def wake_engines(self, tag: str, timeout_s: float) -> None:
        """Give the engines the memory of their weights or of their KV cache back (names in `rollout/backend.py`)."""
        if self.shares_gpus:
            self.rollout.call("wake", (tag,)).wait(timeout_s)

    def _launch(self, component: str, worker: Any, *args: Any) -> Group:
        from rlinf.scheduler import NodePlacementStrategy

        from searchr1.cluster.gpu_placement import gpu_placement, without_gpus

        ranks = group_ranks(self._config, component, self._device)
        name = getattr(self._config, component).group_name
        on_gpus = self._device.is_cuda and component != "reward"
        strategy: Any = NodePlacementStrategy([0] * len(ranks))
        if on_gpus:
            strategy = gpu_placement(self._cluster, ranks, self._gpus)
        with nullcontext() if on_gpus else without_gpus(self._cluster):
            handle = worker.create_group(*args).launch(
                self._cluster, placement_strategy=strategy, name=name, catch_system_failure=False
            )
        return Group(handle, name, len(ranks))


def _start(groups: list[Group]) -> None:
    """Load all of these at once."""
    for call in [group.call("start") for group in groups]:
        call.wait(START_TIMEOUT_S)


@contextmanager
def launch(config: Config, device: Device, optimizer_steps: int | None = None) -> Iterator[Groups]:
    """Start all groups, and end them however the block ends.

    Args:
        config: of the run.
        device: where the groups run.
        optimizer_steps: of the whole training; None is an evaluation, which has neither actor nor inference group.

    Raises:
        WorkerDied: a process of the run has died.
    """
    for name in ("NodePlacementStrategy", "OrderedPlacement"):  # they reset their own level
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.WARNING)
    kind = "training" if optimizer_steps is not None else "evaluation"
    print(f"starting {kind} groups on {describe_device(device, os.environ)}", flush=True)
    with lifetime(config.cluster.num_nodes, weight_folders(config.runner.output_dir)) as run:
        groups = Groups(config, device, optimizer_steps, run)
        groups.start()
        yield groups
