"""Indexes behind one interface: queries in, rows and scores out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from searchr1.errors import UserError
from searchr1.retrieval.encoder import Encoder

Hits = list[tuple[int, float]]
"""(row, score), best first."""


class Index(Protocol):
    """What a server searches."""

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        """At most `topk` hits for each query."""
        ...


class Bm25Index:
    """BM25 over title and text."""

    def __init__(self, retriever: Any, stemmer: str | None = None) -> None:
        self._retriever = retriever
        self._stemmer_name = stemmer
        self._stemmer = _stemmer(stemmer)

    @classmethod
    def build(cls, texts: Iterable[str], stemmer: str | None = None) -> Bm25Index:
        """Index texts in memory; they are read once and only their words are kept.

        `stemmer`: a language that PyStemmer knows ("english"), or None to keep words as they are.

        Raises:
            UserError: unknown stemmer.
        """
        import bm25s

        index = cls(bm25s.BM25(), stemmer)
        tokens = bm25s.tokenize(texts, stopwords=None, stemmer=index._stemmer, show_progress=False)
        index._retriever.index(tokens, show_progress=False)
        return index

    @classmethod
    def load(cls, folder: Path, stemmer: str | None = None) -> Bm25Index:
        """Map an index folder.

        Raises:
            UserError: files are missing or damaged.
        """
        import bm25s

        try:
            return cls(bm25s.BM25.load(str(folder), mmap=True), stemmer)
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(f"--index_path {folder}: not readable as a BM25 index ({error}); build it again") from error

    def save(self, folder: Path) -> None:
        """Write the index into `folder`."""
        self._retriever.save(str(folder), show_progress=False)

    @property
    def rows(self) -> int:
        """Passages in the index."""
        return int(self._retriever.scores["num_docs"])

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        """Passages that share a word with the query."""
        import bm25s

        tokens = bm25s.tokenize(list(queries), stopwords=None, stemmer=self._stemmer, show_progress=False)
        rows, scores = self._retriever.retrieve(tokens, k=min(topk, self.rows), show_progress=False, n_threads=0)
        return _hits(rows, scores, scores > 0)


class DenseIndex:
    """A FAISS index and the encoder of its vectors."""

    def __init__(self, index: Any, encoder: Encoder) -> None:
        self._index = index
        self._encoder = encoder

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
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP if not gpu else 0)
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
        scores, rows = self._index.search(vectors, min(topk, self.rows))
        # FAISS fills up with row -1 where it finds fewer.
        return _hits(rows, scores, rows >= 0)


def _hits(rows: Any, scores: Any, keep: Any) -> list[Hits]:
    """[queries, k] arrays -> lists."""
    return [
        [hit[:2] for hit in zip(*columns, strict=True) if hit[2]]
        for columns in zip(rows.tolist(), scores.astype(np.float64).tolist(), keep.tolist(), strict=True)
    ]


def _stemmer(language: str | None) -> Any:
    if language is None:
        return None
    import Stemmer

    try:
        return Stemmer.Stemmer(language)
    except KeyError as error:
        known = ", ".join(Stemmer.algorithms())
        raise UserError(f"--stemmer {language}: unknown; use one of {known}") from error
