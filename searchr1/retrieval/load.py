"""From flags to what a server answers from."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from searchr1.errors import UserError
from searchr1.retrieval.batcher import Batcher
from searchr1.retrieval.bm25_index import Bm25Index
from searchr1.retrieval.corpus import Corpus
from searchr1.retrieval.encoder import Encoder
from searchr1.retrieval.indexes import DenseIndex, Index
from searchr1.retrieval.manifest import MANIFEST, read_manifest
from searchr1.retrieval.metrics import Metrics
from searchr1.retrieval.pages import Pages
from searchr1.retrieval.server import Backend
from searchr1.retrieval.service import Limits, RetrievalService


def load_backend(args: argparse.Namespace, metrics: Metrics) -> Backend:
    """Load everything.

    Raises:
        UserError: something is missing, damaged, or does not belong together.
    """
    set_threads(args.retriever_name, threads_of(args))
    limits = Limits(args.max_pending, args.timeout_s, args.cache_mib << 20)
    corpus = Corpus(args.corpus_path)
    index = load_index(args, corpus)
    pages = Pages(args.pages_path) if args.pages_path else None
    searcher = Batcher(index, corpus, metrics.observe_batch)
    about: dict[str, Any] = {"passages": len(corpus), "pages": len(pages) if pages else 0, "retriever": args.retriever_name}
    return Backend(RetrievalService(searcher, limits, metrics), pages, about)


def threads_of(args: argparse.Namespace) -> int:
    """Processor threads of one process."""
    return args.threads or max((os.cpu_count() or 1) // args.workers, 1)


def set_threads(retriever_name: str, threads: int) -> None:
    """Processor threads of the libraries that search."""
    if retriever_name != "bm25":
        import faiss
        import torch

        faiss.omp_set_num_threads(threads)
        torch.set_num_threads(threads)


def load_index(args: argparse.Namespace, corpus: Corpus) -> Index:
    """The index that the flags describe.

    Raises:
        UserError: missing, damaged, or not of this corpus.
    """
    path: Path | None = args.index_path
    name: str = args.retriever_name
    if path is None and name == "bm25":
        print("no --index_path: building the BM25 index in memory", flush=True)
        return Bm25Index.build(corpus.contents(), threads=threads_of(args))
    if path is None or (args.retriever_model is None and name != "bm25"):
        raise UserError(f"--retriever_name {name} needs --index_path and --retriever_model")
    if not path.exists():
        raise UserError(f"--index_path {path}: no such file; run searchr1 build-index or download.py")
    folder = path if path.is_dir() else path.parent
    manifest = read_manifest(folder, corpus, name)
    index: Bm25Index | DenseIndex
    if name == "bm25":
        if manifest is None:
            raise UserError(f"--index_path {path}: no finished BM25 index ({MANIFEST} is missing); run searchr1 build-index")
        index = Bm25Index.load(folder, manifest.stemmer, threads_of(args))
    else:
        file = path
        if path.is_dir():
            file = path / (manifest.file if manifest and manifest.file else f"{name}_Flat.index")
        if not file.is_file():
            raise UserError(f"--index_path {file}: no such file; run searchr1 build-index or download.py")
        encoder = Encoder(name, args.retriever_model, device="cuda" if args.faiss_gpu else "cpu")
        index = DenseIndex.load(file, encoder, gpu=args.faiss_gpu)
    if index.rows != len(corpus):
        raise UserError(f"--index_path {path}: has {index.rows} rows, --corpus_path {len(corpus)} passages")
    return index
