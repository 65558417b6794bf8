"""The actor: the policy's training ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from searchr1.agent.trajectory import Trajectory
from searchr1.cluster import channels
from searchr1.cluster.failure import reported
from searchr1.cluster.model_worker import TrainedWorker
from searchr1.cluster.worker_group import Call, TrainedGroup

if TYPE_CHECKING:
    from searchr1.learner.policy import Policy
    from searchr1.rollout.weights import WeightManifest, WeightPublisher


@dataclass(slots=True)
class ActorShare:
    """What one data-parallel rank trains on in a step."""

    trajectories: list[Trajectory]
    advantages: list[Any]
    """One number per trajectory, or an array [N] with one per response token."""
    minibatch_ids: list[int]
    """Which optimizer step of this rollout step each trajectory belongs to."""


class ActorWorker(TrainedWorker):
    """One rank of the policy."""

    _model: Policy
    _publisher: WeightPublisher | None = None

    def _load_model(self) -> None:
        from searchr1.learner.policy import Policy

        self._model = Policy.start(self._config, self._device, self._optimizer_steps)
        self._leave_gpu()

    @reported
    async def train_step(self) -> dict[str, float]:
        """Train on this data-parallel rank's share of the step, from the channel. Return metrics of all ranks."""
        timeout_s = self._config.runner.step_timeout_s
        share: ActorShare = await channels.get_share(self._channel, self._model, channels.actor_key, timeout_s)
        metrics = self._model.train_step(share.trajectories, share.advantages, share.minibatch_ids)
        self._device.empty_cache()  # the engine on the same GPU wakes up next
        return metrics

    @reported
    async def publish_weights(self, version: int) -> Any:
        """Write the first bucket of weights where the rollout group can map it. Rank 0 returns its manifest."""
        from searchr1.rollout.shared_memory import weight_directory, weight_folders
        from searchr1.rollout.weights import WeightPublisher, bucket_size, same_buckets

        lora = self._config.actor.lora
        if lora.rank and lora.weight_update == "adapter":
            return self._publish_adapter(version)
        named, elements = self._model.named_weights(), self._model.backend.parameter_count
        size = bucket_size(elements, self._model.rollout_dtype)
        self._model.reload("weight")
        self._buckets: Iterator[Any]
        if self._rank == 0:
            if self._publisher is None:
                root = weight_directory(2 * size, weight_folders(self._config.runner.output_dir)[1])
                self._publisher = WeightPublisher(root, size)
            self._buckets = self._publisher.publish(named, version, elements)
        else:  # gathering a tensor takes all ranks
            self._buckets = same_buckets(named, size)
        return next(self._buckets)

    def _publish_adapter(self, version: int) -> Any:
        """Write LoRA's matrices alone, all at once."""
        from searchr1.checkpoints.lora import peft_settings
        from searchr1.rollout.shared_memory import weight_directory, weight_folders
        from searchr1.rollout.weights import publish_adapter

        self._model.reload("weight")
        named, lora = list(self._model.named_adapters()), self._config.actor.lora
        if self._rank != 0:
            return None
        size = sum(tensor.nbytes for _, tensor in named)
        root = weight_directory(size, weight_folders(self._config.runner.output_dir)[1])
        return publish_adapter(named, version, root, peft_settings(lora.rank, lora.alpha, lora.target_modules))

    @reported
    async def next_bucket(self) -> Any:
        """Write the next bucket, after one that was not the last."""
        return next(self._buckets)

    @reported
    async def release_weights(self, manifest: WeightManifest) -> None:
        """End an update that everyone has taken over."""
        self._buckets = iter(())  # it holds the last tensor
        self._model.offload("weight")
        self._device.empty_cache()
        if self._publisher is not None:
            self._publisher.release()
        elif self._rank == 0:
            from searchr1.rollout.weights import release

            release(manifest)

    @reported
    async def probe_logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """Score sequences under the current weights: a log-probability per token (0 for the first)."""
        self._model.reload("weight")
        logprobs = self._model.probe_logprobs(sequences)
        self._leave_gpu()
        return logprobs


class ActorGroup(TrainedGroup):
    """The policy's training ranks."""

    def train_step(
        self, trajectories: Sequence[Trajectory], advantages: Sequence[Any], minibatch_ids: Sequence[int]
    ) -> Call[dict[str, float]]:
        """Train on a step's trajectories, a share on each data-parallel rank; every rank returns metrics of all.

        Args:
            trajectories: of the whole step.
            advantages: of each, one number or an array [N] with one per response token.
            minibatch_ids: of each, the optimizer step within this step.
        """
        for dp_rank, share in enumerate(self.shares(trajectories)):
            part = ActorShare(
                [trajectories[i] for i in share], [advantages[i] for i in share], [minibatch_ids[i] for i in share]
            )
            self._channel.put(part, key=channels.actor_key(dp_rank))
        return self.call(ActorWorker.train_step)

    def publish_weights(self, version: int) -> Call[WeightManifest]:
        """Write the first bucket of weights where the rollout group can map it; rank 0 returns its manifest."""
        return self.call(ActorWorker.publish_weights, version)

    def next_bucket(self) -> Call[WeightManifest]:
        """Write the next bucket, after one that was not the last; rank 0 returns its manifest."""
        return self.call(ActorWorker.next_bucket)

    def release_weights(self, manifest: WeightManifest) -> Call[None]:
        """End an update that everyone has taken over."""
        return self.call(ActorWorker.release_weights, manifest)

    def probe_logprobs(self, sequences: list[list[int]]) -> Call[list[list[float]]]:
        """Score sequences under the current weights: a log-probability per token (0 for the first)."""
        return self.call(ActorWorker.probe_logprobs, sequences)
