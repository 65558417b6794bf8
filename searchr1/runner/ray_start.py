"""Start Ray: a cluster of our own on one node, the user's where several nodes are wanted."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from searchr1.errors import UserError

SHOW_WORKER_LOGS = "SEARCHR1_WORKER_LOGS"


def worker_logs() -> str:
    """Where Ray keeps what workers print; `SEARCHR1_WORKER_LOGS=1` shows it on the console as well."""
    import ray

    try:
        return str(ray._private.worker._global_node.get_logs_dir_path())
    except AttributeError:
        return "Ray's log folder (<tmp>/ray/session_latest/logs)"


@contextmanager
def own_ray(num_nodes: int) -> Iterator[None]:
    """A Ray of our own on a single node, and the user's (`ray start`, RAY_ADDRESS) for more.

    RLinf joins whatever Ray it finds on the machine; two runs would then share one cluster and end together.
    """
    import ray

    if num_nodes > 1 or os.environ.get("RAY_ADDRESS"):
        yield
        return
    original = ray.init

    @functools.wraps(original)
    def init(**kwargs: Any) -> Any:
        if kwargs.get("address") == "auto":
            raise ConnectionError("a cluster of our own is wanted")
        show = os.environ.get(SHOW_WORKER_LOGS) == "1"
        kwargs["logging_level"] = logging.ERROR
        return original(address="local", include_dashboard=False, log_to_driver=show, **kwargs)

    ray.init = init
    try:
        yield
    except ConnectionError as error:
        raise UserError(f"cannot start Ray on this machine: {error}") from error
    finally:
        ray.init = original
