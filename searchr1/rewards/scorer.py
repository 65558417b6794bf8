"""Score trajectories as the YAML's `reward` section says, penalties included."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from searchr1.agent.trajectory import Trajectory
from searchr1.config.schema_reward import LengthPenaltyConfig, RewardConfig, SearchPenaltyConfig
from searchr1.errors import UserError
from searchr1.rewards import answers
from searchr1.rewards.registry import Reward, find_reward


def penalties(trajectory: Trajectory, config: RewardConfig) -> dict[str, float]:
    """Return the penalties that are on, 0 or negative each, by the names of their YAML sections."""
    found = {}
    if config.length_penalty is not None:
        found["length_penalty"] = length_penalty(trajectory, config.length_penalty)
    if config.search_penalty is not None:
        found["search_penalty"] = search_penalty(trajectory, config.search_penalty)
    return found


def length_penalty(trajectory: Trajectory, config: LengthPenaltyConfig) -> float:
    """DAPO's overlong shaping (https://arxiv.org/abs/2503.14476, eq. 13), times `penalty_factor`.

    With y tokens, L = `max_length` and C = `overlong_buffer`: 0 up to L - C, then (L - C - y) / C, and -1 above L.
    """
    length = trajectory.response_length if config.tokens == "response" else trajectory.policy_length
    over = length - (config.max_length - config.overlong_buffer)
    if over <= 0:
        return 0.0
    return -config.penalty_factor * min(over / config.overlong_buffer, 1.0)


def search_penalty(trajectory: Trajectory, config: SearchPenaltyConfig) -> float:
    """`per_search` off for every query beyond the `free_searches` first ones."""
    return -config.per_search * max(trajectory.searches - config.free_searches, 0)


class Scorer:
    """Scores trajectories, `reward.concurrency` at once.

    A reward that awaits (a judge) runs beside the others. A user's function that does not await runs in a thread, so that
    it holds up nobody, but never twice at the same time: it need not be thread-safe.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Find the rewards of the configuration, so that a wrong name is reported before anything runs.

        Raises:
            UserError: a reward is not known, or its section says too little.
        """
        self._config = config
        self._found: dict[str, Reward] = {}
        self._slots = asyncio.Semaphore(config.concurrency)
        self._thread = asyncio.Lock()
        for name in config.weights or [config.reward_type]:
            self._reward(name, "reward.weights" if config.weights else "reward.reward_type")

    async def score_all(self, trajectories: Sequence[Trajectory], untagged: str = "reject") -> None:
        """Set `reward` and `reward_parts` of each; see `score`.

        Raises:
            UserError: see `score`; the first failure, and the others are cancelled.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                for trajectory in trajectories:
                    tasks.create_task(self._set(trajectory, untagged))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def score(self, trajectory: Trajectory, untagged: str = "reject") -> tuple[float, dict[str, float]]:
        """Return the scaled reward, penalties included, and its parts unscaled; exact match and F1 are always among them.

        The row's own reward goes before the configured ones. Of a weighted sum, `term/<name>` is each reward's value,
        without its weight. Answers are taken from the policy's own text only: neither from the prompt, whose example
        would score, nor from what was retrieved. `untagged` is `evaluation.untagged`: what a text without tags is worth.

        Raises:
            UserError: unknown reward, one that returns no finite number, or a judge that gives no verdict.
        """
        sample, config = trajectory.sample, self._config
        text = answers.scored_text([turn.policy_text for turn in trajectory.turns], untagged)
        if config.weights and sample.reward_name is None:
            parts = await self._weighted(text, trajectory)
        else:
            parts = await self._value(sample.reward_name or config.reward_type, text, trajectory)
        answer = answers.answer_of(text)
        parts["exact_match"] = answers.exact_match(answer, sample.golden_answers)
        parts["f1"] = answers.f1_score(answer, sample.golden_answers)
        taken = penalties(trajectory, config)
        parts |= taken
        return config.reward_scale * (parts["reward"] + sum(taken.values())), parts

    async def aclose(self) -> None:
        """Close connections; they are opened again where needed."""
        for reward in self._found.values():
            close = getattr(reward.function, "aclose", None)
            if close is not None and not reward.custom:
                await close()

    async def _set(self, trajectory: Trajectory, untagged: str) -> None:
        async with self._slots:
            trajectory.reward, trajectory.reward_parts = await self.score(trajectory, untagged)

    async def _weighted(self, text: str, trajectory: Trajectory) -> dict[str, float]:
        """Return the sum over `reward.weights`, what each term is, and the terms' own parts."""
        weights: Mapping[str, float] = self._config.weights
        found = await asyncio.gather(*(self._value(name, text, trajectory) for name in weights))
        total = 0.0
        parts: dict[str, float] = {}
        for (name, weight), value in zip(weights.items(), found, strict=True):
            parts |= value
            parts[f"term/{name}"] = value["reward"]
            total += weight * value["reward"]
        return parts | {"reward": total}

    async def _value(self, name: str, text: str, trajectory: Trajectory) -> dict[str, float]:
        """Return one reward's parts, with a key "reward"."""
        reward = self._reward(name, "reward_model of a row")
        arguments = text, trajectory.sample.golden_answers, trajectory
        if reward.custom and not _awaits(reward.function):
            async with self._thread:
                result: Any = await asyncio.to_thread(reward.function, *arguments)
        else:
            result = reward.function(*arguments)
        return _parts(name, await result if inspect.isawaitable(result) else result)

    def _reward(self, name: str, key: str) -> Reward:
        if name not in self._found:
            self._found[name] = find_reward(name, self._config, key)
        return self._found[name]


def score_trajectory(trajectory: Trajectory, default: str, scale: float) -> tuple[float, dict[str, float]]:
    """Return one trajectory's reward and parts outside of a run, for trying out a reward; see `Scorer.score`."""
    return asyncio.run(Scorer(RewardConfig(reward_type=default, reward_scale=scale)).score(trajectory))


def _awaits(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _parts(name: str, result: Any) -> dict[str, float]:
    """Return what a reward function returned, as finite numbers with a key "reward"."""
    parts = result if isinstance(result, dict) else {"reward": result}
    try:
        numbers = {str(key): float(value) for key, value in parts.items()}
    except (TypeError, ValueError):
        numbers = {}
    if "reward" not in numbers or not all(map(math.isfinite, numbers.values())):
        raise UserError(f"reward {name} returned {result!r}; expected a finite number, or a dict of them with 'reward'")
    return numbers
