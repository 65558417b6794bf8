"""`searchr1 retrieval-server`."""

from __future__ import annotations

import argparse
import os
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

from searchr1.retrieval.client import TOKEN_VARIABLE
from searchr1.retrieval.index_check import State, check_index
from searchr1.retrieval.manifest import DamagedIndex, open_manifest, refused
from searchr1.retrieval.serve import (
    Ready,
    Worker,
    bind,
    peak_memory_mib,
    reachable_address,
    serve_here,
    serve_in_workers,
)
from searchr1.retrieval.server_flags import parse


def serve(argv: list[str], checked: State | None, listener: socket.socket, ready: Ready) -> None:
    """Load and serve in this process. `checked`: files of the index that the parent process has checked.

    Raises:
        UserError: something cannot be loaded.
    """
    from searchr1.retrieval.load import load_backend
    from searchr1.retrieval.metrics import Metrics

    args = parse(argv)
    metrics = Metrics()
    token = os.environ.get(TOKEN_VARIABLE) or None
    serve_here(listener, partial(load_backend, args, metrics, checked), metrics, args.topk, token, ready)


def main(argv: list[str]) -> int:
    """Entry point of the sub-command."""
    args = parse(argv)
    started = time.perf_counter()
    listener = bind(args.host, args.port)
    address = reachable_address(args.host, listener.getsockname()[1])

    def ready(about: dict[str, Any]) -> None:
        what = ", ".join(f"{key} {value}" for key, value in ({"peak_mib": round(peak_memory_mib())} | about).items())
        print(f"{what}; loaded in {time.perf_counter() - started:.1f} s; serving on http://{address}", flush=True)
        if args.save_address_to:
            write_address(args.save_address_to, address)

    if args.workers == 1:
        serve(argv, None, listener, ready)
        return 0
    return serve_in_workers(listener, Worker(partial(serve, argv, check_once(args))), args.workers, ready)


def check_once(args: argparse.Namespace) -> State | None:
    """Check the index for all workers.

    Raises:
        UserError: it is damaged.
    """
    path: Path | None = args.index_path
    if args.engine is not None or path is None or not path.exists():
        return None
    try:
        manifest = open_manifest(path if path.is_dir() else path.parent)
    except DamagedIndex as error:
        raise refused(error) from error
    built_for = (manifest.encoder or manifest.kind) if manifest else args.retriever_name
    if built_for != args.retriever_name or (manifest is None and built_for == "bm25"):
        return None  # the workers say so
    return check_index(path, manifest, args.retriever_name)


def write_address(place: str | Path, address: str) -> None:
    """Write down where the server is; the file appears whole.

    `place`: the file; or a folder (it exists, or ends with a slash), for a file with the name that RLinf gives it.
    """
    path = Path(place)
    if path.is_dir() or os.fspath(place).endswith(os.sep):
        host, _, port = address.rpartition(":")
        path = path / f"Host{host}_IP{port}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f"{path.name}.partial")
    partial_path.write_text(address, encoding="utf-8")
    os.replace(partial_path, path)
