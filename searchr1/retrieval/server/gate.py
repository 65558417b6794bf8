"""What every request passes first: the token, the size of its body, the counters, and a short way for searches."""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from searchr1.retrieval.server.metrics import Metrics
from searchr1.retrieval.server.service import to_json

MAX_BODY_BYTES = 16 << 20
TOO_LARGE = f"the body is larger than {MAX_BODY_BYTES >> 20} MiB"
OPEN_PATHS = {"/", "/health", "/ready"}
"""Answer without a token."""
COUNTED_PATHS = OPEN_PATHS | {"/retrieve", "/access", "/metrics", "/rerank"}


Retrieve = Callable[[bytes], Awaitable[Response]]
"""The body of a request -> its answer; raises nothing."""


class Gate:
    """Middleware around the application.

    `retrieve`: POST /retrieve does not go through the framework, which takes 80 us a request: more than a search.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, token: str | None = None, retrieve: Retrieve | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._retrieve = retrieve
        self._expected = f"Bearer {token}".encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it with 401 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        path = scope["path"] if scope["path"] in COUNTED_PATHS else "other"
        status = 0
        size = 0

        async def counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY_BYTES:
                raise HTTPException(413, TOO_LARGE)  # inside the application, which answers it
            return message

        headers = dict(scope["headers"])
        try:
            if self._expected and path not in OPEN_PATHS and not self._has_token(headers):
                await refuse(counted, 401, "this server wants its token: Authorization: Bearer ...")
            elif _announced(headers) > MAX_BODY_BYTES:
                await refuse(counted, 413, TOO_LARGE)
            elif self._retrieve and path == "/retrieve" and scope["method"] == "POST":
                await self._short_way(self._retrieve, scope, limited, counted)
            else:
                await self._app(scope, limited, counted)
        finally:
            self._metrics.requests.labels(path, str(status or 499)).inc()
            self._metrics.request_seconds.labels(path).observe(time.perf_counter() - started)

    async def _short_way(self, retrieve: Retrieve, scope: Scope, receive: Receive, send: Send) -> None:
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
            await refuse(send, error.status_code, error.detail)
            return
        response = await retrieve(b"".join(parts))
        await response(scope, receive, send)

    def _has_token(self, headers: dict[bytes, bytes]) -> bool:
        return hmac.compare_digest(headers.get(b"authorization", b""), self._expected or b"")


def _announced(headers: dict[bytes, bytes]) -> int:
    length = headers.get(b"content-length", b"0")
    return int(length) if length.isdigit() else 0


async def refuse(send: Send, status: int, detail: str) -> None:
    """A short JSON answer; the connection is closed, since the body was not read."""
    body = to_json({"detail": detail})
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
