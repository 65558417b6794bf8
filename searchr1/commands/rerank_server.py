"""`searchr1 rerank-server`: a cross-encoder behind POST /rerank, in the shape of Search-R1's rerank server."""

from __future__ import annotations

import argparse
import os
import time
from functools import partial

from searchr1.commands.flags import add_address_flags
from searchr1.errors import UserError
from searchr1.retrieval.rerank.client import RERANK_TOKEN_VARIABLE
from searchr1.retrieval.rerank.reranker import MAX_PENDING, CrossEncoder, LocalReranker
from searchr1.retrieval.rerank.server import create_rerank_app
from searchr1.retrieval.server.address import bind, reachable_address, write_address
from searchr1.retrieval.server.app import MAX_TOPK
from searchr1.retrieval.server.metrics import Metrics
from searchr1.retrieval.server.processes import peak_memory_mib, serve_app


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the flags; those of Search-R1 keep their names.

    Raises:
        UserError: a value out of range.
    """
    parser = argparse.ArgumentParser(
        prog="searchr1 rerank-server",
        description="Serve a cross-encoder over HTTP.",
        epilog=f"A bearer token for clients is taken from {RERANK_TOKEN_VARIABLE}.",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--reranker_model", "--rerank_model_name_or_path", required=True, help="Hugging Face folder")
    model.add_argument("--reranker_type", choices=["sentence_transformer"], help="the one kind that there is")
    model.add_argument("--rerank_topk", "--reranking_topk", type=int, default=3, help="documents kept (default 3)")
    model.add_argument("--rerank_max_length", "--max_length", type=int, default=512, help="tokens of a pair (default 512)")
    model.add_argument(
        "--rerank_batch_size", "--reranker_batch_size", "--batch_size", type=int,
        help="pairs of full length in one forward pass, more of shorter ones (default: what suits the device)",
    )  # fmt: skip
    model.add_argument("--device", default="cpu", help="cpu, cuda or cuda:NUMBER (default cpu)")
    model.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="fp16 on a GPU, else fp32")

    service = parser.add_argument_group("service")
    add_address_flags(service, 6980, saved="requests can be sent")
    service.add_argument("--max_pending", type=int, default=MAX_PENDING, help="pairs in the queue before 503")
    service.add_argument("--timeout_s", type=float, default=30.0, help="a request that takes longer gets 503 (default 30)")
    args = parser.parse_args(argv)
    if not 1 <= args.rerank_topk <= MAX_TOPK:
        raise UserError(f"--rerank_topk {args.rerank_topk}: must be between 1 and {MAX_TOPK}")
    if args.rerank_max_length < 8:
        raise UserError(
            f"--rerank_max_length {args.rerank_max_length}: must be at least 8: a pair has up to 4 marks of its own"
        )
    for name in ("rerank_batch_size", "max_pending"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if not args.timeout_s > 0:
        raise UserError(f"--timeout_s {args.timeout_s}: must be above 0")
    return args


def main(argv: list[str]) -> int:
    """Run the sub-command. Return its exit code."""
    args = parse(argv)
    started = time.perf_counter()
    listener = bind(args.host, args.port)
    address = reachable_address(args.host, listener.getsockname()[1])
    model = CrossEncoder(
        args.reranker_model,
        device=args.device,
        dtype=args.dtype,
        max_length=args.rerank_max_length,
        token_budget=args.rerank_batch_size and args.rerank_batch_size * args.rerank_max_length,
    )
    metrics = Metrics()
    reranker = LocalReranker(model, args.max_pending, metrics.observe_batch)
    token = os.environ.get(RERANK_TOKEN_VARIABLE) or None
    app = create_rerank_app(reranker, args.rerank_topk, args.timeout_s, metrics, token)
    took = time.perf_counter() - started
    print(f"peak_mib {peak_memory_mib():.0f}; loaded in {took:.1f} s; serving on http://{address}", flush=True)
    serve_app(app, listener, partial(write_address, args.save_address_to, address) if args.save_address_to else None)
    return 0
