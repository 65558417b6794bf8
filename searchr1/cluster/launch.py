"""The worker groups of a run: start them, give their handles types, end them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from searchr1.cluster import channels
from searchr1.cluster.actor_worker import ActorGroup, ActorWorker
from searchr1.cluster.critic_worker import CriticGroup, CriticWorker
from searchr1.cluster.inference_worker import InferenceGroup, InferenceWorker
from searchr1.cluster.lifetime import lifetime
from searchr1.cluster.ray_start import own_ray
from searchr1.cluster.reward_worker import RewardGroup, RewardWorker
from searchr1.cluster.rlinf_compat import Channel, Cluster, NodePlacementStrategy, gpu_placement, without_gpus
from searchr1.cluster.rollout_worker import RolloutGroup, RolloutWorker
from searchr1.cluster.worker_group import START_TIMEOUT_S, WorkerGroup
from searchr1.config.layout import actor_layout, critic_layout, describe_device, group_ranks, shares_gpus, visible_gpus
from searchr1.config.schema import Config
from searchr1.device import Device
from searchr1.rollout.backend import KV_CACHE, WEIGHTS
from searchr1.rollout.shared_memory import weight_folders

G = TypeVar("G", bound=WorkerGroup)


class Launcher:
    """Launches worker groups on the slots that the configuration gives them."""

    def __init__(self, config: Config, device: Device, cluster: Any, channel: Any) -> None:
        """Keep what every launch needs.

        Args:
            config: of the run.
            device: where the worker groups run.
            cluster: RLinf's.
            channel: the channel between the worker groups.
        """
        self.config = config
        self.device = device
        self.channel = channel
        self._cluster = cluster
        self._gpus = visible_gpus(device, os.environ) if device.is_cuda else []

    def launch(self, group: type[G], worker: Any, component: str, *args: Any) -> G:
        """Launch a worker class on every rank of a component, and return the handle.

        Args:
            group: class of the handle.
            worker: class of the workers.
            component: section of the YAML.
            args: for the workers.
        """
        ranks = group_ranks(self.config, component, self.device)
        name = getattr(self.config, component).group_name
        on_gpus = self.device.is_cuda and component != "reward"
        strategy: Any = NodePlacementStrategy([0] * len(ranks))
        if on_gpus:
            strategy = gpu_placement(self._cluster, ranks, self._gpus)
        with nullcontext() if on_gpus else without_gpus(self._cluster):
            handle = worker.create_group(*args).launch(
                self._cluster, placement_strategy=strategy, name=name, catch_system_failure=False
            )
        return group(handle, name, len(ranks), self.channel, self.config.runner.step_timeout_s)


class EvaluationCluster:
    """The worker groups that answer questions and score the answers, and the channel between them."""

    inference: InferenceGroup | None = None
    """The reference model, where training needs one."""

    def __init__(self, launcher: Launcher, inference_ranks: int = 0, sleep_mode: bool = False) -> None:
        config, device, channel = launcher.config, launcher.device, launcher.channel
        self.channel = channel
        self.timeout_s = config.runner.step_timeout_s
        self.rollout = launcher.launch(RolloutGroup, RolloutWorker, "rollout", config, device, channel, sleep_mode)
        self.reward = launcher.launch(RewardGroup, RewardWorker, "reward", config, channel, inference_ranks)

    def start(self) -> None:
        """Load everything, all worker groups at once."""
        _start([self.rollout, self.reward])


class TrainingCluster(EvaluationCluster):
    """The worker groups of a training run."""

    critic: CriticGroup | None = None

    def __init__(self, launcher: Launcher, optimizer_steps: int) -> None:
        config, device, channel = launcher.config, launcher.device, launcher.channel
        self.shares_gpus = shares_gpus(config, device)
        """Whether engines lend their memory to the other worker groups in between (`engines_asleep`)."""
        self._asleep = False
        with_reference = config.algorithm.kl_beta > 0
        super().__init__(
            launcher, len(group_ranks(config, "inference", device)) if with_reference else 0, sleep_mode=self.shares_gpus
        )
        if with_reference:
            self.inference = launcher.launch(InferenceGroup, InferenceWorker, "inference", config, device, channel)
        if config.critic.use_critic_model:
            self.critic = launcher.launch(CriticGroup, CriticWorker, "critic", config, device, channel, optimizer_steps)
            self.critic.dp_size = critic_layout(config, self.critic.size).data_parallel
        self.actor = launcher.launch(ActorGroup, ActorWorker, "actor", config, device, channel, optimizer_steps)
        self.actor.dp_size = actor_layout(config, self.actor.size).data_parallel

    def start(self) -> None:
        """Load everything: all worker groups at once, or the engines before those that share their GPUs.

        An engine takes what is free beside its share of the GPU for its KV cache, and stops if that changes while it
        measures. Engines that share are asleep afterwards: what happens before the first rollout is not theirs either.
        """
        others = [group for group in (self.reward, self.inference, self.critic, self.actor) if group is not None]
        if not self.shares_gpus:
            _start([self.rollout, *others])
            return
        _start([self.rollout])
        self.rollout.sleep().wait(START_TIMEOUT_S)
        self._asleep = True
        _start(others)

    @contextmanager
    def engines_asleep(self) -> Iterator[None]:
        """Lend the engines' GPU memory to the other worker groups in the block, where they share GPUs.

        After the block the engines have the memory of their weights back, but no weights; `sync_weights` must follow, which
        also gives back the KV cache: it need not fit beside what the actor needs to send weights.
        """
        if self.shares_gpus and not self._asleep:
            self.rollout.sleep().wait()
            self._asleep = True
        yield
        if self.shares_gpus:
            self.rollout.wake(WEIGHTS).wait()

    def wake_kv_caches(self) -> None:
        """Give the engines the memory of their KV caches back; they generate again."""
        if self.shares_gpus:
            self.rollout.wake(KV_CACHE).wait()
            self._asleep = False


def _start(groups: Sequence[WorkerGroup]) -> None:
    """Load all of these at once."""
    for call in [group.start() for group in groups]:
        call.wait()


@contextmanager
def evaluation_cluster(config: Config, device: Device) -> Iterator[EvaluationCluster]:
    """Start the worker groups of an evaluation, and end them however the block ends.

    Raises:
        WorkerDied: a process of the run has died.
    """
    with _launcher(config, device, "evaluation") as launcher:
        cluster = EvaluationCluster(launcher)
        cluster.start()
        yield cluster


@contextmanager
def training_cluster(config: Config, device: Device, optimizer_steps: int) -> Iterator[TrainingCluster]:
    """Start the worker groups of a training run, and end them however the block ends.

    Args:
        config: of the run.
        device: where the worker groups run.
        optimizer_steps: of the whole training.

    Raises:
        WorkerDied: a process of the run has died.
    """
    with _launcher(config, device, "training") as launcher:
        cluster = TrainingCluster(launcher, optimizer_steps)
        cluster.start()
        yield cluster


@contextmanager
def _launcher(config: Config, device: Device, kind: str) -> Iterator[Launcher]:
    """Start Ray and the channel, and end all processes of the run after the block."""
    print(f"starting {kind} groups on {describe_device(device, os.environ)}", flush=True)
    with lifetime(config.cluster.num_nodes, weight_folders(config.runner.output_dir)) as run:
        # Ray's workers inherit the driver's environment; some of it must be there before they import torch.
        for name, value in device.driver_env().items():
            os.environ.setdefault(name, value)
        with run.starting_ray(), own_ray(config.cluster.num_nodes):
            cluster = Cluster(num_nodes=config.cluster.num_nodes)
        with without_gpus(cluster):
            channel = Channel.create(channels.CHANNEL)
        yield Launcher(config, device, cluster, channel)
