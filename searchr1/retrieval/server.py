"""The retrieval server's HTTP interface."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from searchr1.errors import UserError
from searchr1.retrieval.batcher import Batcher
from searchr1.retrieval.corpus import Corpus
from searchr1.retrieval.indexes import Index
from searchr1.retrieval.pages import Pages

MAX_BODY_BYTES = 16 << 20
MAX_QUERIES = 1024
MAX_QUERY_CHARACTERS = 1 << 20
SEARCHED_CHARACTERS = 4096
"""A policy that rambles writes long queries: they are searched by their beginning, not refused."""
MAX_URL_CHARACTERS = 4096
MAX_TOPK = 1000


class RetrieveRequest(BaseModel):
    """`POST /retrieve`."""

    queries: Annotated[list[Annotated[str, Field(max_length=MAX_QUERY_CHARACTERS)]], Field(max_length=MAX_QUERIES)]
    topk: Annotated[int, Field(ge=1, le=MAX_TOPK)] | None = None
    return_scores: bool = False


class AccessRequest(BaseModel):
    """`POST /access`."""

    urls: Annotated[list[Annotated[str, Field(max_length=MAX_URL_CHARACTERS)]], Field(max_length=MAX_QUERIES)]


def create_app(corpus: Corpus, index: Index, pages: Pages | None, default_topk: int) -> FastAPI:
    """The application; shapes as Search-R1, RLinf and ASearcher clients expect them."""
    app = FastAPI(title="searchr1 retrieval server", docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit)
    batcher = Batcher(index, corpus)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "passages": len(corpus), "pages": len(pages) if pages is not None else 0}

    @app.post("/retrieve")
    async def retrieve(request: RetrieveRequest) -> Response:
        queries = [query[:SEARCHED_CHARACTERS] for query in request.queries]
        found = await batcher.search(queries, request.topk or default_topk) if queries else []
        if request.return_scores:
            return answer([[{"document": document, "score": score} for document, score in hits] for hits in found])
        return answer([[document for document, _ in hits] for hits in found])

    @app.post("/access")
    def access(request: AccessRequest) -> Response:  # not async: pages are large and on disk, so in a thread
        if pages is None:
            raise HTTPException(404, "this server was started without --pages_path")
        found = [pages.get(url) for url in request.urls]
        return answer([{"url": page.url, "contents": page.contents} if page else None for page in found])

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        # Without the input, which FastAPI would send back: it may be large, and not even encodable.
        detail = [{"loc": problem["loc"], "msg": problem["msg"]} for problem in error.errors()[:10]]
        return as_json({"detail": detail}, 422)

    @app.exception_handler(UserError)
    async def broken_corpus(_: Request, error: UserError) -> Response:
        return as_json({"detail": str(error)}, 500)

    return app


def answer(result: list[Any]) -> Response:
    """The body of a successful answer."""
    return as_json({"result": result}, 200)


def as_json(content: Any, status: int) -> Response:
    """Escaped to ASCII: a corpus may hold half a surrogate pair, which UTF-8 cannot."""
    return Response(json.dumps(content), status, media_type="application/json")


class BodyLimit:
    """Refuses bodies above the limit before they are read into memory."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count the body as it comes in."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY_BYTES:
                raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES >> 20} MiB")
            return message

        await self._app(scope, counted, send)
