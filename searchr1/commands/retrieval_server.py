"""`searchr1 retrieval-server`; flags of Search-R1 and RLinf keep their names."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from searchr1.commands.flags import add_address_flags
from searchr1.errors import UserError
from searchr1.retrieval.encode.encoder import FAMILIES
from searchr1.retrieval.index.tokens import TOKENIZERS
from searchr1.retrieval.online.engines import ENGINES
from searchr1.retrieval.server.address import bind, reachable_address, write_address
from searchr1.retrieval.server.app import MAX_TOPK
from searchr1.retrieval.server.options import NO_CORPUS, ServerOptions
from searchr1.retrieval.server.processes import Worker, peak_memory_mib, serve_in_workers
from searchr1.retrieval.server.start import check_once, serve

RERANK_FLAGS = ("topk_retrieval", "topk_rerank", "reranker_batch_size")
AT_LEAST_1 = (
    "workers", "threads", "max_pending", "search_concurrency", "nprobe", "ef_search", "refine_factor", "reranker_batch_size",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Return the parser of all flags; their defaults are those of `ServerOptions`."""
    flags = argparse.ArgumentParser(
        prog="searchr1 retrieval-server",
        description="Serve passages and pages over HTTP, from a local index or an online search engine.",
        epilog="A bearer token for clients is taken from SEARCHR1_RETRIEVAL_TOKEN, keys of online engines from "
        "SERPER_API_KEY, SERPAPI_API_KEY, GOOGLE_API_KEY with GOOGLE_CSE_ID, BRAVE_API_KEY.",
    )
    local = flags.add_argument_group("local index")
    local.add_argument("--corpus_path", type=Path, help='jsonl(.gz) or parquet of {"id", "contents", "url"}')
    local.add_argument("--index_path", type=Path, help="index folder or FAISS file; BM25 can do without")
    local.add_argument("--retriever_name", choices=["bm25", *FAMILIES], help="default e5")
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
    local.add_argument("--topk", type=int, help="passages per query if the request does not say (default 3)")

    rerank = flags.add_argument_group("reranking")
    rerank.add_argument("--reranker_model", help="Hugging Face folder of a cross-encoder")
    rerank.add_argument("--reranker_url", help="address of a searchr1 rerank-server instead")
    rerank.add_argument("--topk_retrieval", "--retrieval_topk", type=int, help="passages that are reranked (default 10)")
    rerank.add_argument("--topk_rerank", "--reranking_topk", type=int, help="passages that are kept (default --topk)")
    rerank.add_argument(
        "--reranker_batch_size", type=int,
        help="pairs of full length in one forward pass, more of shorter ones (default: what suits the device)",
    )  # fmt: skip

    online = flags.add_argument_group("online engine, in place of a local index")
    online.add_argument("--engine", choices=list(ENGINES))
    online.add_argument("--engine_url", help="address of a proxy of the engine")
    online.add_argument("--snippet_only", action="store_true", help="give the engine's snippets, do not fetch pages")
    online.add_argument("--search_concurrency", type=int, help="searches at once (default 256)")
    online.add_argument("--cache_dir", type=Path, help="keep answers and pages of the engine here")

    service = flags.add_argument_group("service")
    add_address_flags(service, 8000, saved="searches can be sent")
    service.add_argument("--workers", type=int, help="processes that share the port (default 1)")
    service.add_argument("--threads", type=int, help="threads of each process (default: the cores, shared out)")
    service.add_argument("--max_pending", type=int, help="queries in the queue of a process before 503")
    service.add_argument("--timeout_s", type=float, help="for 512 queries of a request; then it gets 503 (default 30)")
    service.add_argument("--cache_mib", type=int, help="answers kept in memory, per process; 0: none")
    flags.set_defaults(**asdict(ServerOptions()) | {"topk_retrieval": None})
    return flags


def parse(argv: list[str]) -> ServerOptions:
    """Parse and check the flags.

    Raises:
        UserError: flags that do not go together, or out of range.
    """
    args = parser().parse_args(argv)
    for name in ("topk", "topk_retrieval", "topk_rerank"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= MAX_TOPK:
            raise UserError(f"--{name} {value}: must be between 1 and {MAX_TOPK}")
    for name in AT_LEAST_1:
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
    candidates = args.topk_retrieval or ServerOptions.topk_retrieval
    if reranks and candidates < (args.topk_rerank or args.topk):
        raise UserError(f"--topk_retrieval {candidates}: is smaller than the number of passages that are kept")
    if args.engine is not None:
        for name in ("corpus_path", "index_path", "pages_path", "retriever_model"):
            if getattr(args, name) is not None:
                raise UserError(f"--engine {args.engine}: an online engine takes no --{name}")
    elif args.engine_url is not None:
        raise UserError("--engine_url: needs --engine")
    elif args.corpus_path is None:
        raise UserError(NO_CORPUS)
    elif args.workers > 1 and args.index_path is None:
        raise UserError(f"--workers {args.workers} needs --index_path; build the index once with searchr1 build-index")
    return ServerOptions(**vars(args) | {"topk": args.topk_rerank or args.topk, "topk_retrieval": candidates})


def main(argv: list[str]) -> int:
    """Run the sub-command. Return its exit code."""
    options = parse(argv)
    started = time.perf_counter()
    listener = bind(options.host, options.port)
    address = reachable_address(options.host, listener.getsockname()[1])

    def ready(about: dict[str, Any]) -> None:
        what = ", ".join(f"{key} {value}" for key, value in ({"peak_mib": round(peak_memory_mib())} | about).items())
        print(f"{what}; loaded in {time.perf_counter() - started:.1f} s; serving on http://{address}", flush=True)
        if options.save_address_to:
            write_address(options.save_address_to, address)

    if options.workers == 1:
        serve(options, None, listener, ready)
        return 0
    return serve_in_workers(listener, Worker(partial(serve, options, check_once(options))), options.workers, ready)
