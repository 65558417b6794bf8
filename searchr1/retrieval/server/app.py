"""The retrieval server's HTTP interface."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, Field, ValidationError, model_validator
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from searchr1.errors import UserError
from searchr1.http_guard import Guard, reject
from searchr1.retrieval.documents import encode_json
from searchr1.retrieval.searcher import PageSource, SearchFailed
from searchr1.retrieval.server.metrics import Metrics
from searchr1.retrieval.server.service import RETRY_AFTER_S, Depth, RetrievalService
from searchr1.ui.page import Page

MAX_BODY_BYTES = 16 << 20
OPEN_PATHS = {"/", "/health", "/ready"}
"""Paths that need no token."""
MAX_URLS = 4096
MAX_QUERY_CHARACTERS = 1 << 20
SEARCHED_CHARACTERS = 4096
"""A policy that rambles writes long queries: they are searched by their beginning, not rejected."""
MAX_URL_CHARACTERS = 4096
MAX_TOPK = 1000
MAX_PASSAGES = 1 << 16
"""Queries times topk of one request."""
PAGE = Page("retrieval.html", ("base.css", "retrieval.css"), ("dom.js", "retrieval.js"))

Query = Annotated[str, Field(max_length=MAX_QUERY_CHARACTERS)]
TopK = Annotated[int, Field(ge=0, le=MAX_TOPK)]


class RetrieveRequest(BaseModel):
    """`POST /retrieve`: `queries`, or SkyRL's `query`, which is answered as a list of one. A `topk` of 0 is none."""

    queries: Annotated[list[Query], Field(max_length=MAX_PASSAGES)] | None = None
    query: Query | None = None
    topk: TopK | None = None
    return_scores: bool = False
    topk_retrieval: TopK | None = None
    """With a reranker: passages that it looks at."""
    topk_rerank: TopK | None = None
    """With a reranker: passages that it gives back; goes before `topk`."""

    @model_validator(mode="after")
    def one_form(self) -> RetrieveRequest:
        """Take either form, not both."""
        if (self.queries is None) == (self.query is None):
            raise ValueError('give "queries", a list, or "query", a text')
        return self

    def texts(self) -> list[str]:
        """Return the queries, in either form."""
        return self.queries if self.queries is not None else [self.query or ""]


class AccessRequest(BaseModel):
    """`POST /access`."""

    urls: Annotated[list[Annotated[str, Field(max_length=MAX_URL_CHARACTERS)]], Field(max_length=MAX_URLS)]


class Passage(BaseModel, extra="allow"):
    """A passage in an answer; further fields of the corpus come along."""

    id: Any
    contents: str
    url: Any = None


class ScoredPassage(BaseModel):
    """A passage with `return_scores`."""

    document: Passage
    score: float


class RetrieveAnswer(BaseModel):
    """One list per query, best first."""

    result: list[list[ScoredPassage | Passage]]


class AccessedPage(BaseModel):
    """A page in an answer."""

    url: str
    contents: str


class AccessAnswer(BaseModel):
    """One page, or null, per address."""

    result: list[AccessedPage | None]


class Problem(BaseModel):
    """Why a request was rejected."""

    detail: Any


@dataclass(slots=True)
class Backend:
    """The searcher and the pages behind a server."""

    service: RetrievalService
    pages: PageSource | None
    about: dict[str, Any]
    """Shown by /health."""


@dataclass(slots=True)
class ServerState:
    """`backend` is None until all is loaded, and again when the server stops."""

    topk: int
    backend: Backend | None = None
    pages_missed: bool = False
    """Whether a page was asked for where there are none; printed once."""


class RejectedRequest(Exception):
    """A request that this server does not accept."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text}
    for status, text in {
        400: "no JSON",
        401: "no token, or a wrong one",
        413: "the body is too large",
        415: "msgpack, and msgspec is not installed",
        422: "not the shape of a request",
        503: "too much is waiting, or the server is loading; see Retry-After",
    }.items()
}
RETRIEVE_BODY = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": RetrieveRequest.model_json_schema()}}}
}
MSGPACK = "application/msgpack"
NO_PAGES = "POST /access: this server was started without --pages_path; the answer to every address is null"


class DirectRetrieve:
    """An application whose POST /retrieve does not go through the framework, which takes 80 us: more than a search."""

    def __init__(self, app: ASGIApp, retrieve: Callable[[bytes], Awaitable[Response]]) -> None:
        """Wrap `app`; `retrieve` turns the body of a request into its answer, and raises nothing."""
        self._app = app
        self._retrieve = retrieve

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or scope["path"] != "/retrieve" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        parts: list[bytes] = []
        try:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                parts.append(message.get("body", b""))
                more = message.get("more_body", False)
        except HTTPException as error:
            await reject(send, error.status_code, error.detail)
            return
        response = await self._retrieve(b"".join(parts))
        await response(scope, receive, send)


def guarded(app: ASGIApp, metrics: Metrics, token: str | None) -> Guard:
    """Put the guard of a retrieval or rerank server around an application, and count its requests."""
    return Guard(app, max_body_bytes=MAX_BODY_BYTES, open_paths=OPEN_PATHS, token=token, observe=metrics.observe_request)


def create_app(state: ServerState, metrics: Metrics, token: str | None = None) -> Guard:
    """Make the application; shapes as Search-R1, RLinf and ASearcher clients expect them."""
    app = FastAPI(title="searchr1 retrieval server", docs_url=None, redoc_url=None)

    def loaded() -> Backend:
        if state.backend is None:
            raise SearchFailed("the server is loading", RETRY_AFTER_S)
        return state.backend

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """The process is alive."""
        return {"status": "ok" if state.backend else "loading", **(state.backend.about if state.backend else {})}

    @app.get("/ready", responses={503: ERROR_RESPONSES[503]})
    async def ready() -> dict[str, str]:
        """Searches can be sent."""
        loaded()
        return {"status": "ready"}

    @app.get("/metrics", responses={401: ERROR_RESPONSES[401]}, response_class=Response)
    def prometheus() -> Response:
        """Counters in Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        headers = {"content-security-policy": PAGE.policy(connect=True), "x-content-type-options": "nosniff"}
        return Response(PAGE.render({}), media_type="text/html; charset=utf-8", headers=headers)

    async def answer(body: bytes) -> Response:
        try:
            packed = is_msgpack(body)
            request = read_msgpack(body) if packed else RetrieveRequest.model_validate_json(body)
            service = loaded().service
            depth = depth_of(request, state.topk, service.reranks)
            queries = [query[:SEARCHED_CHARACTERS] for query in request.texts()]
            answer_json = await service.retrieve(queries, depth, request.return_scores)
            return Response(
                as_msgpack(answer_json) if packed else answer_json, media_type=MSGPACK if packed else "application/json"
            )
        except PROBLEMS as error:
            return explain(error)

    @app.post("/retrieve", responses=ERROR_RESPONSES | {200: {"model": RetrieveAnswer}}, openapi_extra=RETRIEVE_BODY)
    async def retrieve(request: Request) -> Response:
        """Passages for each query, best first."""
        return await answer(await request.body())

    @app.post("/access", responses=ERROR_RESPONSES | {200: {"model": AccessAnswer}}, response_class=Response)
    async def access(request: AccessRequest) -> Response:
        """The page behind each address; null where there is none."""
        pages = loaded().pages
        if pages is None and not state.pages_missed:
            state.pages_missed = True
            print(NO_PAGES, flush=True)
        accessed = await pages.access(request.urls) if pages else [None] * len(request.urls)
        result = [{"url": page.url, "contents": page.contents} if page else None for page in accessed]
        return as_json({"result": result}, 200)

    for kind in PROBLEMS:
        app.add_exception_handler(kind, lambda _, error: explain(error))
    return guarded(DirectRetrieve(app, answer), metrics, token)


PROBLEMS = (SearchFailed, RejectedRequest, ValidationError, RequestValidationError, UserError)


def explain(error: Exception) -> Response:
    """Return the answer to a request that failed."""
    if isinstance(error, SearchFailed):
        headers = {"retry-after": str(math.ceil(error.retry_after_s))} if error.retry_after_s else {}
        return as_json({"detail": str(error)}, 503, headers)
    if isinstance(error, ValidationError | RequestValidationError):
        # Without the input, which FastAPI would send back: it may be large, and not even encodable.
        detail = [{"loc": problem["loc"], "msg": problem["msg"]} for problem in error.errors()[:10]]
        return as_json({"detail": detail}, 422)
    # What remains is a corpus that was changed under us.
    return as_json({"detail": str(error)}, error.status if isinstance(error, RejectedRequest) else 500)


def depth_of(request: RetrieveRequest, default_topk: int, reranks: bool) -> Depth:
    """Return how many passages a request asks for.

    Raises:
        RejectedRequest: it asks for a reranker that is not there, or for too much.
    """
    if not reranks and (request.topk_retrieval or request.topk_rerank):
        raise RejectedRequest(422, "topk_retrieval and topk_rerank need a server with --reranker_model or --reranker_url")
    depth = Depth(request.topk_rerank or request.topk or default_topk, request.topk_retrieval or None)
    if depth.candidates is not None and depth.candidates < depth.topk:
        raise RejectedRequest(422, f"topk_retrieval {depth.candidates} is smaller than topk_rerank {depth.topk}")
    if len(request.texts()) * max(depth.topk, depth.candidates or 0) > MAX_PASSAGES:
        raise RejectedRequest(422, f"more than {MAX_PASSAGES} passages in one request; send fewer queries or a smaller topk")
    return depth


def is_msgpack(body: bytes) -> bool:
    """Return whether a body begins as a map of msgpack does, which no JSON can; gem's client sends such bodies."""
    return body[:1] >= b"\x80" and (body[0] <= 0x8F or body[0] in (0xDE, 0xDF))


def read_msgpack(body: bytes) -> RetrieveRequest:
    """Read a request in msgpack.

    Raises:
        RejectedRequest: it is damaged, or the library is missing.
    """
    try:
        import msgspec
    except ImportError as error:
        raise RejectedRequest(415, "msgpack needs msgspec on the server (pip install msgspec); or send JSON") from error
    try:
        return RetrieveRequest.model_validate(msgspec.msgpack.decode(body))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RejectedRequest(422, f"no msgpack: {error}") from error


def as_msgpack(answer: bytes) -> bytes:
    """Encode an answer, given as JSON, in msgpack; half a surrogate pair becomes a question mark."""
    import msgspec

    try:
        return msgspec.msgpack.encode(json.loads(answer))
    except UnicodeEncodeError:
        return msgspec.msgpack.encode(
            json.loads(json.dumps(json.loads(answer), ensure_ascii=False).encode("utf-8", "replace"))
        )


def as_json(content: Any, status: int, headers: dict[str, str] | None = None) -> Response:
    """Return an encoded answer."""
    return Response(encode_json(content), status, headers, media_type="application/json")
