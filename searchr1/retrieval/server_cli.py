"""`searchr1 retrieval-server`."""

from __future__ import annotations

import argparse
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import uvicorn

from searchr1.errors import UserError
from searchr1.retrieval.corpus import Corpus
from searchr1.retrieval.encoder import FAMILIES, Encoder
from searchr1.retrieval.indexes import Bm25Index, DenseIndex, Index
from searchr1.retrieval.manifest import MANIFEST, read_manifest
from searchr1.retrieval.pages import Pages
from searchr1.retrieval.server import MAX_TOPK, create_app

BACKLOG = 1024


def load_index(args: argparse.Namespace, corpus: Corpus) -> Index:
    """The index that the flags describe.

    Raises:
        UserError: missing, damaged, or not of this corpus.
    """
    path: Path | None = args.index_path
    name: str = args.retriever_name
    if path is None and name == "bm25":
        print("no --index_path: building the BM25 index in memory", flush=True)
        return Bm25Index.build(corpus.contents())
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
        index = Bm25Index.load(folder, manifest.stemmer)
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


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the port but takes no connection yet; port 0 takes a free one.

    Raises:
        UserError: the port is taken, or the host is not of this machine.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--port {port}: cannot listen on --host {host} ({reason}); give another --port or --host"
        ) from error
    return found


def listen(bound: socket.socket) -> None:
    """Take connections. Left until all is loaded, so that clients are refused at once instead of waiting.

    Raises:
        UserError: another server took the port in the meantime (two that do not listen yet can share one).
    """
    try:
        bound.listen(BACKLOG)
    except OSError as error:
        port = bound.getsockname()[1]
        bound.close()
        raise UserError(f"--port {port}: another server took it while this one was loading; give another --port") from error


def reachable_address(host: str, port: int) -> str:
    """host:port under which clients find a server that listens on `host`."""
    if host in ("0.0.0.0", "::"):
        # No packet is sent: this asks which of our addresses the others see.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))
                host = probe.getsockname()[0]
            except OSError:
                host = "127.0.0.1"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def peak_memory_mib() -> float:
    """The most memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class AnnouncedServer(uvicorn.Server):
    """Calls `ready` once connections are taken."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, then say so."""
        await super().startup(sockets)
        if self.started:
            self._ready()


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags that users of Search-R1 and RLinf know."""
    parser = argparse.ArgumentParser(prog="searchr1 retrieval-server", description="Serve passages and pages over HTTP.")
    parser.add_argument("--corpus_path", type=Path, required=True, help='jsonl(.gz) or parquet of {"id", "contents", "url"}')
    parser.add_argument("--index_path", type=Path, help="index folder or FAISS file; BM25 can do without")
    parser.add_argument("--pages_path", type=Path, help='jsonl(.gz) or parquet of {"url", "contents"}, for /access')
    parser.add_argument("--topk", type=int, default=3, help="passages per query if the request does not say (default 3)")
    parser.add_argument("--retriever_name", default="e5", choices=["bm25", *FAMILIES], help="default e5")
    parser.add_argument("--retriever_model", help="Hugging Face folder of the encoder")
    parser.add_argument("--faiss_gpu", action="store_true", help="shard the index over all GPUs")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    parser.add_argument("--save-address-to", type=Path, help="write host:port into this file once the server is up")
    args = parser.parse_args(argv)
    if not 1 <= args.topk <= MAX_TOPK:
        raise UserError(f"--topk {args.topk}: must be between 1 and {MAX_TOPK}")
    return args


def main(argv: list[str]) -> int:
    """Entry point of the sub-command."""
    args = parse(argv)
    started = time.perf_counter()
    listener = bind(args.host, args.port)
    port: int = listener.getsockname()[1]
    corpus = Corpus(args.corpus_path)
    index = load_index(args, corpus)
    pages = Pages(args.pages_path) if args.pages_path else None

    def ready() -> None:
        address = reachable_address(args.host, port)
        print(
            f"{len(corpus)} passages ({args.retriever_name}), {len(pages) if pages else 0} pages, "
            f"{peak_memory_mib():.0f} MiB at most, loaded in {time.perf_counter() - started:.1f} s; "
            f"serving on http://{address}",
            flush=True,
        )
        if args.save_address_to:
            target: Path = args.save_address_to
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.partial")
            partial.write_text(address)
            os.replace(partial, target)

    app = create_app(corpus, index, pages, args.topk)
    listen(listener)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    AnnouncedServer(config, ready).run(sockets=[listener])
    return 0
