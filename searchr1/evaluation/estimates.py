"""Estimates from a sample of questions: intervals by the bootstrap, and pass@k."""

from __future__ import annotations

import math
import zlib

import numpy as np
import numpy.typing as npt

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
