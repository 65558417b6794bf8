"""`searchr1 rerank-server`: a cross-encoder behind POST /rerank, in the shape of Search-R1's rerank server."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, Field, model_validator

from searchr1.commands.retrieval_server import write_address
from searchr1.errors import UserError
from searchr1.retrieval.documents import PAIRS_PER_TIMEOUT, grown
from searchr1.retrieval.rerank.client import RERANK_TOKEN_VARIABLE, RETRY_AFTER_S
from searchr1.retrieval.rerank.rerank import MAX_PENDING, CrossEncoder, LocalReranker
from searchr1.retrieval.searcher import Document, SearchFailed
from searchr1.retrieval.server.gate import Gate
from searchr1.retrieval.server.metrics import Metrics
from searchr1.retrieval.server.serve import bind, peak_memory_mib, reachable_address, serve_app
from searchr1.retrieval.server.server import MAX_PASSAGES, MAX_TOPK, REFUSALS, Query, TopK, as_json, explain


class RerankRequest(BaseModel):
    """`POST /rerank`; a document is `{"contents": ...}` or `{"document": {"contents": ...}}`, as /retrieve gives it."""

    queries: Annotated[list[Query], Field(max_length=MAX_PASSAGES)]
    documents: list[list[dict[str, Any]]]
    rerank_topk: TopK | None = None
    return_scores: bool = False

    @model_validator(mode="after")
    def fitting(self) -> RerankRequest:
        """One list of documents per query, each with a text."""
        if len(self.documents) != len(self.queries):
            raise ValueError(f"{len(self.queries)} queries, but {len(self.documents)} lists of documents")
        if sum(map(len, self.documents)) > MAX_PASSAGES:
            raise ValueError(f"more than {MAX_PASSAGES} documents in one request")
        self.documents = [[unwrapped(document) for document in row] for row in self.documents]
        return self


def unwrapped(document: Document) -> Document:
    """The passage of an item with or without a score.

    Raises:
        ValueError: it has no text.
    """
    inner = document.get("document")
    found = inner if isinstance(inner, dict) else document
    if not isinstance(found.get("contents"), str):
        raise ValueError('a document has no "contents"')
    return found


class RankedDocument(BaseModel):
    """A document with `return_scores`."""

    document: dict[str, Any]
    score: float


class RerankAnswer(BaseModel):
    """One list per query, best first."""

    result: list[list[RankedDocument | dict[str, Any]]]


def create_rerank_app(
    reranker: LocalReranker, default_topk: int, timeout_s: float, metrics: Metrics, token: str | None = None
) -> Gate:
    """The application; it closes the reranker when it stops."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await reranker.aclose()

    app = FastAPI(title="searchr1 rerank server", docs_url=None, redoc_url=None, lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Requests can be sent: the server does not answer before its model is loaded."""
        return {"status": "ready"}

    @app.get("/metrics", responses={401: REFUSALS[401]}, response_class=Response)
    def prometheus() -> Response:
        """Counters in Prometheus' text format; batches are counted in pairs."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/rerank", responses=REFUSALS | {200: {"model": RerankAnswer}}, response_class=Response)
    async def rerank(request: RerankRequest) -> Response:
        """The best documents of each query, best first."""
        patience_s = grown(timeout_s, sum(map(len, request.documents)), PAIRS_PER_TIMEOUT)
        try:
            async with asyncio.timeout(patience_s):
                found = await reranker.rerank(request.queries, request.documents, request.rerank_topk or default_topk)
        except TimeoutError as error:
            raise SearchFailed(f"no answer within {patience_s:g} s", RETRY_AFTER_S) from error
        if request.return_scores:
            return as_json({"result": [[{"document": d, "score": score} for d, score in row] for row in found]}, 200)
        return as_json({"result": [[document for document, _ in row] for row in found]}, 200)

    for kind in (SearchFailed, RequestValidationError):
        app.add_exception_handler(kind, lambda _, error: explain(error))
    return Gate(app, metrics, token)


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags; those of Search-R1 keep their names.

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
    service.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    service.add_argument("--port", type=int, default=6980, help="0 takes a free one (default 6980)")
    service.add_argument(
        "--save-address-to", help="write host:port into this file, or into a file in this folder, once the server is up"
    )
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
    """Entry point of the sub-command."""
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
