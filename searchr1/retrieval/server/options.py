"""The options of a retrieval server."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

NO_CORPUS = "--corpus_path is missing (or give --engine for an online search engine)"


@dataclass(frozen=True)
class ServerOptions:
    """The flags of `searchr1 retrieval-server` by their names; see its help."""

    corpus_path: Path | None = None
    index_path: Path | None = None
    retriever_name: str = "e5"
    tokenizer: str | None = None
    retriever_model: str | None = None
    dtype: str | None = None
    device: str | None = None
    faiss_gpu: bool = False
    nprobe: int | None = None
    ef_search: int | None = None
    refine_factor: int | None = None
    pages_path: Path | None = None
    topk: int = 3
    reranker_model: str | None = None
    reranker_url: str | None = None
    topk_retrieval: int = 10
    topk_rerank: int | None = None
    reranker_batch_size: int | None = None
    engine: str | None = None
    engine_url: str | None = None
    snippet_only: bool = False
    search_concurrency: int = 256
    cache_dir: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    save_address_to: str | None = None
    workers: int = 1
    threads: int | None = None
    max_pending: int = 4096
    timeout_s: float = 30.0
    cache_mib: int = 256

    @property
    def model_device(self) -> str:
        """The device of encoder and reranker."""
        return self.device or ("cuda" if self.faiss_gpu else "cpu")

    @property
    def process_threads(self) -> int:
        """Threads of one process."""
        return self.threads or max((os.cpu_count() or 1) // self.workers, 1)
