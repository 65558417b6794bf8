"""From scored rollouts to numbers per question set: means, intervals by the bootstrap, pass@k."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from searchr1.agent.trajectory import Trajectory
from searchr1.evaluation.published import in_order
from searchr1.evaluation.rollouts import ScoredRollout
from searchr1.tracking.trajectory_log import trajectory_row

Array = npt.NDArray[np.float64]

RESAMPLES = 2000
CONFIDENCE = 0.95
_CELLS = 4_000_000
"""Counts held in memory at once."""


def pass_at_k(rollouts: int, right: int, k: int) -> float:
    """Return the chance that one or more of `k` drawn without replacement are right: 1 - C(n-c, k) / C(n, k).

    This is the unbiased estimate of pass@k from n >= k independent rollouts, c of them right
    (https://arxiv.org/abs/2107.03374, eq. 1).
    """
    if not 0 <= right <= rollouts or not 1 <= k <= rollouts:
        raise ValueError(f"pass@{k} of {right} right in {rollouts}")
    return 1.0 - math.comb(rollouts - right, k) / math.comb(rollouts, k)


def bootstrap_means(values_QM: Array, name: str, seed: int, resamples: int = RESAMPLES) -> Array:
    """Return means over questions of `resamples` samples of the questions, drawn with replacement.

    Questions with the same values are interchangeable, so what is drawn is how often each distinct row of values occurs:
    the same distribution as drawing question by question, and much faster where most values are 0 or 1.

    Args:
        values_QM: [Q, M] a row per question, a column per metric; the metrics of one sample share its questions.
        name: of the question set; each set draws from a stream of its own, independent of the other sets.
        seed: of all of them.
        resamples: B.

    Returns:
        [B, M]
    """
    questions = len(values_QM)
    distinct_UM, counts_U = np.unique(values_QM, axis=0, return_counts=True)
    rng = np.random.default_rng([seed % 2**64, zlib.crc32(name.encode("utf-8", "replace"))])
    per_chunk = max(_CELLS // len(distinct_UM), 1)
    means = []
    for start in range(0, resamples, per_chunk):
        drawn_BU = rng.multinomial(questions, counts_U / questions, min(per_chunk, resamples - start))
        means.append(drawn_BU @ distinct_UM / questions)
    return np.concatenate(means)


def interval(means_B: Array) -> tuple[float, float]:
    """Return the percentile interval that holds `CONFIDENCE` of the resampled means."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means_B, [tail, 1 - tail])
    return float(low), float(high)


SCORES = ("exact_match", "f1", "substring_match")


@dataclass(frozen=True, slots=True)
class Value:
    """A mean over questions and its 95 % interval (None without resampling)."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class SetSummary:
    """One question set, or all questions together."""

    name: str
    questions: int
    attempts: int
    """Rollouts of all its questions; `attempts` in results.json."""
    scores: dict[str, Value]
    """`exact_match` (the mean over rollouts, avg@k), `f1`, `substring_match`, `judge` where one was asked, `pass@k`."""
    facts: dict[str, float]
    """Means and shares of the rollouts: see `facts_of`."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One method's evaluation."""

    sets: list[SetSummary]
    """In the order of tables."""
    macro: dict[str, Value]
    """The mean over sets of each score: what papers call the average."""
    overall: SetSummary
    """Every question counts the same."""
    group_size: int = 1
    """Rollouts of each question."""
    untagged: str = "reject"
    """`evaluation.untagged`, by which the rollouts were scored."""


def summarise(rollouts: Sequence[ScoredRollout], seed: int = 0, resamples: int = 0, untagged: str = "reject") -> Summary:
    """Summarise rollouts (at least one).

    Args:
        rollouts: all of one method.
        seed: of the resampling.
        resamples: 0 computes no intervals.
        untagged: how they were scored.
    """
    by_source: dict[str, list[ScoredRollout]] = defaultdict(list)
    for rollout in rollouts:
        by_source[rollout.source].append(rollout)
    group_size = max(rollout.rollout_id for rollout in rollouts) + 1
    names = score_names(rollouts, group_size)
    sets, resampled = [], []
    for source in in_order(set(by_source)):
        one_set, means_BM = _of_set(source, by_source[source], names, seed, resamples)
        sets.append(one_set)
        resampled.append(means_BM)
    macro = {}
    for m, name in enumerate(names):
        mean = float(np.mean([one.scores[name].mean for one in sets]))
        bounds = interval(np.mean([means_BM[:, m] for means_BM in resampled], axis=0)) if resamples else (None, None)
        macro[name] = Value(mean, *bounds)
    overall = sets[0] if len(sets) == 1 else _of_set("all", list(rollouts), names, seed, resamples)[0]
    return Summary(sets, macro, overall, group_size, untagged)


def score_names(rollouts: Sequence[ScoredRollout], group_size: int) -> list[str]:
    """Return the names of the scores that these rollouts have, and pass@k for 2, 4, 8, … and all rollouts."""
    names = list(SCORES)
    if all(rollout.judge is not None for rollout in rollouts):
        names.append("judge")
    ks = {k for k in (2**power for power in range(1, 20)) if k < group_size} | ({group_size} if group_size > 1 else set())
    return names + [f"pass@{k}" for k in sorted(ks)]


def _of_set(
    name: str, rollouts: list[ScoredRollout], names: list[str], seed: int, resamples: int
) -> tuple[SetSummary, Array]:
    by_question: dict[int, list[ScoredRollout]] = defaultdict(list)
    for rollout in rollouts:
        by_question[rollout.question].append(rollout)
    values_QM = np.array([[_score(name, group) for name in names] for group in by_question.values()])
    means_BM = bootstrap_means(values_QM, name, seed, resamples) if resamples else np.empty((0, len(names)))
    scores = {}
    for m, score in enumerate(names):
        bounds = interval(means_BM[:, m]) if resamples else (None, None)
        scores[score] = Value(float(values_QM[:, m].mean()), *bounds)
    return SetSummary(name, len(by_question), len(rollouts), scores, facts_of(rollouts)), means_BM


def _score(name: str, group: list[ScoredRollout]) -> float:
    """Return a question's value: the mean over its rollouts, or their pass@k."""
    if name.startswith("pass@"):
        right = sum(rollout.exact_match > 0 for rollout in group)
        return pass_at_k(len(group), right, min(int(name.removeprefix("pass@")), len(group)))
    return float(np.mean([getattr(rollout, name) for rollout in group]))


def facts_of(rollouts: Sequence[ScoredRollout]) -> dict[str, float]:
    """Return means over rollouts; `invalid_rate` and `untagged_turns` are shares of turns, `tool_failure_rate` of calls."""
    turns = sum(rollout.turns for rollout in rollouts)
    calls = sum(rollout.tool_calls for rollout in rollouts)

    def mean(name: str) -> float:
        return float(np.mean([getattr(rollout, name) for rollout in rollouts]))

    return {
        "reward": mean("reward"),
        "searches": mean("searches"),
        "turns": mean("turns"),
        "response_length": mean("response_length"),
        "policy_tokens": mean("policy_tokens"),
        "invalid_rate": sum(rollout.invalid for rollout in rollouts) / max(turns, 1),
        "untagged": mean("untagged"),
        "untagged_turns": sum(rollout.untagged_turns for rollout in rollouts) / max(turns, 1),
        "by_text": mean("by_text"),
        "answered": mean("answered"),
        "truncated": mean("truncated"),
        "failed": mean("failed"),
        "tool_failure_rate": sum(rollout.tool_failures for rollout in rollouts) / max(calls, 1),
    }


def flat_metrics(summary: Summary, names: Collection[str] | None = None) -> dict[str, float]:
    """Return `val/<name>` over all questions, `val/<set>/<name>` per set, and `val/macro/<score>`, the sets' mean.

    Args:
        summary: of one method.
        names: all of them if None.
    """
    metrics: dict[str, float] = {}
    for prefix, part in [("val", summary.overall), *((f"val/{one.name}", one) for one in summary.sets)]:
        scores = {name: value.mean for name, value in part.scores.items()}
        values = {"questions": float(part.questions)} | scores | part.facts
        metrics |= {f"{prefix}/{name}": value for name, value in values.items() if names is None or name in names}
    macro = summary.macro if names is None else {"exact_match": summary.macro["exact_match"]}
    return metrics | {f"val/macro/{name}": value.mean for name, value in macro.items()}


VALIDATION_METRICS = (
    "questions", "exact_match", "f1", "reward", "searches", "response_length", "invalid_rate", "untagged", "untagged_turns",
    "truncated", "tool_failure_rate",
)  # fmt: skip
"""The names that a training run logs, besides `val/macro/exact_match`."""


def validation_metrics(trajectories: Sequence[Trajectory], untagged: str = "reject") -> dict[str, float]:
    """Return a training run's `val/<name>` and `val/<data source>/<name>`; a source keeps the name that its rows give it.

    Args:
        trajectories: one of each question.
        untagged: how they were scored.
    """
    rollouts = [
        replace(ScoredRollout.from_row(trajectory_row(t), question, untagged), source=t.sample.data_source)
        for question, t in enumerate(trajectories)
    ]
    return flat_metrics(summarise(rollouts), VALIDATION_METRICS)
