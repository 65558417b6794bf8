"""`searchr1 retrieval-server`."""

from __future__ import annotations

import argparse
import os
import socket
import time
from pathlib import Path

from searchr1.errors import UserError
from searchr1.retrieval.corpus import Corpus
from searchr1.retrieval.encoder import Encoder
from searchr1.retrieval.indexes import Bm25Index, DenseIndex, Index, read_manifest
from searchr1.retrieval.pages import Pages


def load_index(args: argparse.Namespace, corpus: Corpus) -> Index:
    """The index that the flags describe.

    Raises:
        UserError: missing, damaged, or not of this corpus.
    """
    path: Path | None = args.index_path
    if args.retriever_name == "bm25":
        if path is None:
            print("no --index_path: building the BM25 index in memory", flush=True)
            return Bm25Index.build(corpus)
        if read_manifest(path, corpus) is None:
            raise UserError(f"--index_path {path}: no BM25 index (manifest.json is missing); run searchr1 build-index")
        return Bm25Index.load(path, corpus)
    if path is None or args.retriever_model is None:
        raise UserError(f"--retriever_name {args.retriever_name} needs --index_path and --retriever_model")
    if not path.exists():
        raise UserError(f"--index_path {path}: no such file; run searchr1 build-index or download.py")
    file = path
    if path.is_dir():
        manifest = read_manifest(path, corpus)
        file = path / (manifest["file"] if manifest else f"{args.retriever_name}_Flat.index")
    encoder = Encoder(args.retriever_name, args.retriever_model, device="cuda" if args.faiss_gpu else "cpu")
    index = DenseIndex.load(file, encoder, gpu=args.faiss_gpu)
    if index.rows != len(corpus):
        raise UserError(f"--index_path {file}: has {index.rows} vectors, --corpus_path {len(corpus)} passages")
    return index


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        UserError: the port is taken.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise UserError(f"--port {port}: cannot listen on {host}:{port} ({error.strerror}); give another --port") from error
    found.listen(1024)
    return found


def main(argv: list[str]) -> int:
    """Entry point of the sub-command."""
    parser = argparse.ArgumentParser(prog="searchr1 retrieval-server", description="Serve passages and pages over HTTP.")
    parser.add_argument("--corpus_path", type=Path, required=True, help='jsonl of {"id", "contents", "url"}')
    parser.add_argument("--index_path", type=Path, help="index folder or FAISS file; BM25 can do without")
    parser.add_argument("--pages_path", type=Path, help='jsonl of {"url", "contents"}, for /access')
    parser.add_argument("--topk", type=int, default=3, help="passages per query if the request does not say (default 3)")
    parser.add_argument("--retriever_name", default="e5", help="bm25, e5, bge or dpr (default e5)")
    parser.add_argument("--retriever_model", help="Hugging Face folder of the encoder")
    parser.add_argument("--faiss_gpu", action="store_true", help="shard the index over all GPUs")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    parser.add_argument("--save-address-to", type=Path, help="write host:port into this file once the server is up")
    args = parser.parse_args(argv)

    started = time.perf_counter()
    listener = bind(args.host, args.port)
    corpus = Corpus(args.corpus_path)
    index = load_index(args, corpus)
    pages = Pages(args.pages_path) if args.pages_path else None

    import uvicorn

    from searchr1.device import Device
    from searchr1.retrieval.server import create_app

    address = f"{args.host}:{listener.getsockname()[1]}"
    memory = Device.detect("cpu").memory().used_bytes / 2**20
    print(
        f"{len(corpus)} passages ({args.retriever_name}), {len(pages) if pages else 0} pages, {memory:.0f} MiB, "
        f"loaded in {time.perf_counter() - started:.1f} s; serving on http://{address}",
        flush=True,
    )
    if args.save_address_to:
        partial = args.save_address_to.with_suffix(".partial")
        partial.write_text(address)
        os.replace(partial, args.save_address_to)
    app = create_app(corpus, index, pages, args.topk)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5))
    server.run(sockets=[listener])
    return 0
