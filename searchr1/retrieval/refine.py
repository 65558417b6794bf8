"""Exact scores of the candidates of a lossy index, from the vectors in a mapped file."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from searchr1.retrieval.compiled import numba


class Refiner:
    """Scores candidates exactly."""

    def __init__(self, vectors_RD: npt.NDArray[Any]) -> None:
        self._half = vectors_RD.dtype == np.float16
        self._vectors_RD = vectors_RD.view(np.uint16) if self._half else vectors_RD

    def refine(
        self, queries_QD: npt.NDArray[np.float32], rows_QC: npt.NDArray[np.int64], topk: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Scores and rows of the best `topk` candidates of each query, [queries, topk]; -1 where there are fewer.

        Best first, the lower row first among equal scores.
        """
        scores_QC = np.empty(rows_QC.shape, dtype=np.float32)
        if self._half:
            score_halves(self._vectors_RD, rows_QC, queries_QD, HALVES, scores_QC)
        else:
            score_floats(self._vectors_RD, rows_QC, queries_QD, scores_QC)
        scores_QC[~np.isfinite(scores_QC)] = -np.inf
        order = np.lexsort((rows_QC, -scores_QC), axis=1)[:, :topk]
        return np.take_along_axis(scores_QC, order, 1), np.take_along_axis(rows_QC, order, 1)


HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
"""The value of every half-precision number: numba does not know them, and a table is faster than a conversion."""


@numba.njit(cache=True, nogil=True, parallel=True, fastmath={"reassoc", "contract"})
def score_halves(vectors_RD, rows_QC, queries_QD, halves, scores_QC):  # type: ignore[no-untyped-def]
    """Inner products with rows of half-precision numbers, given as their bits; -inf for row -1."""
    for query in numba.prange(len(rows_QC)):
        for place in range(rows_QC.shape[1]):
            row = rows_QC[query, place]
            score = np.float32(0.0 if row >= 0 else -np.inf)
            if row >= 0:
                for d in range(queries_QD.shape[1]):
                    score += halves[vectors_RD[row, d]] * queries_QD[query, d]
            scores_QC[query, place] = score


@numba.njit(cache=True, nogil=True, parallel=True, fastmath={"reassoc", "contract"})
def score_floats(vectors_RD, rows_QC, queries_QD, scores_QC):  # type: ignore[no-untyped-def]
    """The same for single precision."""
    for query in numba.prange(len(rows_QC)):
        for place in range(rows_QC.shape[1]):
            row = rows_QC[query, place]
            score = np.float32(0.0 if row >= 0 else -np.inf)
            if row >= 0:
                for d in range(queries_QD.shape[1]):
                    score += vectors_RD[row, d] * queries_QD[query, d]
            scores_QC[query, place] = score
