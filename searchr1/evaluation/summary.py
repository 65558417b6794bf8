"""From scored rollouts to numbers per question set: means, intervals by the bootstrap, pass@k."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from searchr1.evaluation.attempts import Attempt
from searchr1.evaluation.published import in_order

Array = npt.NDArray[np.float64]

RESAMPLES = 2000
CONFIDENCE = 0.95
_CELLS = 4_000_000
"""Counts held in memory at once."""


def pass_at_k(attempts: int, right: int, k: int) -> float:
    """Chance that at least one of `k` attempts drawn without replacement from `attempts` is right: 1 - C(n-c, k) / C(n, k).

    This is the unbiased estimate of pass@k from n >= k independent attempts, c of them right
    (https://arxiv.org/abs/2107.03374, eq. 1).
    """
    if not 0 <= right <= attempts or not 1 <= k <= attempts:
        raise ValueError(f"pass@{k} of {right} right in {attempts}")
    return 1.0 - math.comb(attempts - right, k) / math.comb(attempts, k)


def bootstrap_means(values_QM: Array, name: str, seed: int, resamples: int = RESAMPLES) -> Array:
    """Means over questions of `resamples` samples of the questions, drawn with replacement.

    Questions with the same values are interchangeable, so what is drawn is how often each distinct row of values occurs:
    the same distribution as drawing question by question, and much faster where most values are 0 or 1.

    Args:
        values_QM: [Q, M] a row per question, a column per metric; the metrics of one sample share its questions.
        name: of the question set; each set draws from a stream of its own, whatever other sets are evaluated.
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
    """The percentile interval that holds `CONFIDENCE` of the resampled means."""
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
    scores: dict[str, Value]
    """`exact_match` (the mean over attempts, avg@k), `f1`, `substring_match`, `judge` where one was asked, `pass@k`."""
    facts: dict[str, float]
    """How the attempts went: see `facts_of`."""


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
    """Attempts at each question."""
    untagged: str = "reject"
    """`evaluation.untagged`, by which the attempts were scored."""


def summarise(attempts: Sequence[Attempt], seed: int = 0, resamples: int = 0, untagged: str = "reject") -> Summary:
    """Summarise attempts (at least one).

    Args:
        attempts: all of one method.
        seed: of the resampling.
        resamples: 0 computes no intervals.
        untagged: how they were scored.
    """
    by_source: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        by_source[attempt.source].append(attempt)
    group_size = max(attempt.rollout_id for attempt in attempts) + 1
    names = score_names(attempts, group_size)
    sets, resampled = [], []
    for source in in_order(set(by_source)):
        found, means_BM = _of_set(source, by_source[source], names, seed, resamples)
        sets.append(found)
        resampled.append(means_BM)
    macro = {}
    for m, name in enumerate(names):
        mean = float(np.mean([one.scores[name].mean for one in sets]))
        bounds = interval(np.mean([means_BM[:, m] for means_BM in resampled], axis=0)) if resamples else (None, None)
        macro[name] = Value(mean, *bounds)
    overall = sets[0] if len(sets) == 1 else _of_set("all", list(attempts), names, seed, resamples)[0]
    return Summary(sets, macro, overall, group_size, untagged)


def score_names(attempts: Sequence[Attempt], group_size: int) -> list[str]:
    """The scores that these attempts have, and pass@k for 2, 4, 8, … and all attempts."""
    names = list(SCORES)
    if all(attempt.judge is not None for attempt in attempts):
        names.append("judge")
    ks = {k for k in (2**power for power in range(1, 20)) if k < group_size} | ({group_size} if group_size > 1 else set())
    return names + [f"pass@{k}" for k in sorted(ks)]


def _of_set(name: str, attempts: list[Attempt], names: list[str], seed: int, resamples: int) -> tuple[SetSummary, Array]:
    by_question: dict[int, list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        by_question[attempt.question].append(attempt)
    values_QM = np.array([[_score(name, group) for name in names] for group in by_question.values()])
    means_BM = bootstrap_means(values_QM, name, seed, resamples) if resamples else np.empty((0, len(names)))
    scores = {}
    for m, score in enumerate(names):
        bounds = interval(means_BM[:, m]) if resamples else (None, None)
        scores[score] = Value(float(values_QM[:, m].mean()), *bounds)
    return SetSummary(name, len(by_question), len(attempts), scores, facts_of(attempts)), means_BM


def _score(name: str, group: list[Attempt]) -> float:
    """A question's value: the mean over its attempts, or what pass@k makes of them."""
    if name.startswith("pass@"):
        right = sum(attempt.exact_match > 0 for attempt in group)
        return pass_at_k(len(group), right, min(int(name.removeprefix("pass@")), len(group)))
    return float(np.mean([getattr(attempt, name) for attempt in group]))


def facts_of(attempts: Sequence[Attempt]) -> dict[str, float]:
    """Means over attempts; `invalid_rate` and `untagged_turns` are shares of turns, `tool_failure_rate` of calls."""
    turns = sum(attempt.turns for attempt in attempts)
    calls = sum(attempt.tool_calls for attempt in attempts)

    def mean(name: str) -> float:
        return float(np.mean([getattr(attempt, name) for attempt in attempts]))

    return {
        "reward": mean("reward"),
        "searches": mean("searches"),
        "turns": mean("turns"),
        "response_length": mean("response_length"),
        "policy_tokens": mean("policy_tokens"),
        "invalid_rate": sum(attempt.invalid for attempt in attempts) / max(turns, 1),
        "untagged": mean("untagged"),
        "untagged_turns": sum(attempt.untagged_turns for attempt in attempts) / max(turns, 1),
        "by_text": mean("by_text"),
        "answered": mean("answered"),
        "truncated": mean("truncated"),
        "failed": mean("failed"),
        "tool_failure_rate": sum(attempt.tool_failures for attempt in attempts) / max(calls, 1),
    }


def flat_metrics(summary: Summary) -> dict[str, float]:
    """`val/<name>` over all questions, `val/<set>/<name>` per set, and `val/macro/<score>`, the sets' mean."""
    metrics = {}
    for prefix, found in [("val", summary.overall), *((f"val/{one.name}", one) for one in summary.sets)]:
        metrics[f"{prefix}/questions"] = float(found.questions)
        metrics |= {f"{prefix}/{name}": value.mean for name, value in found.scores.items()}
        metrics |= {f"{prefix}/{name}": value for name, value in found.facts.items()}
    return metrics | {f"val/macro/{name}": value.mean for name, value in summary.macro.items()}
