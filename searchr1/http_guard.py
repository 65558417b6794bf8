"""The guard of every HTTP server here: host name, origin, bearer token and size are checked before the application runs."""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
import socket
import time
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:  # the page of `searchr1 watch` is served without these
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d+)?")
"""A Host header in lower case: a name or an address, and perhaps a port."""
Observer = Callable[[str, int, float], None]
"""Called after each request with its path, the status of the answer (499: the client left) and the seconds it took."""


class HostNames:
    """The names under which a server may be reached.

    A page on another site can point its own name at this machine, and then read what the server answers. So a request must
    name the server by an IP address, which nobody can point elsewhere, or by a name of this list.
    """

    def __init__(self, names: Iterable[str]) -> None:
        """Accept `names` beside localhost and this machine's own name."""
        self._names = {"localhost", socket.gethostname().lower(), *(name.lower() for name in names)}

    def accept(self, host: str) -> bool:
        """Return whether the Host header of a request names this server."""
        parsed = HOST.fullmatch(host.lower())
        if parsed is None:
            return False
        name = parsed["name"].strip("[]")
        return name in self._names or _is_address(name)


class Guard:
    """ASGI middleware that rejects a request before the application sees it: 421, 403, 401 or 413, in this order."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        open_paths: Collection[str],
        token: str | None = None,
        hosts: HostNames | None = None,
        observe: Observer | None = None,
    ) -> None:
        """Wrap an application.

        Args:
            app: the application.
            max_body_bytes: the largest body; a larger one is rejected with 413.
            open_paths: paths that need no token.
            token: other requests must send it as `Authorization: Bearer ...`; None: no token is needed.
            hosts: names of the server, for one that browsers use: requests to another name, or from a page of another
                origin, are rejected; None: neither is checked.
            observe: called after each request.
        """
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._too_large = f"the body is larger than {_readable(max_body_bytes)}"
        self._open_paths = frozenset(open_paths)
        self._expected = f"Bearer {token}".encode() if token else None
        self._hosts = hosts
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application, or reject it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if (rejection := self._rejection(scope)) is not None:
                await reject(noted, *rejection)
            else:
                await self._app(scope, self._limited(receive), noted)
        finally:
            if self._observe is not None:
                self._observe(scope["path"], status or 499, time.perf_counter() - started)

    def _rejection(self, scope: Scope) -> tuple[int, str] | None:
        """Return the status and the reason with which a request is rejected by its headers."""
        headers = dict(scope["headers"])
        if self._hosts is not None:
            host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin")
            if not self._hosts.accept(host):
                return 421, f"this server is not called {host[:100]!r}; start it with --allow-host NAME"
            if origin is not None and not _is_from(origin.decode("latin-1"), host):
                return 403, f"this request is from a page of another site than {host[:100]}; a proxy must pass its Host on"
        if self._expected and scope["path"] not in self._open_paths and not self._has_token(headers):
            return 401, "this server needs its token: Authorization: Bearer ..."
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            return 413, self._too_large
        return None

    def _has_token(self, headers: dict[bytes, bytes]) -> bool:
        return hmac.compare_digest(headers.get(b"authorization", b""), self._expected or b"")

    def _limited(self, receive: Receive) -> Receive:
        """Count the bytes of a body that announces no length, or a wrong one."""
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body_bytes:
                from starlette.exceptions import HTTPException

                raise HTTPException(413, self._too_large)  # inside the application, which answers it
            return message

        return limited


async def reject(send: Send, status: int, detail: str) -> None:
    """Send a short JSON answer and close the connection, since the body was not read."""
    body = json.dumps({"detail": detail}, separators=(",", ":")).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_from(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def _readable(size: int) -> str:
    return f"{size >> 20} MiB" if size > 1 << 20 else f"{size >> 10} KiB"
