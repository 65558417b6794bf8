"""How a process of a retrieval server starts; what takes long to import is imported there."""

from __future__ import annotations

import os
import socket
from functools import partial

from searchr1.retrieval.client.client import TOKEN_VARIABLE
from searchr1.retrieval.index.index_check import IndexState, check_index
from searchr1.retrieval.index.manifest import DamagedIndex, index_error, open_manifest
from searchr1.retrieval.server.options import ServerOptions
from searchr1.retrieval.server.processes import Ready, serve_here


def serve(options: ServerOptions, checked: IndexState | None, listener: socket.socket, ready: Ready) -> None:
    """Load and serve in this process until a signal comes.

    Args:
        options: of the server.
        checked: the state that the index's files had when the parent process checked them.
        listener: the socket.
        ready: called once searches can be sent.

    Raises:
        UserError: something cannot be loaded.
    """
    from searchr1.retrieval.server.load import load_backend
    from searchr1.retrieval.server.metrics import Metrics

    metrics = Metrics()
    token = os.environ.get(TOKEN_VARIABLE) or None
    serve_here(listener, partial(load_backend, options, metrics, checked), metrics, options.topk, token, ready)


def check_once(options: ServerOptions) -> IndexState | None:
    """Check the index for all processes of a server; None where there is none, or where loading will report why it is wrong.

    Raises:
        UserError: it is damaged.
    """
    path = options.index_path
    if options.engine is not None or path is None or not path.exists():
        return None
    try:
        manifest = open_manifest(path if path.is_dir() else path.parent)
    except DamagedIndex as error:
        raise index_error(error) from error
    built_for = (manifest.encoder or manifest.kind) if manifest else options.retriever_name
    if built_for != options.retriever_name or (manifest is None and built_for == "bm25"):
        return None
    return check_index(path, manifest, options.retriever_name)
