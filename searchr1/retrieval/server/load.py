"""Load the index, the models and the pages of a retrieval server by its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from searchr1.errors import UserError
from searchr1.retrieval.encode.encoder import CachedEncoder, Encoder
from searchr1.retrieval.index.bm25_build import tokenizer_for
from searchr1.retrieval.index.bm25_index import Bm25Index
from searchr1.retrieval.index.corpus import Corpus, Pages
from searchr1.retrieval.index.dense import DenseIndex, load_faiss, set_search_parameters
from searchr1.retrieval.index.flat import INNER_PRODUCT, Refiner
from searchr1.retrieval.index.index_check import IndexState, check_index, faiss_file, files_of, open_vectors, state_of
from searchr1.retrieval.index.manifest import ADVICE, MANIFEST, Manifest, check_encoder, read_manifest
from searchr1.retrieval.online.disk_cache import DiskCache
from searchr1.retrieval.online.engines import ENGINES
from searchr1.retrieval.online.searcher import OnlineSearcher
from searchr1.retrieval.rerank.client import RemoteReranker
from searchr1.retrieval.rerank.reranker import PAIR_TOKENS, CrossEncoder, LocalReranker, RerankingSearcher
from searchr1.retrieval.searcher import Index, Searcher
from searchr1.retrieval.server.app import Backend
from searchr1.retrieval.server.batcher import Batcher
from searchr1.retrieval.server.metrics import Metrics
from searchr1.retrieval.server.options import NO_CORPUS, ServerOptions
from searchr1.retrieval.server.service import Limits, RetrievalService

CACHED_QUERIES = 100_000
"""Vectors of queries that are kept: 300 MB at 768 dimensions."""


def load_backend(options: ServerOptions, metrics: Metrics, checked: IndexState | None = None) -> Backend:
    """Load everything. `checked`: files of the index that the parent process has checked.

    Raises:
        UserError: something is missing, damaged, or does not belong together.
    """
    if options.engine is not None:
        return load_online(options.engine, options, metrics)
    if options.corpus_path is None:
        raise UserError(NO_CORPUS)
    set_threads(options.retriever_name, bool(options.reranker_model), options.process_threads)
    limits = Limits(options.max_pending, options.timeout_s, options.cache_mib << 20)
    corpus = Corpus(options.corpus_path)
    index = load_index(options, corpus, checked)
    pages = Pages(options.pages_path) if options.pages_path else None
    searcher = reranking(options, Batcher(index, corpus, metrics.observe_batch, corpus.empty))
    about: dict[str, Any] = {
        "passages": len(corpus),
        "pages": len(pages) if pages else 0,
        "retriever": options.retriever_name,
    }
    if corpus.peculiarities():
        about["rows"] = corpus.peculiarities()
    return Backend(RetrievalService(searcher, limits, metrics), pages, about)


def load_online(engine: str, options: ServerOptions, metrics: Metrics) -> Backend:
    """Prepare an online engine, which has a cache of its own, on disk, whose entries expire."""
    online = OnlineSearcher(
        ENGINES[engine],
        address=options.engine_url,
        snippet_only=options.snippet_only,
        concurrency=options.search_concurrency,
        timeout_s=options.timeout_s,
        cache=DiskCache(options.cache_dir) if options.cache_dir else None,
    )
    service = RetrievalService(
        reranking(options, online), Limits(options.max_pending, options.timeout_s, cache_bytes=0), metrics
    )
    return Backend(service, online, {"engine": engine})


def reranking(options: ServerOptions, searcher: Searcher) -> Searcher:
    """Add a second stage, if the options ask for one."""
    if options.reranker_url:
        return RerankingSearcher(searcher, RemoteReranker(options.reranker_url, options.timeout_s), options.topk_retrieval)
    if options.reranker_model:
        size = options.reranker_batch_size
        model = CrossEncoder(
            options.reranker_model,
            device=options.model_device,
            dtype=options.dtype,
            token_budget=size and size * PAIR_TOKENS,
        )
        return RerankingSearcher(searcher, LocalReranker(model), options.topk_retrieval)
    return searcher


def set_threads(retriever_name: str, reranks: bool, threads: int) -> None:
    """Set the processor threads of the libraries that search."""
    if retriever_name != "bm25" or reranks:
        import faiss
        import torch

        faiss.omp_set_num_threads(threads)
        torch.set_num_threads(threads)


def load_index(options: ServerOptions, corpus: Corpus, checked: IndexState | None = None) -> Index:
    """Load the index of the options; files that are still as they were when they were `checked` are not checked again.

    Raises:
        UserError: missing, damaged, or not of this corpus.
    """
    path: Path | None = options.index_path
    name: str = options.retriever_name
    if path is None and name == "bm25":
        tokenizer = tokenizer_for(corpus, options.tokenizer)
        print(f"no --index_path: building the BM25 index in memory (tokenizer {tokenizer})", flush=True)
        return Bm25Index.build(corpus.contents(), threads=options.process_threads, tokenizer=tokenizer)
    if path is None or (options.retriever_model is None and name != "bm25"):
        raise UserError(f"--retriever_name {name} needs --index_path and --retriever_model")
    if not path.exists():
        raise UserError(f"--index_path {path}: no such file; run searchr1 build-index or download.py")
    folder = path if path.is_dir() else path.parent
    manifest = read_manifest(folder, corpus, name)
    if name == "bm25" and manifest is None:
        raise UserError(f"--index_path {folder}: no finished BM25 index ({MANIFEST} is missing); run searchr1 build-index")
    if checked is None or checked != state_of(files_of(path, manifest, name)):
        check_index(path, manifest, name)
    index = (
        load_bm25(options, folder, manifest)
        if name == "bm25" and manifest
        else load_dense(options, str(options.retriever_model), path, manifest)
    )
    if index.rows != len(corpus):
        raise UserError(f"--index_path {path}: has {index.rows} rows, --corpus_path {len(corpus)} passages")
    return index


def load_bm25(options: ServerOptions, folder: Path, manifest: Manifest) -> Index:
    """Map a BM25 folder."""
    if options.tokenizer not in (None, "auto", manifest.tokenizer):
        raise UserError(
            f"--tokenizer {options.tokenizer}: --index_path {folder} was built with "
            f"{manifest.tokenizer or 'words of bm25s'}; "
            "leave the flag out, or build the index again"
        )
    return Bm25Index.load(folder, manifest.stemmer, options.process_threads, manifest.tokenizer, checked=True)


def load_dense(options: ServerOptions, model: str, path: Path, manifest: Manifest | None) -> Index:
    """Load a FAISS file, with the exact vectors if the index has rounded them."""
    folder = path if path.is_dir() else path.parent
    file = faiss_file(path, manifest, options.retriever_name)
    if not file.is_file():
        raise UserError(f"--index_path {file}: no such file; run searchr1 build-index or download.py")
    pooling = manifest.pooling if manifest and manifest.pooling != "own" else None
    encoder = Encoder(options.retriever_name, model, device=options.model_device, dtype=options.dtype, pooling=pooling)
    if manifest:
        check_encoder(manifest, encoder, folder)
    faiss_index = load_faiss(file, encoder.dimension, options.faiss_gpu)
    if manifest and manifest.metric == "inner product" and faiss_index.metric_type != INNER_PRODUCT:
        raise UserError(f"--index_path {file}: is damaged: it is not searched by inner product, as built; {ADVICE}")
    set_search_parameters(
        faiss_index,
        options.nprobe or (manifest.nprobe if manifest else None),
        options.ef_search or (manifest.ef_search if manifest else None),
    )
    refiner, factor = None, 1
    if manifest and manifest.vectors:
        refiner = Refiner(open_vectors(folder / manifest.vectors, manifest.rows, encoder.dimension))
        factor = options.refine_factor or manifest.refine_factor or 1
    elif options.refine_factor:
        raise UserError(f"--refine_factor {options.refine_factor}: this index has no exact vectors beside it")
    return DenseIndex(faiss_index, CachedEncoder(encoder, CACHED_QUERIES), refiner, factor)
