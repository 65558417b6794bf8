"""The reference model: log-probabilities for the KL."""

from __future__ import annotations

from searchr1.cluster import channels
from searchr1.cluster.failure import reported
from searchr1.cluster.model_worker import ModelWorker
from searchr1.cluster.worker_group import Call, WorkerGroup


class InferenceWorker(ModelWorker):
    """One rank of the reference model: the weights that training started from."""

    role = "inference"

    def _load_model(self) -> None:
        from searchr1.learner.policy import ScoringModel

        self._model = ScoringModel.start_reference(self._config, self._device)

    @reported
    async def score(self) -> int:
        """Fill in `ref_logprobs` of every chunk until the batch's end. Return the number of trajectories."""
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


class InferenceGroup(WorkerGroup):
    """The reference model's ranks."""

    def score(self) -> Call[int]:
        """Score chunks until `end_batch`; every rank returns the number of its trajectories."""
        return self.call(InferenceWorker.score)

    def end_batch(self) -> None:
        """Let `score` return once it has scored what it has got."""
        for rank in range(self.size):
            self._channel.put(None, key=channels.scored_key(rank))
