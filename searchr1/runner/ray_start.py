"""Start Ray: a cluster of our own on one node, the user's where several nodes are wanted."""

from __future__ import annotations

import functools
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from searchr1.errors import UserError

logger = logging.getLogger(__name__)

SHOW_WORKER_LOGS = "SEARCHR1_WORKER_LOGS"


def logs_folder() -> Path:
    """Where Ray keeps what workers print; `SEARCHR1_WORKER_LOGS=1` shows it on the console as well."""
    import ray

    node = ray._private.worker._global_node
    if node is None:
        return Path(tempfile.gettempdir()) / "ray/session_latest/logs"
    return Path(node.get_logs_dir_path())


def is_own(num_nodes: int) -> bool:
    """Whether a run starts a Ray of its own."""
    return num_nodes == 1 and not os.environ.get("RAY_ADDRESS")


@contextmanager
def own_ray(num_nodes: int) -> Iterator[None]:
    """A Ray of our own on a single node, and the user's (`ray start`, RAY_ADDRESS) for more.

    RLinf joins whatever Ray it finds on the machine; two runs would then share one cluster and end together.
    """
    import ray

    if not is_own(num_nodes):
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


@contextmanager
def own_handlers() -> Iterator[None]:
    """Keep this process's handler of SIGTERM: Ray's ends the driver in the middle of whatever it does.

    Ray sets two: one of Python's, and one of C++ that prints a stack as after a crash, behind Python's back.
    """
    import ray

    original_init, original_set = ray.init, ray._private.utils.set_sigterm_handler

    @functools.wraps(original_init)
    def init(*args: Any, **kwargs: Any) -> Any:
        try:
            return original_init(*args, **kwargs)
        finally:
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))

    ray.init, ray._private.utils.set_sigterm_handler = init, lambda handler: None
    try:
        yield
    finally:
        ray.init, ray._private.utils.set_sigterm_handler = original_init, original_set


def report_failures(failures: list[BaseException]) -> None:
    """Collect what Ray says about failed calls and dying processes, instead of printing 20 lines of it.

    A call that fails puts its exception into `failures` and wakes this process with SIGUSR1.
    """
    import ray
    from rlinf.scheduler.worker.worker_group import WorkerGroupFuncResult

    def wait_for_results(self: Any) -> None:
        try:
            self._local_results = ray.get(self._remote_results)
        except Exception as error:  # as RLinf's own, which prints it and ends the driver
            failures.append(error)
            os.kill(os.getpid(), signal.SIGUSR1)
        else:
            self._wait_done = True

    WorkerGroupFuncResult._wait_for_results = wait_for_results
    show = ray._private.worker.print_to_stdstream
    if os.environ.get(SHOW_WORKER_LOGS) != "1" and show.__module__ != __name__:  # once in a process

        def log_or_show(data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            if data.get("pid") == "raylet":
                for line in data["lines"]:
                    logger.debug("Ray: %s", line)
            else:
                show(data, *args, **kwargs)

        ray._private.worker.print_to_stdstream = log_or_show


def shut_down(timeout_s: float) -> None:
    """Leave Ray, and end it if it is ours; it may not answer when some of it has died."""
    import ray

    def leave() -> None:
        with suppress(Exception):  # of servers that have gone
            ray.shutdown()

    thread = threading.Thread(target=leave, name="ray.shutdown", daemon=True)
    thread.start()
    thread.join(timeout_s)
