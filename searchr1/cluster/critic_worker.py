"""The critic: values of states, for PPO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from searchr1.agent.trajectory import Trajectory
from searchr1.cluster import channels
from searchr1.cluster.failure import reported
from searchr1.cluster.model_worker import TrainedWorker
from searchr1.cluster.worker_group import Call, TrainedGroup
from searchr1.learner.packing import FloatArray

if TYPE_CHECKING:
    from searchr1.learner.critic import Critic


@dataclass(slots=True)
class CriticTargets:
    """What the values of a data-parallel rank's trajectories should have been. All arrays are response-aligned."""

    returns: list[Any]
    minibatch_ids: list[int]


class CriticWorker(TrainedWorker):
    """One rank of the critic."""

    _model: Critic

    def _load_model(self) -> None:
        from searchr1.learner.critic import Critic

        self._model = Critic.start(self._config, self._device, self._optimizer_steps)
        self._leave_gpu()

    @reported
    async def values(self) -> list[Any] | None:
        """Take this data-parallel rank's share of a step and keep it for `train_step`. The leader returns its values."""
        self._trajectories: list[Trajectory] = await self._share()
        self._values = self._model.values(self._trajectories)
        self._device.empty_cache()
        return self._values if self._model.is_dp_leader else None

    @reported
    async def train_step(self) -> dict[str, float]:
        """Train on the share that `values` has taken. Return metrics of all ranks."""
        targets: CriticTargets = await self._share()
        metrics = self._model.train_step(self._trajectories, targets.returns, self._values, targets.minibatch_ids)
        self._device.empty_cache()
        return metrics

    async def _share(self) -> Any:
        timeout_s = self._config.runner.step_timeout_s
        return await channels.get_share(self._channel, self._model, channels.critic_key, timeout_s)


class CriticGroup(TrainedGroup):
    """The critic's ranks."""

    def values(self, trajectories: Sequence[Trajectory], shares: Sequence[Sequence[int]]) -> list[FloatArray]:
        """Return the values [N] of each trajectory under the critic as it is, in the order of `trajectories`.

        Args:
            trajectories: of a whole step; the workers keep them for `train_step`.
            shares: what `shares` dealt to each data-parallel rank.
        """
        for dp_rank, share in enumerate(shares):
            self._channel.put([trajectories[i] for i in share], key=channels.critic_key(dp_rank))
        # The leader of each data-parallel rank answers, in order.
        answers = [answer for answer in self.call(CriticWorker.values).wait() if answer is not None]
        values: dict[int, FloatArray] = {}
        for share, answer in zip(shares, answers, strict=True):
            values |= dict(zip(share, answer, strict=True))
        return [values[index] for index in range(len(trajectories))]

    def train_step(
        self, returns: Sequence[FloatArray], minibatch_ids: Sequence[int], shares: Sequence[Sequence[int]]
    ) -> Call[dict[str, float]]:
        """Train on the trajectories of `values`; every rank returns metrics of all.

        Args:
            returns: [N] of each trajectory, one per response token.
            minibatch_ids: of each, the optimizer step within this step.
            shares: as for `values`.
        """
        for dp_rank, share in enumerate(shares):
            targets = CriticTargets([returns[i] for i in share], [minibatch_ids[i] for i in share])
            self._channel.put(targets, key=channels.critic_key(dp_rank))
        return self.call(CriticWorker.train_step)
