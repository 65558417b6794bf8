"""Dense indexes: FAISS files, exact search where nothing is rounded, exact refinement where something is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from searchr1.errors import UserError
from searchr1.progress import Advance
from searchr1.retrieval.index.faiss_files import read_faiss
from searchr1.retrieval.index.faiss_types import POINTS_PER_LIST, FaissType
from searchr1.retrieval.index.flat import FlatSearch, Refiner
from searchr1.retrieval.index.manifest import DamagedIndex, index_error
from searchr1.retrieval.searcher import Hits, SearchFailed

ADD_ROWS = 1 << 16
MIN_TRAIN_ROWS = 65_536


class QueryEncoder(Protocol):
    """Texts in, vectors out."""

    dimension: int

    def encode(self, texts: Sequence[str], role: Any) -> npt.NDArray[np.float32]:
        """Return [texts, dimension] vectors."""
        ...


class DenseIndex:
    """A FAISS index and the encoder of its queries."""

    def __init__(self, index: Any, encoder: QueryEncoder, refiner: Refiner | None = None, refine_factor: int = 1) -> None:
        self._index = index
        self._encoder = encoder
        self._flat = flat_search(index)
        self._lists = None
        if is_ivf(index):
            self._lists = flat_search(index.quantizer)
            index.nprobe = min(index.nprobe, index.nlist)
        self._refiner = refiner
        self._refine_factor = refine_factor
        self._reported = False

    @property
    def rows(self) -> int:
        """Vectors in the index."""
        return int(self._index.ntotal)

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        """Return the nearest passages of each query."""
        scores, rows = self.search_vectors(self._encoder.encode(queries, "query"), topk)
        # FAISS fills up with row -1 where it finds fewer.
        return [
            [hit for hit in zip(row, score, strict=True) if hit[0] >= 0]
            for row, score in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def search_vectors(
        self, queries_QD: npt.NDArray[np.float32], topk: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Return scores and rows, [queries, topk]; row -1 where there are fewer.

        A passage without a finite score is not among them, and is reported once.

        Raises:
            SearchFailed: the index gives a row that it does not have.
        """
        topk = min(topk, self.rows)
        if self._flat is not None:
            scores, rows = self._flat.search(queries_QD, topk)
        elif self._refiner is None:
            scores, rows = self._candidates(queries_QD, topk)
        else:
            _, rows = self._candidates(queries_QD, min(topk * self._refine_factor, self.rows))
            scores, rows = self._refiner.refine(queries_QD, rows, topk)
        lost = (rows >= 0) & ~np.isfinite(scores)
        if lost.any():
            self._report_lost(queries_QD, rows, lost)
            rows = np.where(lost, -1, rows)
        return scores, rows

    def _report_lost(
        self, queries_QD: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], lost: npt.NDArray[np.bool_]
    ) -> None:
        if self._reported:
            return
        self._reported = True
        usable = np.isfinite(queries_QD).all(axis=1, keepdims=True)
        lost_rows = rows[lost & usable]
        if lost_rows.size:
            said = f"passage {lost_rows[0]} (counted from 0) has no finite score, so it is not found: its vector is damaged"
        else:
            said = "the encoder gives no finite vector for a query, so nothing is found for it; try --dtype fp32"
        print(f"retrieval: {said} (this is reported once)", flush=True)

    def _candidates(
        self, queries_QD: npt.NDArray[np.float32], count: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Search with FAISS; the lists of an IVF index are chosen by our exact search, which is several times faster."""
        if self._lists is None or not len(queries_QD):
            scores, rows = self._index.search(queries_QD, count)
        else:
            near, lists = self._lists.search(queries_QD, self._index.nprobe)
            scores, rows = self._index.search_preassigned(queries_QD, count, lists, near)
        if rows.size and not -1 <= rows.min() <= rows.max() < self.rows:
            wrong = rows[(rows < -1) | (rows >= self.rows)][0]
            raise SearchFailed(f"the index is damaged: it finds passage {wrong} of {self.rows}; run searchr1 verify")
        return scores, rows


def load_faiss(path: Path, dimension: int, gpu: bool = False) -> Any:
    """Load a FAISS file, mapped as far as its kind can be; with `gpu`, sharded over all GPUs in fp16.

    Raises:
        UserError: damaged file, another dimension than the encoder's, or no FAISS for GPUs.
    """
    import faiss

    # The build without GPUs has index_cpu_to_all_gpus all the same.
    if gpu and not hasattr(faiss, "StandardGpuResources"):
        raise UserError(
            "--faiss_gpu: this FAISS is the CPU build; install faiss-gpu==1.15.1 in place of faiss-cpu (both bring the "
            "module faiss, so uninstall faiss-cpu first), or leave the flag out"
        )
    try:
        index = read_faiss(path, mapped=not gpu)
    except DamagedIndex as error:
        raise index_error(error) from error
    if index.d != dimension:
        raise UserError(
            f"--index_path {path}: has vectors of {index.d} dimensions, --retriever_model gives {dimension}; "
            "use the encoder that the index was built with"
        )
    if not gpu:
        return index
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True
    options.shard = True
    return faiss.index_cpu_to_all_gpus(index, co=options)


def set_search_parameters(index: Any, nprobe: int | None, ef_search: int | None) -> None:
    """Set how thoroughly an IVF or HNSW index is searched; None keeps what the index has.

    Raises:
        UserError: a parameter that this index does not have.
    """
    import faiss

    for flag, name, value in (("nprobe", "nprobe", nprobe), ("ef_search", "efSearch", ef_search)):
        if value is None:
            continue
        try:
            faiss.ParameterSpace().set_index_parameter(index, name, value)
        except RuntimeError as error:
            raise UserError(f"--{flag} {value}: this index has no such parameter") from error


def is_ivf(index: Any) -> bool:
    """Return whether an index is an inverted file in main memory, by inner product."""
    import faiss

    return isinstance(index, faiss.IndexIVF) and index.metric_type == faiss.METRIC_INNER_PRODUCT


def flat_search(index: Any) -> FlatSearch | None:
    """Return an exact search over the vectors of a flat index in main memory, in place of FAISS' own; else None."""
    import faiss

    index = faiss.downcast_index(index)
    if not isinstance(index, faiss.IndexFlat) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        return None
    vectors_RD = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
    return FlatSearch(vectors_RD)  # the caller keeps the index, and with it the memory


def build_faiss(vectors_RD: npt.NDArray[Any], kind: FaissType, seed: int = 0, advance: Advance = lambda _: None) -> Any:
    """Train on a sample and add all vectors, a block at a time; the same index for the same vectors and seed.

    `advance` is called with every block's number of rows.

    Raises:
        UserError: FAISS refuses the factory string, or the vectors are too few for it.
    """
    import faiss

    rows, dimension = vectors_RD.shape
    try:
        index = faiss.index_factory(dimension, kind.factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            lists = getattr(faiss.downcast_index(index), "nlist", 0)
            size = min(rows, max(lists * POINTS_PER_LIST, MIN_TRAIN_ROWS))
            sample = np.sort(np.random.default_rng(seed).choice(rows, size, replace=False))
            index.train(np.asarray(vectors_RD[sample], dtype=np.float32))
        for start in range(0, rows, ADD_ROWS):
            block = np.asarray(vectors_RD[start : start + ADD_ROWS], dtype=np.float32)
            index.add(block)
            advance(len(block))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"--faiss_type {kind.factory}: FAISS cannot make this index of {rows} passages: {reason}") from error
    return index
