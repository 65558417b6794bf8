"""`searchr1 retrieval-server`; flags of Search-R1 and RLinf keep their names."""

from __future__ import annotations

import argparse
import os
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

from searchr1.errors import UserError
from searchr1.retrieval.client.client import TOKEN_VARIABLE
from searchr1.retrieval.encode.encoder import FAMILIES
from searchr1.retrieval.index.index_check import State, check_index
from searchr1.retrieval.index.manifest import DamagedIndex, open_manifest, refused
from searchr1.retrieval.index.tokens import TOKENIZERS
from searchr1.retrieval.online.engines import ENGINES
from searchr1.retrieval.server.serve import (
    Ready,
    Worker,
    bind,
    peak_memory_mib,
    reachable_address,
    serve_here,
    serve_in_workers,
)
from searchr1.retrieval.server.server import MAX_TOPK

TOPK_RETRIEVAL = 10
"""Passages that are reranked if nobody says how many."""
RERANK_FLAGS = ("topk_retrieval", "topk_rerank", "reranker_batch_size")


def parser() -> argparse.ArgumentParser:
    """All flags."""
    found = argparse.ArgumentParser(
        prog="searchr1 retrieval-server",
        description="Serve passages and pages over HTTP, from a local index or an online search engine.",
        epilog="A bearer token for clients is taken from SEARCHR1_RETRIEVAL_TOKEN, keys of online engines from "
        "SERPER_API_KEY, SERPAPI_API_KEY, GOOGLE_API_KEY with GOOGLE_CSE_ID, BRAVE_API_KEY.",
    )
    local = found.add_argument_group("local index")
    local.add_argument("--corpus_path", type=Path, help='jsonl(.gz) or parquet of {"id", "contents", "url"}')
    local.add_argument("--index_path", type=Path, help="index folder or FAISS file; BM25 can do without")
    local.add_argument("--retriever_name", default="e5", choices=["bm25", *FAMILIES], help="default e5")
    local.add_argument(
        "--tokenizer", choices=["auto", *TOKENIZERS],
        help="BM25 without --index_path: words, or multilingual for scripts without spaces (default auto: by the corpus)",
    )  # fmt: skip
    local.add_argument("--retriever_model", help="Hugging Face folder of the encoder")
    local.add_argument(
        "--dtype", choices=["fp32", "bf16", "fp16"], help="of encoder and reranker (default fp16 on a GPU, else fp32)"
    )
    local.add_argument("--device", help="of encoder and reranker: cpu or cuda (default cuda with --faiss_gpu, else cpu)")
    local.add_argument("--faiss_gpu", action="store_true", help="shard the index over all GPUs, in fp16")
    local.add_argument("--nprobe", type=int, help="IVF indexes: lists that are searched")
    local.add_argument("--ef_search", type=int, help="HNSW indexes: size of the candidate list")
    local.add_argument("--refine_factor", type=int, help="quantised indexes: candidates per passage, scored exactly")
    local.add_argument("--pages_path", type=Path, help='jsonl(.gz) or parquet of {"url", "contents"}, for /access')
    local.add_argument("--topk", type=int, default=3, help="passages per query if the request does not say (default 3)")

    rerank = found.add_argument_group("reranking")
    rerank.add_argument("--reranker_model", help="Hugging Face folder of a cross-encoder")
    rerank.add_argument("--reranker_url", help="address of a searchr1 rerank-server instead")
    rerank.add_argument("--topk_retrieval", "--retrieval_topk", type=int, help="passages that are reranked (default 10)")
    rerank.add_argument("--topk_rerank", "--reranking_topk", type=int, help="passages that are kept (default --topk)")
    rerank.add_argument(
        "--reranker_batch_size", type=int,
        help="pairs of full length in one forward pass, more of shorter ones (default: what suits the device)",
    )  # fmt: skip

    online = found.add_argument_group("online engine, in place of a local index")
    online.add_argument("--engine", choices=list(ENGINES))
    online.add_argument("--engine_url", help="address of a proxy of the engine")
    online.add_argument("--snippet_only", action="store_true", help="give the engine's snippets, do not fetch pages")
    online.add_argument("--search_concurrency", type=int, default=256, help="searches at once (default 256)")
    online.add_argument("--cache_dir", type=Path, help="keep answers and pages of the engine here")

    service = found.add_argument_group("service")
    service.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    service.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    service.add_argument(
        "--save-address-to", help="write host:port into this file, or into a file in this folder, once searches can be sent"
    )
    service.add_argument("--workers", type=int, default=1, help="processes that share the port (default 1)")
    service.add_argument("--threads", type=int, help="threads of each process (default: the cores, shared out)")
    service.add_argument("--max_pending", type=int, default=4096, help="queries in the queue of a process before 503")
    service.add_argument(
        "--timeout_s", type=float, default=30.0, help="for 512 queries of a request; then it gets 503 (default 30)"
    )
    service.add_argument("--cache_mib", type=int, default=256, help="answers kept in memory, per process; 0: none")
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check.

    Raises:
        UserError: flags that do not go together, or out of range.
    """
    args = parser().parse_args(argv)
    for name in ("topk", "topk_retrieval", "topk_rerank"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= MAX_TOPK:
            raise UserError(f"--{name} {value}: must be between 1 and {MAX_TOPK}")
    for name in (
        "workers",
        "threads",
        "max_pending",
        "search_concurrency",
        "nprobe",
        "ef_search",
        "refine_factor",
        "reranker_batch_size",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if args.timeout_s <= 0 or args.cache_mib < 0:
        raise UserError("--timeout_s must be above 0, --cache_mib at least 0")
    if args.reranker_model and args.reranker_url:
        raise UserError("--reranker_model and --reranker_url: give one of them")
    reranks = bool(args.reranker_model or args.reranker_url)
    given = [name for name in RERANK_FLAGS if getattr(args, name) is not None]
    if given and not reranks:
        raise UserError(f"--{given[0]}: needs a reranker; give --reranker_model or --reranker_url too")
    if args.reranker_batch_size and args.reranker_url:
        raise UserError("--reranker_batch_size: is a flag of the rerank-server behind --reranker_url; give it there")
    args.topk_retrieval = args.topk_retrieval or TOPK_RETRIEVAL
    if reranks and args.topk_retrieval < (args.topk_rerank or args.topk):
        raise UserError(f"--topk_retrieval {args.topk_retrieval}: is smaller than the number of passages that are kept")
    if args.engine is not None:
        for name in ("corpus_path", "index_path", "pages_path", "retriever_model"):
            if getattr(args, name) is not None:
                raise UserError(f"--engine {args.engine}: an online engine takes no --{name}")
    elif args.engine_url is not None:
        raise UserError("--engine_url: needs --engine")
    elif args.corpus_path is None:
        raise UserError("--corpus_path is missing (or give --engine for an online search engine)")
    elif args.workers > 1 and args.index_path is None:
        raise UserError(f"--workers {args.workers} needs --index_path; build the index once with searchr1 build-index")
    if reranks and args.topk_rerank is not None:
        args.topk = args.topk_rerank
    return args


def serve(argv: list[str], checked: State | None, listener: socket.socket, ready: Ready) -> None:
    """Load and serve in this process. `checked`: files of the index that the parent process has checked.

    Raises:
        UserError: something cannot be loaded.
    """
    from searchr1.retrieval.server.load import load_backend
    from searchr1.retrieval.server.metrics import Metrics

    args = parse(argv)
    metrics = Metrics()
    token = os.environ.get(TOKEN_VARIABLE) or None
    serve_here(listener, partial(load_backend, args, metrics, checked), metrics, args.topk, token, ready)


def main(argv: list[str]) -> int:
    """Entry point of the sub-command."""
    args = parse(argv)
    started = time.perf_counter()
    listener = bind(args.host, args.port)
    address = reachable_address(args.host, listener.getsockname()[1])

    def ready(about: dict[str, Any]) -> None:
        what = ", ".join(f"{key} {value}" for key, value in ({"peak_mib": round(peak_memory_mib())} | about).items())
        print(f"{what}; loaded in {time.perf_counter() - started:.1f} s; serving on http://{address}", flush=True)
        if args.save_address_to:
            write_address(args.save_address_to, address)

    if args.workers == 1:
        serve(argv, None, listener, ready)
        return 0
    return serve_in_workers(listener, Worker(partial(serve, argv, check_once(args))), args.workers, ready)


def check_once(args: argparse.Namespace) -> State | None:
    """Check the index for all workers.

    Raises:
        UserError: it is damaged.
    """
    path: Path | None = args.index_path
    if args.engine is not None or path is None or not path.exists():
        return None
    try:
        manifest = open_manifest(path if path.is_dir() else path.parent)
    except DamagedIndex as error:
        raise refused(error) from error
    built_for = (manifest.encoder or manifest.kind) if manifest else args.retriever_name
    if built_for != args.retriever_name or (manifest is None and built_for == "bm25"):
        return None  # the workers say so
    return check_index(path, manifest, args.retriever_name)


def write_address(place: str | Path, address: str) -> None:
    """Write down where the server is; the file appears whole.

    `place`: the file; or a folder (it exists, or ends with a slash), for a file with the name that RLinf gives it.
    """
    path = Path(place)
    if path.is_dir() or os.fspath(place).endswith(os.sep):
        host, _, port = address.rpartition(":")
        path = path / f"Host{host}_IP{port}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f"{path.name}.partial")
    partial_path.write_text(address, encoding="utf-8")
    os.replace(partial_path, path)
