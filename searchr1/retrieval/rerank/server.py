"""The rerank server's HTTP interface: POST /rerank, in the shape of Search-R1's rerank server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, Field, model_validator

from searchr1.http_guard import Guard
from searchr1.retrieval.documents import PAIRS_PER_TIMEOUT, scaled_timeout
from searchr1.retrieval.rerank.client import RETRY_AFTER_S
from searchr1.retrieval.rerank.reranker import LocalReranker
from searchr1.retrieval.searcher import Document, SearchFailed
from searchr1.retrieval.server.app import ERROR_RESPONSES, MAX_PASSAGES, Query, TopK, as_json, explain, guarded
from searchr1.retrieval.server.metrics import Metrics


class RerankRequest(BaseModel):
    """`POST /rerank`; a document is `{"contents": ...}` or `{"document": {"contents": ...}}`, as /retrieve gives it."""

    queries: Annotated[list[Query], Field(max_length=MAX_PASSAGES)]
    documents: list[list[dict[str, Any]]]
    rerank_topk: TopK | None = None
    return_scores: bool = False

    @model_validator(mode="after")
    def fitting(self) -> RerankRequest:
        """Require one list of documents per query, each with a text."""
        if len(self.documents) != len(self.queries):
            raise ValueError(f"{len(self.queries)} queries, but {len(self.documents)} lists of documents")
        if sum(map(len, self.documents)) > MAX_PASSAGES:
            raise ValueError(f"more than {MAX_PASSAGES} documents in one request")
        self.documents = [[unwrapped(document) for document in row] for row in self.documents]
        return self


def unwrapped(document: Document) -> Document:
    """Return the passage of an item with or without a score.

    Raises:
        ValueError: it has no text.
    """
    inner = document.get("document")
    passage = inner if isinstance(inner, dict) else document
    if not isinstance(passage.get("contents"), str):
        raise ValueError('a document has no "contents"')
    return passage


class RankedDocument(BaseModel):
    """A document with `return_scores`."""

    document: dict[str, Any]
    score: float


class RerankAnswer(BaseModel):
    """One list per query, best first."""

    result: list[list[RankedDocument | dict[str, Any]]]


def create_rerank_app(
    reranker: LocalReranker, default_topk: int, timeout_s: float, metrics: Metrics, token: str | None = None
) -> Guard:
    """Make the application, which closes the reranker when it stops."""

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

    @app.get("/metrics", responses={401: ERROR_RESPONSES[401]}, response_class=Response)
    def prometheus() -> Response:
        """Counters in Prometheus' text format; batches are counted in pairs."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/rerank", responses=ERROR_RESPONSES | {200: {"model": RerankAnswer}}, response_class=Response)
    async def rerank(request: RerankRequest) -> Response:
        """The best documents of each query, best first."""
        patience_s = scaled_timeout(timeout_s, sum(map(len, request.documents)), PAIRS_PER_TIMEOUT)
        try:
            async with asyncio.timeout(patience_s):
                ranked = await reranker.rerank(request.queries, request.documents, request.rerank_topk or default_topk)
        except TimeoutError as error:
            raise SearchFailed(f"no answer within {patience_s:g} s", RETRY_AFTER_S) from error
        if request.return_scores:
            return as_json({"result": [[{"document": d, "score": score} for d, score in row] for row in ranked]}, 200)
        return as_json({"result": [[document for document, _ in row] for row in ranked]}, 200)

    for kind in (SearchFailed, RequestValidationError):
        app.add_exception_handler(kind, lambda _, error: explain(error))
    return guarded(app, metrics, token)
