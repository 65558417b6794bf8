"""Exact search over vectors: FAISS' flat file, matrix products over blocks, and refinement of a lossy index's candidates."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from searchr1.retrieval.index.bm25_kernel import numba

BLOCK_ROWS = 1 << 15
"""Rows of one matrix product: 32 MiB of scores for 256 queries."""
QUERIES_AT_ONCE = 256


class FlatSearch:
    """Inner products with all of `vectors_RD`, float32 or float16, which may be mapped from a file larger than memory."""

    def __init__(self, vectors_RD: npt.NDArray[Any]) -> None:
        self._vectors_RD = vectors_RD

    def search(
        self, queries_QD: npt.NDArray[np.float32], topk: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Return scores and rows, each [queries, min(topk, rows)]; best first, the lower row first among equal scores."""
        parts = [
            self._search(queries_QD[start : start + QUERIES_AT_ONCE], topk)
            for start in range(0, max(len(queries_QD), 1), QUERIES_AT_ONCE)
        ]
        scores, rows = zip(*parts, strict=True)
        return np.concatenate(scores), np.concatenate(rows)

    def _search(self, queries_QD: npt.NDArray[np.float32], topk: int) -> tuple[Any, Any]:
        import torch

        queries = torch.from_numpy(np.ascontiguousarray(queries_QD, dtype=np.float32))
        best_QK = torch.empty((len(queries), 0))
        rows_QK = torch.empty((len(queries), 0), dtype=torch.int64)
        with torch.inference_mode():
            for start in range(0, len(self._vectors_RD), BLOCK_ROWS):
                block_BD = np.asarray(self._vectors_RD[start : start + BLOCK_ROWS], dtype=np.float32)
                if not block_BD.flags.writeable:  # mapped from a file: PyTorch warns, though nothing is written
                    block_BD = _as_writeable(block_BD)
                scores_QB = queries @ torch.from_numpy(block_BD).T
                scores_QK, found_QK = torch.topk(scores_QB, min(topk, scores_QB.shape[1]))
                if not scores_QK.isfinite().all():  # NaN comes first; -inf comes last, and the caller drops it
                    scores_QB.nan_to_num_(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
                    scores_QK, found_QK = torch.topk(scores_QB, min(topk, scores_QB.shape[1]))
                best_QK = torch.cat([best_QK, scores_QK], 1)
                rows_QK = torch.cat([rows_QK, found_QK + start], 1)
                if best_QK.shape[1] > topk:
                    best_QK, kept = torch.topk(best_QK, topk)
                    rows_QK = rows_QK.gather(1, kept)
        scores, rows = best_QK.numpy(), rows_QK.numpy()
        order = np.lexsort((rows, -scores), axis=1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def _as_writeable(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the same memory without the read-only flag; it is only ever read."""
    interface = dict(array.__array_interface__)
    interface["data"] = (interface["data"][0], False)

    class Holder:
        __array_interface__ = interface
        keeps = array

    return np.asarray(Holder())


INNER_PRODUCT = 0
UNUSED = 1 << 20
"""FAISS writes this twice where older versions had something."""


def flat_header(rows: int, dimension: int) -> bytes:
    """Return the header before the vectors (fp32, row after row) of a file that `faiss.read_index` reads as IndexFlatIP."""
    return struct.pack(
        "<4siqqq?iQ", b"IxFI", dimension, rows, UNUSED, UNUSED, True, INNER_PRODUCT, rows * dimension
    )  # fmt: skip


class Refiner:
    """Scores candidates exactly."""

    def __init__(self, vectors_RD: npt.NDArray[Any]) -> None:
        self._half = vectors_RD.dtype == np.float16
        self._vectors_RD = vectors_RD.view(np.uint16) if self._half else vectors_RD

    def refine(
        self, queries_QD: npt.NDArray[np.float32], rows_QC: npt.NDArray[np.int64], topk: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Return scores and rows of the best `topk` candidates of each query, [queries, topk]; -1 where there are fewer.

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
    """Compute inner products with rows of half-precision numbers, given as their bits; -inf for row -1."""
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
    """Compute the same for single precision."""
    for query in numba.prange(len(rows_QC)):
        for place in range(rows_QC.shape[1]):
            row = rows_QC[query, place]
            score = np.float32(0.0 if row >= 0 else -np.inf)
            if row >= 0:
                for d in range(queries_QD.shape[1]):
                    score += vectors_RD[row, d] * queries_QD[query, d]
            scores_QC[query, place] = score
