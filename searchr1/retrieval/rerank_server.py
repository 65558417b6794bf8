"""`searchr1 rerank-server`: a cross-encoder behind POST /rerank, in the shape of Search-R1's rerank server."""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, Field, model_validator

from searchr1.retrieval.client import TOKEN_VARIABLE
from searchr1.retrieval.gate import Gate
from searchr1.retrieval.metrics import Metrics
from searchr1.retrieval.rerank import CrossEncoder, LocalReranker
from searchr1.retrieval.searcher import SearchFailed
from searchr1.retrieval.serve import bind, peak_memory_mib, reachable_address, serve_app
from searchr1.retrieval.server import MAX_PASSAGES, MAX_QUERIES, MAX_QUERY_CHARACTERS, MAX_TOPK, as_json, explain
from searchr1.retrieval.server_cli import write_address


class RerankRequest(BaseModel):
    """`POST /rerank`; a document is `{"contents": ...}` or `{"document": {"contents": ...}}`."""

    queries: Annotated[list[Annotated[str, Field(max_length=MAX_QUERY_CHARACTERS)]], Field(max_length=MAX_QUERIES)]
    documents: list[list[dict[str, Any]]]
    rerank_topk: Annotated[int, Field(ge=1, le=MAX_TOPK)] | None = None
    return_scores: bool = False

    @model_validator(mode="after")
    def fitting(self) -> RerankRequest:
        """One list of documents per query, each with a text."""
        if len(self.documents) != len(self.queries):
            raise ValueError(f"{len(self.queries)} queries, but {len(self.documents)} lists of documents")
        if sum(map(len, self.documents)) > MAX_PASSAGES:
            raise ValueError(f"more than {MAX_PASSAGES} documents in one request")
        self.documents = [[d.get("document", d) for d in row] for row in self.documents]
        for row in self.documents:
            for document in row:
                if not isinstance(document, dict) or not isinstance(document.get("contents"), str):
                    raise ValueError('a document has no "contents"')
        return self


def create_rerank_app(reranker: LocalReranker, default_topk: int, metrics: Metrics, token: str | None = None) -> Gate:
    """The application."""
    app = FastAPI(title="searchr1 rerank server", docs_url=None, redoc_url=None)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/rerank")
    async def rerank(request: RerankRequest) -> Response:
        found = await reranker.rerank(request.queries, request.documents, request.rerank_topk or default_topk)
        if request.return_scores:
            return as_json({"result": [[{"document": d, "score": score} for d, score in row] for row in found]}, 200)
        return as_json({"result": [[document for document, _ in row] for row in found]}, 200)

    for kind in (SearchFailed, RequestValidationError):
        app.add_exception_handler(kind, lambda _, error: explain(error))
    return Gate(app, metrics, token)


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags; those of Search-R1 keep their names."""
    parser = argparse.ArgumentParser(prog="searchr1 rerank-server", description="Serve a cross-encoder over HTTP.")
    parser.add_argument("--reranker_model", "--rerank_model_name_or_path", required=True, help="Hugging Face folder")
    parser.add_argument("--rerank_topk", "--reranking_topk", type=int, default=3, help="documents kept (default 3)")
    parser.add_argument("--rerank_max_length", type=int, default=512, help="tokens of a pair (default 512)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="fp16 on a GPU, else fp32")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=6980, help="0 takes a free one (default 6980)")
    parser.add_argument("--save-address-to", type=Path, help="write host:port into this file once the server is up")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Entry point of the sub-command."""
    args = parse(argv)
    started = time.perf_counter()
    listener = bind(args.host, args.port)
    address = reachable_address(args.host, listener.getsockname()[1])
    model = CrossEncoder(args.reranker_model, max_length=args.rerank_max_length, device=args.device, dtype=args.dtype)
    app = create_rerank_app(LocalReranker(model), args.rerank_topk, Metrics(), os.environ.get(TOKEN_VARIABLE) or None)
    took = time.perf_counter() - started
    print(f"peak_mib {peak_memory_mib():.0f}; loaded in {took:.1f} s; serving on http://{address}", flush=True)
    serve_app(app, listener, partial(write_address, args.save_address_to, address) if args.save_address_to else None)
    return 0
