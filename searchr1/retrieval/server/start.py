"""The options of a retrieval server, and how one of its processes starts; what takes long to import is imported there."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from searchr1.retrieval.client.client import TOKEN_VARIABLE
from searchr1.retrieval.index.index_check import IndexState, check_index
from searchr1.retrieval.index.manifest import DamagedIndex, open_manifest, refused
from searchr1.retrieval.server.processes import Ready, serve_here

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


def serve(options: ServerOptions, checked: IndexState | None, listener: socket.socket, ready: Ready) -> None:
    """Load and serve in this process until a signal comes.

    Args:
        options: of the server.
        checked: the state that the index's files had when the parent process checked them.
        listener: the socket.
        ready: called once searches can be sent.

    Raises:
        UserError: something cannot be loaded.
    """
    from searchr1.retrieval.server.load import load_backend
    from searchr1.retrieval.server.metrics import Metrics

    metrics = Metrics()
    token = os.environ.get(TOKEN_VARIABLE) or None
    serve_here(listener, partial(load_backend, options, metrics, checked), metrics, options.topk, token, ready)


def check_once(options: ServerOptions) -> IndexState | None:
    """Check the index for all processes of a server; None where there is none, or where loading will report why it is wrong.

    Raises:
        UserError: it is damaged.
    """
    path = options.index_path
    if options.engine is not None or path is None or not path.exists():
        return None
    try:
        manifest = open_manifest(path if path.is_dir() else path.parent)
    except DamagedIndex as error:
        raise refused(error) from error
    built_for = (manifest.encoder or manifest.kind) if manifest else options.retriever_name
    if built_for != options.retriever_name or (manifest is None and built_for == "bm25"):
        return None
    return check_index(path, manifest, options.retriever_name)
