"""Indexes behind one interface: queries in, rows and scores out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from searchr1.errors import UserError
from searchr1.retrieval.encoder import Encoder
from searchr1.retrieval.flat import FlatSearch

Hits = list[tuple[int, float]]
"""(row, score), best first."""


class Index(Protocol):
    """What a server searches."""

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        """At most `topk` hits for each query."""
        ...


class DenseIndex:
    """A FAISS index and the encoder of its vectors."""

    def __init__(self, index: Any, encoder: Encoder) -> None:
        self._index = index
        self._encoder = encoder
        self._flat = flat_search(index)

    @classmethod
    def load(cls, path: Path, encoder: Encoder, gpu: bool = False) -> DenseIndex:
        """Read a FAISS file; with `gpu`, shard it over all GPUs in fp16.

        Raises:
            UserError: damaged file, another dimension than the encoder's, or no FAISS for GPUs.
        """
        import faiss

        if gpu and not hasattr(faiss, "index_cpu_to_all_gpus"):
            raise UserError("--faiss_gpu: this FAISS is the CPU build; install faiss-gpu-cu12 or leave the flag out")
        try:
            index = faiss.read_index(str(path), 0 if gpu else faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise UserError(f"--index_path {path}: not readable as a FAISS index: {error}") from error
        if index.d != encoder.dimension:
            raise UserError(
                f"--index_path {path}: has vectors of {index.d} dimensions, --retriever_model gives {encoder.dimension}; "
                "use the encoder that the index was built with"
            )
        if gpu:
            options = faiss.GpuMultipleClonerOptions()
            options.useFloat16 = True
            options.shard = True
            index = faiss.index_cpu_to_all_gpus(index, co=options)
        return cls(index, encoder)

    @property
    def rows(self) -> int:
        """Vectors in the index."""
        return int(self._index.ntotal)

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        """Nearest passages."""
        vectors = self._encoder.encode(queries, "query")
        scores, rows = (self._flat or self._index).search(vectors, min(topk, self.rows))
        # FAISS fills up with row -1 where it finds fewer.
        return _hits(rows, scores, rows >= 0)


def flat_search(index: Any) -> FlatSearch | None:
    """An exact search over the vectors of a flat index in main memory, in place of FAISS' own; else None."""
    import faiss

    if not isinstance(index, faiss.IndexFlat) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        return None
    vectors_RD = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
    return FlatSearch(vectors_RD)  # the caller keeps the index, and with it the memory


def _hits(rows: Any, scores: Any, keep: Any) -> list[Hits]:
    """[queries, k] arrays -> lists."""
    return [
        [hit[:2] for hit in zip(*columns, strict=True) if hit[2]]
        for columns in zip(rows.tolist(), scores.astype(np.float64).tolist(), keep.tolist(), strict=True)
    ]
