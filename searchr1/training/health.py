"""Health rules: limits on a step's metrics (`runner.health`), with a warning first, then a stop."""

from __future__ import annotations

import logging
import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from searchr1.checkpoints.manifest import checkpoint_steps
from searchr1.config.schema import Config
from searchr1.config.schema_reward import HealthConfig
from searchr1.errors import UserError
from searchr1.tracking.loggers import METRICS_FILE, read_metrics

Row = Mapping[str, float | None]
"""A step's metrics by name; None is a number that is not finite, as in metrics.jsonl."""

REWARD_STEPS = 5
"""Steps that a reward is averaged over before it is compared with the best."""


@dataclass(frozen=True, slots=True)
class HealthRule:
    """One limit.

    Attributes:
        key: its name in `HealthConfig`; it ends with `_min` or `_max`.
        measured: what the number is, for people; begins with the metric's name.
        measure: the number from the healthy steps before and this one; None if there are too few steps yet.
        helps: what usually does.
        once_kept: whether it counts only from the first step on that kept it. A model that never did is not collapsing;
            it has not learned yet.
    """

    key: str
    measured: str
    measure: Callable[[Sequence[Row], Row, HealthConfig], float | None]
    helps: str
    once_kept: bool = False


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that a step broke."""

    rule: HealthRule
    value: float
    limit: float

    def __str__(self) -> str:
        side = "below" if self.rule.key.endswith("_min") else "above"
        value = f"{self.value:.4g}, {side}" if math.isfinite(self.value) else "no finite number;"
        return f"{self.rule.measured} is {value} runner.health.{self.rule.key}={self.limit:g}; helps: {self.rule.helps}"


def _latest(metric: str) -> Callable[[Sequence[Row], Row, HealthConfig], float | None]:
    return lambda past, row, config: _value(row, metric)


def _to_median(metric: str) -> Callable[[Sequence[Row], Row, HealthConfig], float | None]:
    """Return a measure: the number divided by its running median; None without enough steps to take one over."""

    def measure(past: Sequence[Row], row: Row, config: HealthConfig) -> float | None:
        value = _value(row, metric)
        if value is None or math.isnan(value):
            return value
        values = [_value(earlier, metric) for earlier in past[-config.window :]]
        known = [number for number in values if number is not None and math.isfinite(number)]
        median = statistics.median(known) if len(known) >= config.min_history else 0.0
        return value / median if median > 0 else None

    return measure


def _grad_ratio(past: Sequence[Row], row: Row, config: HealthConfig) -> float | None:
    """Return the gradient norm by its running median; without an update there is no norm (`skipped_max` covers that)."""
    return None if row.get("actor/updates") == 0 else _to_median("actor/grad_norm")(past, row, config)


def _skipped_share(past: Sequence[Row], row: Row, config: HealthConfig) -> float | None:
    counts = [row.get(f"actor/{name}") or 0.0 for name in ("updates", "skipped_updates", "early_stopped")]
    return counts[1] / sum(counts) if sum(counts) > 0 else None


def _reward_ratio(past: Sequence[Row], row: Row, config: HealthConfig) -> float | None:
    """Return the mean reward of the last `REWARD_STEPS` steps by the best such mean; None if that was not above 0."""
    rewards = [_value(each, "reward/mean") for each in (*past, row)]
    if rewards[-1] is None or math.isnan(rewards[-1]):
        return rewards[-1]
    known = [number for number in rewards if number is not None and math.isfinite(number)]
    if len(known) <= max(REWARD_STEPS, config.min_history):
        return None
    means = np.convolve(known, np.full(REWARD_STEPS, 1 / REWARD_STEPS), mode="valid")
    return float(means[-1] / means.max()) if means.max() > 0 else None


def _value(row: Row, metric: str) -> float | None:
    """Return a metric; None if it was not measured, nan if it is not finite."""
    if metric not in row:
        return None
    value = row[metric]
    return math.nan if value is None or not math.isfinite(value) else value


_LOWER_RATE = "a lower actor.optim.lr"
RULES = (
    HealthRule(
        "entropy_min", "rollout/entropy", _latest("rollout/entropy"),
        f"{_LOWER_RATE}, algorithm.entropy_bonus, a larger algorithm.clip_ratio_high",
        once_kept=True,
    ),
    HealthRule(
        "entropy_max", "rollout/entropy", _latest("rollout/entropy"),
        f"{_LOWER_RATE}, no algorithm.entropy_bonus, a larger algorithm.kl_beta",
        once_kept=True,
    ),
    HealthRule(
        "length_ratio_max", "rollout/policy_tokens divided by its running median", _to_median("rollout/policy_tokens"),
        f"{_LOWER_RATE}, algorithm.loss_agg_func=token-mean, a smaller agentloop.max_new_tokens_per_turn",
    ),
    HealthRule(
        "length_ratio_min", "rollout/policy_tokens divided by its running median", _to_median("rollout/policy_tokens"),
        f"{_LOWER_RATE}, a larger algorithm.kl_beta",
    ),
    HealthRule(
        "truncated_max", "rollout/truncated", _latest("rollout/truncated"),
        f"{_LOWER_RATE}, a larger runner.seq_length if the answers are good",
        once_kept=True,
    ),
    HealthRule(
        "invalid_max", "rollout/invalid_rate", _latest("rollout/invalid_rate"),
        f"{_LOWER_RATE}, a larger algorithm.kl_beta; look at the trajectories for what the policy writes instead",
        once_kept=True,
    ),
    HealthRule(
        "mismatch_kl_max", "mismatch/kl_k3", _latest("mismatch/kl_k3"),
        "the same precision in actor.model and rollout.model, rollout.validate_weight_first_sync=True, "
        "algorithm.recompute_logprobs=True",
    ),
    HealthRule(
        "effective_sample_size_min", "mismatch/effective_sample_size", _latest("mismatch/effective_sample_size"),
        "the same precision in actor.model and rollout.model, rollout.validate_weight_first_sync=True",
    ),
    HealthRule(
        "grad_norm_ratio_max", "actor/grad_norm divided by its running median", _grad_ratio,
        f"{_LOWER_RATE}, a smaller actor.optim.clip_grad, a larger data.rollout_batch_size",
    ),
    HealthRule(
        "skipped_max", "actor/skipped_updates as a share of the step's updates", _skipped_share,
        f"actor.model.precision=bf16 or fp32, {_LOWER_RATE}",
    ),
    HealthRule(
        "uniform_groups_max", "rollout/uniform_groups", _latest("rollout/uniform_groups"),
        "a larger algorithm.group_size, questions that are neither all solved nor all failed",
        once_kept=True,
    ),
    HealthRule(
        "reward_ratio_min", f"reward/mean over {REWARD_STEPS} steps divided by the best such mean", _reward_ratio,
        f"{_LOWER_RATE}, a larger algorithm.kl_beta",
    ),
)  # fmt: skip


RULE_METRICS = (
    "rollout/entropy", "rollout/policy_tokens", "rollout/truncated", "rollout/invalid_rate", "rollout/uniform_groups",
    "mismatch/kl_k3", "mismatch/effective_sample_size", "actor/grad_norm", "reward/mean",
)  # fmt: skip
"""The metrics of earlier steps that `RULES` look at."""


def examine(past: Sequence[Row], row: Row, config: HealthConfig) -> list[Violation]:
    """Return the rules that a step breaks.

    Args:
        past: the healthy steps before it, oldest first; an unhealthy one must not become what is usual.
        row: the step.
        config: the limits; one that is None is off.
    """
    violations = []
    for rule in RULES:
        limit: float | None = getattr(config, rule.key)
        value = rule.measure(past, row, config) if limit is not None else None
        if limit is None or value is None or _keeps(rule, value, limit):
            continue
        if math.isnan(value) or not rule.once_kept or _has_kept(rule, past, limit, config):
            violations.append(Violation(rule, value, limit))
    return violations


def _keeps(rule: HealthRule, value: float, limit: float) -> bool:
    return value >= limit if rule.key.endswith("_min") else value <= limit


def _has_kept(rule: HealthRule, past: Sequence[Row], limit: float, config: HealthConfig) -> bool:
    values = (rule.measure((), row, config) for row in past)
    return any(value is not None and _keeps(rule, value, limit) for value in values)


logger = logging.getLogger(__name__)


class Health:
    """A run's record: every step is examined, warned about, and in the end stopped.

    Args:
        config: of the run.
        checkpoints: the folder that the run's checkpoints are in.
        rows: the steps before the one that the run goes on with, each with its `step`.
    """

    def __init__(self, config: Config, checkpoints: Path, rows: Sequence[Row] = ()) -> None:
        self._config = config
        self._limits = config.runner.health
        self._checkpoints = checkpoints
        self._past: list[Row] = []
        self._streak: list[int] = []
        for row in rows:
            self._record(int(row["step"] or 0), row)

    @classmethod
    def open(cls, config: Config, folder: Path, resumed_from: Path | None, step: int) -> Health:
        """Read the record of a run in `folder` that goes on after `step`, from a checkpoint of its own or of another run."""
        metrics = (resumed_from.resolve().parents[1] if resumed_from else folder) / METRICS_FILE
        rows = read_metrics(metrics) if resumed_from and metrics.is_file() else []
        return cls(config, folder / "checkpoints", [row for row in rows if row["step"] <= step and "reward/mean" in row])

    def check(self, step: int, metrics: Row) -> None:
        """Warn about an unhealthy step.

        Raises:
            UserError: it was one too many; names the checkpoint to go on from.
        """
        violations = self._record(step, metrics)
        for violation in violations:
            logger.warning("step %d is unhealthy (%d in a row): %s", step, len(self._streak), violation)
        if len(self._streak) >= self._limits.patience and not self._limits.warn_only:
            raise UserError(self._stop_message(violations))

    def allows_saving(self, step: int) -> bool:
        """Return whether a due checkpoint may be written: `runner.resume_dir=auto` must not take an unhealthy one."""
        if self._streak and not self._limits.save_unhealthy:
            logger.warning("step %d is unhealthy: its checkpoint is left out (runner.health.save_unhealthy=True)", step)
            return False
        return True

    def _record(self, step: int, row: Row) -> list[Violation]:
        violations = examine(self._past, row, self._limits)
        if violations:
            self._streak.append(step)
        else:
            self._streak.clear()
            self._past.append({name: row[name] for name in RULE_METRICS if name in row})
        return violations

    def _stop_message(self, violations: Sequence[Violation]) -> str:
        first, last = self._streak[0], self._streak[-1]
        return "\n".join(
            [
                f"runner.health: stopped, because steps {first} to {last} were unhealthy:",
                *(f"  {violation}" for violation in violations),
                *self._put_aside(first),
                *self._how_to_go_on(first),
                "runner.health.warn_only=True goes on regardless; docs/guides/health.md explains each limit.",
            ]
        )

    def _put_aside(self, first: int) -> list[str]:
        """Rename the checkpoint of the weights that step `first` ran with, so that `runner.resume_dir=auto` is good."""
        suspect = self._checkpoints / f"global_step_{first - 1}"
        if self._limits.save_unhealthy or not suspect.is_dir():
            return []
        renamed = suspect.with_name(f"suspect_step_{first - 1}")
        if renamed.exists():  # of an earlier stop at this step
            shutil.rmtree(renamed)
        suspect.rename(renamed)
        return [f"{suspect.name} holds the weights that step {first} ran with and is now {renamed.name}."]

    def _how_to_go_on(self, first: int) -> list[str]:
        rate = self._config.actor.optim.lr / 2
        overrides = f"actor.optim.lr={rate:g}"
        good = [step for step in checkpoint_steps(self._checkpoints) if step < first - 1]
        if not good:
            return [
                "There is no checkpoint from before that. Start again with a lower rate, or change what helps:",
                f"  runner.overwrite=True {overrides}",
            ]
        checkpoint = self._checkpoints / f"global_step_{good[-1]}"
        return [
            f"The last good checkpoint is {checkpoint}. Go on from it with a lower rate, or change what helps:",
            f"  runner.resume_dir={checkpoint} {overrides}",
        ]
