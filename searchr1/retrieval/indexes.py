"""Indexes behind one interface: queries in, rows and scores out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from searchr1.errors import UserError
from searchr1.retrieval.corpus import Corpus
from searchr1.retrieval.encoder import Encoder

MANIFEST = "manifest.json"


class Index(Protocol):
    """What a server searches."""

    def search(self, queries: Sequence[str], topk: int) -> list[list[tuple[int, float]]]:
        """For each query at most `topk` (row, score), best first."""
        ...


class Bm25Index:
    """BM25 over title and text."""

    def __init__(self, retriever: Any, rows: int) -> None:
        self._retriever = retriever
        self._rows = rows

    @classmethod
    def build(cls, corpus: Corpus, progress: bool = False) -> Bm25Index:
        """Index a corpus in memory."""
        import bm25s

        retriever = bm25s.BM25()
        tokens = bm25s.tokenize(list(corpus.contents()), stopwords=None, show_progress=progress)
        retriever.index(tokens, show_progress=progress)
        return cls(retriever, len(corpus))

    @classmethod
    def load(cls, folder: Path, corpus: Corpus) -> Bm25Index:
        """Map an index folder."""
        import bm25s

        return cls(bm25s.BM25.load(str(folder), mmap=True), len(corpus))

    def save(self, folder: Path) -> None:
        """Write the index into `folder`."""
        self._retriever.save(str(folder))

    def search(self, queries: Sequence[str], topk: int) -> list[list[tuple[int, float]]]:
        """Passages that share a word with the query."""
        import bm25s

        tokens = bm25s.tokenize(list(queries), stopwords=None, show_progress=False)
        rows, scores = self._retriever.retrieve(tokens, k=min(topk, self._rows), show_progress=False, n_threads=0)
        return [
            [(int(row), float(score)) for row, score in zip(found, values, strict=True) if score > 0]
            for found, values in zip(rows, scores, strict=True)
        ]


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
            if not hasattr(faiss, "index_cpu_to_all_gpus"):
                raise UserError("--faiss_gpu: this FAISS is the CPU build; install faiss-gpu-cu12 or leave the flag out")
            options = faiss.GpuMultipleClonerOptions()
            options.useFloat16 = True
            options.shard = True
            index = faiss.index_cpu_to_all_gpus(index, co=options)
        return cls(index, encoder)

    @property
    def rows(self) -> int:
        """Vectors in the index."""
        return int(self._index.ntotal)

    def search(self, queries: Sequence[str], topk: int) -> list[list[tuple[int, float]]]:
        """Nearest passages; FAISS's row -1 (fewer hits than `topk`) is left out."""
        vectors = self._encoder.encode(queries, "query")
        scores, rows = self._index.search(np.ascontiguousarray(vectors, dtype=np.float32), topk)
        return [
            [(int(row), float(score)) for row, score in zip(found, values, strict=True) if row >= 0]
            for found, values in zip(rows, scores, strict=True)
        ]


def write_manifest(folder: Path, corpus: Corpus, kind: str, details: dict[str, Any]) -> None:
    """Say what an index folder was built from."""
    manifest = {"kind": kind, "rows": len(corpus), "corpus": corpus.fingerprint(), **details}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def read_manifest(folder: Path, corpus: Corpus) -> dict[str, Any] | None:
    """The manifest beside an index, checked against the corpus; None for an index published without one.

    Raises:
        UserError: the index was built from another corpus.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest: dict[str, Any] = json.loads(path.read_text())
    if manifest["rows"] != len(corpus) or manifest["corpus"] != corpus.fingerprint():
        raise UserError(
            f"--index_path {folder}: was built from another corpus ({manifest['rows']} passages; {corpus.path} has "
            f"{len(corpus)}); rebuild it with searchr1 build-index"
        )
    return manifest
