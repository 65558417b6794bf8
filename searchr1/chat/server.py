"""The chat page's HTTP interface: the page, questions with streamed answers, pages behind search results."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from searchr1.chat.async_chat import AsyncChat
from searchr1.chat.load import open_chat
from searchr1.chat.plan import Plan
from searchr1.chat.stream import Admission, EventStream
from searchr1.http_guard import Guard, HostNames
from searchr1.retrieval.client.client import SearchUnavailable
from searchr1.retrieval.server.address import write_address
from searchr1.retrieval.server.processes import GRACE_S
from searchr1.ui.page import Page

CHAT = Page("chat.html", ("base.css", "blocks.css", "chat.css"), ("dom.js", "chat.js"))
MAX_BODY_BYTES = 1 << 20
OPEN_PATHS = {"/", "/health"}
"""Paths that need no token."""
PAGE_CHARACTERS = 200_000
"""Most characters of a page that is shown to a person."""
PAGE_TIMEOUT_S = 60.0
RETRY_AFTER_S = 5
ABSOLUTE_CHARACTERS = 1 << 18


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server accepts."""

    question_characters: int = 4_000
    running: int = 32
    """Questions that are answered at once."""
    waiting: int = 64
    """Questions that may wait; more are rejected with 503."""
    answer_timeout_s: float = 600.0


class Question(BaseModel):
    """`POST /ask`."""

    question: Annotated[str, Field(max_length=ABSOLUTE_CHARACTERS)]


class Address(BaseModel):
    """`POST /page`."""

    url: Annotated[str, Field(max_length=4096)]


def create_app(chat: AsyncChat, limits: Limits, token: str | None = None, hosts: Iterable[str] = ()) -> Guard:
    """Return the application.

    Args:
        chat: what answers.
        limits: see `Limits`.
        token: clients must send it as `Authorization: Bearer …`; None: they need none.
        hosts: further names of this server, see `HostNames`.
    """
    app = FastAPI(title="searchr1 chat", docs_url=None, redoc_url=None, openapi_url=None)
    admission = Admission(limits.running, limits.waiting)
    html = CHAT.render({}).encode()
    policy = CHAT.policy("img-src data:", "frame-ancestors 'none'", connect=True)

    @app.get("/")
    async def index() -> Response:
        return Response(
            html,
            media_type="text/html; charset=utf-8",
            headers={
                "content-security-policy": policy,
                "x-content-type-options": "nosniff",
                "referrer-policy": "no-referrer",
                "cross-origin-opener-policy": "same-origin",
                "cache-control": "no-cache",
            },
        )

    @app.get("/health")
    async def health() -> Response:
        """Answer 200 while questions can be answered, 503 once the engine has stopped."""
        stopped = chat.stop_reason
        counts = {
            "status": "ok" if stopped is None else "failed",
            "running": min(admission.inside, limits.running),
            "waiting": max(admission.inside - limits.running, 0),
        }
        return JSONResponse(counts, 200 if stopped is None else 503)

    @app.get("/about")
    async def about() -> Response:
        """Return the model, its search and the limits."""
        return JSONResponse(chat.about | {"question_characters": limits.question_characters, "stopped": chat.stop_reason})

    @app.post("/ask")
    async def ask(asked: Question) -> Response:
        """Stream the events of one answer, a JSON object a line. Closing the connection stops the generation."""
        question = asked.question.strip()
        if not question:
            return problem(422, "the question is empty")
        if len(question) > limits.question_characters:
            return problem(
                422,
                f"the question has {len(question)} characters, and {limits.question_characters} are allowed "
                "(--max_question_characters)",
            )
        if chat.stop_reason is not None:
            return problem(503, f"{chat.stop_reason}; start searchr1 serve-chat again")
        busy = problem(503, "too many questions are waiting; try again soon", {"retry-after": str(RETRY_AFTER_S)})
        return EventStream(chat.ask(question), admission, limits.answer_timeout_s, busy)

    @app.post("/page")
    async def read_page(wanted: Address) -> Response:
        """Return the text behind an address that a search returned."""
        try:
            async with asyncio.timeout(PAGE_TIMEOUT_S):
                page = await chat.page(wanted.url)
        except SearchUnavailable as error:
            return problem(502, f"the page could not be had: {error}")
        except TimeoutError:
            return problem(504, f"the page did not come within {PAGE_TIMEOUT_S:g} s")
        if page is None:
            return problem(404, "there is no such page")
        text = page.contents
        return JSONResponse(
            {"url": page.url, "text": text[:PAGE_CHARACTERS], "left_out": max(len(text) - PAGE_CHARACTERS, 0)}
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Any, error: RequestValidationError) -> Response:
        # Without the input, which may be large, and not even encodable.
        first = error.errors()[0]
        return problem(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")

    return Guard(app, max_body_bytes=MAX_BODY_BYTES, open_paths=OPEN_PATHS, token=token, hosts=HostNames(hosts))


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    """Return why a request was rejected."""
    return JSONResponse({"detail": detail}, status, headers)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server on that host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def serve(
    plan: Plan,
    limits: Limits,
    listener: socket.socket,
    hosts: list[str],
    address: str,
    file: str | None,
    token: str | None,
) -> None:
    """Load the model and serve the page until a signal comes.

    Args:
        plan: what to load.
        limits: see `Limits`.
        listener: bound socket.
        hosts: further names of this server.
        address: where people reach it.
        file: receives the address once questions can be asked.
        token: see `create_app`.
    """
    chat = await open_chat(plan)
    try:
        app = create_app(chat, limits, token, hosts)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=GRACE_S,
            server_header=False,
            proxy_headers=False,  # the client's address is not used
            lifespan="off",
        )
        print(f"serving on http://{address} (search: {chat.about['search']})", flush=True)
        if file is not None:
            write_address(file, address)
        await uvicorn.Server(config).serve(sockets=[listener])
    finally:
        await chat.aclose()
