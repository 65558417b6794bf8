"""Start Ray: a cluster of our own on one node, the user's where several nodes are wanted."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from searchr1.cluster.rlinf_compat import (
    RAY_START_S,
    SHOW_WORKER_LOGS,
    bootstrap_address,
    checked_nodes,
    is_host_and_port,
    logs_folder,
    object_store_bytes,
    replaced_init,
    start_timeout,
)
from searchr1.errors import UserError
from searchr1.files.temp_folder import RAY_BYTES, shorten_temp_folder

PROBE_S = 5.0
"""For a connection to a cluster's port."""
JOIN_S = 60.0
"""For joining a cluster: a port that answers may still be of something else."""
NODES_S = 300.0
"""For the other nodes of a cluster to come."""
START_S = (RAY_START_S, 120)
"""For Ray's own processes, at the first and the second attempt."""
LONGEST_REASON = 600
JOIN = """
import os, sys
import ray
try:
    ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
    ray.shutdown()
except BaseException as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    os._exit(1)
"""


def is_own(num_nodes: int) -> bool:
    """Return whether a run starts a Ray of its own."""
    return num_nodes == 1 and os.environ.get("RAY_ADDRESS", "").strip() in ("", "local")


@contextmanager
def own_ray(num_nodes: int) -> Iterator[None]:
    """Use a Ray of our own on a single node, and the user's (`ray start`, RAY_ADDRESS) for more.

    RLinf joins whatever Ray it finds on the machine; two runs would then share one cluster and end together.

    Raises:
        UserError: Ray does not start, or the cluster cannot be joined.
    """
    address = cluster_address(num_nodes)
    if address is None:
        shorten_temp_folder(RAY_BYTES)

        def init(original: Callable[..., Any], **kwargs: Any) -> Any:
            if kwargs.get("address") == "auto":
                raise ConnectionError("a cluster of our own is wanted")
            return start_own(original, **kwargs)

        with replaced_init(init):
            yield
        return
    require_cluster(address)

    def join(original: Callable[..., Any], **kwargs: Any) -> Any:
        try:
            return original(**kwargs)
        except Exception as error:
            raise UserError(_cannot_join(address, str(error))) from error

    started = time.monotonic()

    def require_soon(alive: list[Any]) -> None:
        if len(alive) < num_nodes and time.monotonic() - started > NODES_S:
            raise UserError(
                f"cluster.num_nodes: {num_nodes} nodes are wanted, and after {NODES_S:.0f} s the Ray cluster at {address} "
                f"has {len(alive)}; run ray start --address={address} on the others, or lower it"
            )

    with replaced_init(join), checked_nodes(require_soon):
        yield


def cluster_address(num_nodes: int) -> str | None:
    """Return HOST:PORT of the cluster to join; None if one of our own is wanted.

    Raises:
        UserError: RAY_ADDRESS is not such an address, or there is no cluster.
    """
    given = os.environ.get("RAY_ADDRESS", "").strip()
    if is_own(num_nodes):
        return None
    if given == "local":
        raise UserError(f"RAY_ADDRESS: local is one node, cluster.num_nodes is {num_nodes}; give the cluster's HOST:PORT")
    if "://" in given:
        raise UserError(
            f"RAY_ADDRESS: {given} is an address for clients, through which no worker groups can be started; give the "
            "cluster's own HOST:PORT (its port is 6379 unless ray start got another)"
        )
    if given not in ("", "auto") and not is_host_and_port(given):
        raise UserError(f"RAY_ADDRESS: {given} is not an address; give HOST:PORT, or unset it")
    try:
        return bootstrap_address(given or "auto")
    except ConnectionError as error:
        key = "RAY_ADDRESS" if given else "cluster.num_nodes"
        raise UserError(
            f"{key}: no Ray cluster runs on this node; start one (ray start --head here, ray start --address=HOST:6379 on "
            "the other nodes), or set RAY_ADDRESS to HOST:PORT of one"
        ) from error


def require_cluster(address: str) -> None:
    """Look whether a cluster can be joined, before this process tries to: Ray's own attempt has no end.

    Raises:
        UserError: nothing answers, or something else, or a cluster of another version.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S).close()
    except OSError as error:
        reason = error.strerror or str(error) or "no answer"
        raise UserError(
            f"RAY_ADDRESS: nothing answers at {address} ({reason}); start the cluster (ray start), or unset RAY_ADDRESS "
            "where a Ray of the run's own will do"
        ) from error
    words, env = [sys.executable, "-c", JOIN], os.environ | {"PYTHONUTF8": "1", "RAY_ADDRESS": address}
    try:
        tried = subprocess.run(words, capture_output=True, timeout=JOIN_S, check=False, env=env)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"RAY_ADDRESS: {address} answers, but not as a Ray cluster does within {JOIN_S:.0f} s; restart the cluster, or "
            "give another address"
        ) from None
    if tried.returncode:
        errors = tried.stderr.decode("utf-8", "replace")
        reason = tried.stdout.decode("utf-8", "replace").strip() or errors.strip()[-LONGEST_REASON:] or "no reason is given"
        hint = " (RAY_AUTH_MODE=token sends this user's token)" if "InvalidAuthToken" in errors + reason else ""
        raise UserError(_cannot_join(address, reason) + hint)


def _cannot_join(address: str, reason: str) -> str:
    return (
        f"RAY_ADDRESS: the Ray cluster at {address} cannot be joined: {' '.join(reason.split())[:LONGEST_REASON]}; start "
        "one with the same versions of Ray and Python, or unset RAY_ADDRESS"
    )


def start_own(start: Callable[..., Any], **kwargs: Any) -> Any:
    """Start a Ray for this process; once more, with more time, if it did not come up.

    Args:
        start: `ray.init`.
        kwargs: more of its arguments.

    Raises:
        UserError: it did not start.
    """
    show = os.environ.get(SHOW_WORKER_LOGS) == "1"
    kwargs |= {"address": "local", "include_dashboard": False, "log_to_driver": show, "logging_level": logging.ERROR}
    _warn_of_small_shared_memory()
    reasons: list[str] = []
    for seconds in START_S:
        before = _children()
        try:
            with start_timeout(seconds):
                return start(**kwargs)
        except (OSError, ValueError) as error:
            if not isinstance(error, (ConnectionError, TimeoutError)):  # the same would come again
                _end(before)
                raise UserError(f"cannot start Ray on this machine: {_one_line(error)}") from error
            reasons.append(_one_line(error))
        except Exception as error:
            reasons.append(_one_line(error))
        _end(before)
        if len(reasons) < len(START_S):
            print(
                f"Ray did not start ({reasons[-1]}); trying once more, with {START_S[len(reasons)]} s for its processes",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    raise UserError(
        f"cannot start Ray on this machine, tried {len(reasons)} times: {reasons[-1]}; end other work on it, look whether "
        f"ulimit -u and ulimit -n, memory and the disk leave room, and see {logs_folder()}"
    )


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _end(before: set[psutil.Process]) -> None:
    """End what an attempt has left: its processes, and Ray's state in this process."""
    import ray

    ray.shutdown()
    left = _children() - before
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)


def _warn_of_small_shared_memory() -> None:
    there, wanted = object_store_bytes()
    if there < wanted:
        print(
            f"warning: /dev/shm has {there / 2**30:.2f} GiB free, so Ray keeps its objects ({wanted / 2**30:.1f} GiB) "
            "in a folder for temporary files, which is slower; enlarge it (docker: --shm-size)",
            file=sys.stderr, flush=True,
        )  # fmt: skip


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON]


def shut_down(timeout_s: float) -> None:
    """Leave Ray, and end it if it is ours; it may not answer when some of it has died."""
    import ray

    def leave() -> None:
        with suppress(Exception):  # of servers that have gone
            ray.shutdown()

    thread = threading.Thread(target=leave, name="ray.shutdown", daemon=True)
    thread.start()
    thread.join(timeout_s)
