"""Where a server listens, and how clients learn of it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from searchr1.errors import UserError
from searchr1.files.atomic import write_text

BACKLOG = 1024


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that holds the port; port 0 takes a free one.

    Raises:
        UserError: the port is taken, or the host is not of this machine.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--port {port}: cannot listen on --host {host} ({reason}); give another --port or --host"
        ) from error
    return listener


def reachable_address(host: str, port: int) -> str:
    """Return the host:port under which clients reach a server that listens on `host`."""
    if host in ("0.0.0.0", "::"):
        # No packet is sent: this asks which of our addresses the others see.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))
                host = probe.getsockname()[0]
            except OSError:
                host = "127.0.0.1"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def write_address(place: str | Path, address: str) -> None:
    """Write the address of the server; the file appears whole.

    `place`: the file; or a folder (it exists, or ends with a slash), for a file with the name that RLinf gives it.
    """
    path = Path(place)
    if path.is_dir() or os.fspath(place).endswith(os.sep):
        host, _, port = address.rpartition(":")
        path = path / f"Host{host}_IP{port}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, address)
