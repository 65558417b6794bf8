"""What every request to the chat page's server passes first: host, origin, token, size."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from searchr1.retrieval.server.gate import refuse

MAX_BODY_BYTES = 1 << 20
TOO_LARGE = f"the body is larger than {MAX_BODY_BYTES >> 10} KiB"
OPEN_PATHS = {"/", "/health"}
"""Answer without a token."""


class Gate:
    """Middleware around the application."""

    def __init__(self, app: ASGIApp, token: str | None = None, hosts: Iterable[str] = ()) -> None:
        """`hosts`: names of this server beside localhost, this machine's name, and addresses in numbers."""
        self._app = app
        self._expected = f"Bearer {token}".encode() if token else None
        self._hosts = {"localhost", socket.gethostname().lower(), *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it with 401, 403, 413 or 421."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin")
        length = headers.get(b"content-length", b"0")
        if not self._is_ours(host):
            # A page elsewhere may have pointed its own name at this machine.
            await refuse(send, 421, f"this server is not called {host[:100]!r}; start it with --allowed-host NAME")
        elif origin is not None and not _is_from(origin.decode("latin-1"), host):
            await refuse(
                send, 403, f"this request came from a page of another site than {host[:100]}; a proxy must pass its Host on"
            )
        elif self._expected and scope["path"] not in OPEN_PATHS and not self._has_token(headers):
            await refuse(send, 401, "this server wants its token: Authorization: Bearer ...")
        elif length.isdigit() and int(length) > MAX_BODY_BYTES:
            await refuse(send, 413, TOO_LARGE)
        else:
            await self._app(scope, _limited(receive), send)

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names this server. A name that is a number cannot be pointed elsewhere."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _has_token(self, headers: dict[bytes, bytes]) -> bool:
        return hmac.compare_digest(headers.get(b"authorization", b""), self._expected or b"")


def _is_from(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def _limited(receive: Receive) -> Receive:
    size = 0

    async def limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY_BYTES:
            raise HTTPException(413, TOO_LARGE)  # inside the application, which answers it
        return message

    return limited
