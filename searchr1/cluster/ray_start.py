"""Start Ray: a cluster of our own on one node, the user's where several nodes are wanted.

RLinf's `Cluster` calls `ray.init` without a limit of time and takes whatever cluster it finds. Everything that this project
wants otherwise is in here.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from searchr1.errors import UserError
from searchr1.files.temp_folder import RAY_BYTES, shorten_temp_folder

logger = logging.getLogger(__name__)

SHOW_WORKER_LOGS = "SEARCHR1_WORKER_LOGS"
PROBE_S = 5.0
"""For a connection to a cluster's port."""
JOIN_S = 60.0
"""For joining a cluster: a port that answers may still be of something else."""
NODES_S = 300.0
"""For the other nodes of a cluster to come."""
START_S = (30, 120)
"""For Ray's own processes, at the first and the second attempt."""
WAIT_S = 0.2
"""How long a thread that waits for a call stays in Ray at a time."""
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


def logs_folder() -> Path:
    """Where Ray keeps what workers print; `SEARCHR1_WORKER_LOGS=1` shows it on the console as well."""
    import ray

    node = ray._private.worker._global_node
    if node is None:
        return Path(tempfile.gettempdir()) / "ray/session_latest/logs"
    return Path(node.get_logs_dir_path())


def is_own(num_nodes: int) -> bool:
    """Whether a run starts a Ray of its own."""
    return num_nodes == 1 and os.environ.get("RAY_ADDRESS", "").strip() in ("", "local")


@contextmanager
def own_ray(num_nodes: int) -> Iterator[None]:
    """A Ray of our own on a single node, and the user's (`ray start`, RAY_ADDRESS) for more.

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

        with _replaced_init(init):
            yield
        return
    require_cluster(address)

    def join(original: Callable[..., Any], **kwargs: Any) -> Any:
        try:
            return original(**kwargs)
        except Exception as error:
            raise UserError(_cannot_join(address, str(error))) from error

    with _replaced_init(join), _limited_wait(num_nodes, address):
        yield


@contextmanager
def _replaced_init(init: Callable[..., Any]) -> Iterator[None]:
    """Let RLinf call `init` for `ray.init`, which it gets as its first argument."""
    import ray

    original = ray.init
    ray.init = functools.partial(init, original)
    try:
        yield
    finally:
        ray.init = original


@contextmanager
def _limited_wait(wanted: int, address: str) -> Iterator[None]:
    """Let RLinf ask for the cluster's nodes until there are enough, but not without end."""
    from rlinf.scheduler import Cluster

    nodes, started = Cluster.get_alive_nodes, time.monotonic()

    def listed() -> list[Any]:
        there: list[Any] = nodes()
        if len(there) < wanted and time.monotonic() - started > NODES_S:
            raise UserError(
                f"cluster.num_nodes: {wanted} nodes are wanted, and after {NODES_S:.0f} s the Ray cluster at {address} has "
                f"{len(there)}; run ray start --address={address} on the others, or lower it"
            )
        return there

    Cluster.get_alive_nodes = staticmethod(listed)
    try:
        yield
    finally:
        Cluster.get_alive_nodes = staticmethod(nodes)


def cluster_address(num_nodes: int) -> str | None:
    """HOST:PORT of the cluster to join; None if one of our own is wanted.

    Raises:
        UserError: RAY_ADDRESS is not such an address, or there is no cluster.
    """
    from ray._common.network_utils import parse_address
    from ray._private import services

    given = os.environ.get("RAY_ADDRESS", "").strip()
    if is_own(num_nodes):
        return None
    if given == "local":
        raise UserError(f"RAY_ADDRESS: local is one node, cluster.num_nodes is {num_nodes}; give the cluster's HOST:PORT")
    if "://" in given:
        raise UserError(
            f"RAY_ADDRESS: {given} is an address for clients, through which no worker groups can be started; give the "
            "cluster's own HOST:PORT (its port is 6379 unless ray start was told otherwise)"
        )
    if given not in ("", "auto"):
        parsed = parse_address(given)
        if parsed is None or not parsed[0] or not parsed[1].isdecimal() or not 0 < int(parsed[1]) < 65536:
            raise UserError(f"RAY_ADDRESS: {given} is no address; give HOST:PORT, or unset it")
    try:
        return str(services.canonicalize_bootstrap_address(given or "auto"))
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
    words = [sys.executable, "-c", JOIN]
    try:
        tried = subprocess.run(words, capture_output=True, timeout=JOIN_S, check=False, env=os.environ | {"PYTHONUTF8": "1"})
    except subprocess.TimeoutExpired:
        raise UserError(
            f"RAY_ADDRESS: {address} answers, but not as a Ray cluster does within {JOIN_S:.0f} s; restart the cluster, or "
            "give another address"
        ) from None
    if tried.returncode:
        errors = tried.stderr.decode("utf-8", "replace")
        said = tried.stdout.decode("utf-8", "replace").strip() or errors.strip()[-LONGEST_REASON:] or "no reason is given"
        hint = " (RAY_AUTH_MODE=token sends this user's token)" if "InvalidAuthToken" in errors + said else ""
        raise UserError(_cannot_join(address, said) + hint)


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
            with _start_timeout(seconds):
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


@contextmanager
def _start_timeout(seconds: int) -> Iterator[None]:
    """Let Ray wait this long for each of its processes; what the user's environment says goes before."""
    from ray._private import services

    original = services.get_node
    limits = {
        "RAY_gcs_server_port_wait_time_s": str(seconds),
        "RAY_agent_register_timeout_ms": str(1000 * seconds),
        "RAY_raylet_start_wait_time_s": str(seconds),
    }
    limits = {name: value for name, value in limits.items() if name not in os.environ}

    def get_node(*args: Any, **kwargs: Any) -> Any:
        end = time.monotonic() + seconds
        while True:
            try:
                return original(*args, **kwargs)
            except RuntimeError:
                if _raylet_has_ended():
                    raise ConnectionError("Ray's raylet has ended") from None
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    services.get_node = get_node
    if seconds > START_S[0]:
        os.environ.update(limits)
    try:
        yield
    finally:
        services.get_node = original
        for name in limits:
            os.environ.pop(name, None)


def _raylet_has_ended() -> bool:
    """Whether this process has no raylet that runs; Ray itself waits for it all the same."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name() == "raylet" and child.status() != psutil.STATUS_ZOMBIE:
                return False
    return True


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _end(before: set[psutil.Process]) -> None:
    """End what an attempt has left: its processes, and what this process knows of them."""
    import ray

    ray.shutdown()
    left = _children() - before
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)


def _warn_of_small_shared_memory() -> None:
    from ray._private import utils

    there = utils.get_shared_memory_bytes()
    wanted = utils.resolve_object_store_memory(utils.estimate_available_memory())
    if there < wanted:
        print(
            f"warning: /dev/shm has {there / 2**30:.2f} GiB free, so Ray keeps its objects ({wanted / 2**30:.1f} GiB) "
            "in a folder for temporary files, which is slower; enlarge it (docker: --shm-size)",
            file=sys.stderr, flush=True,
        )  # fmt: skip


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON]


@contextmanager
def own_handlers(when_up: Callable[[], None]) -> Iterator[None]:
    """Keep this process's handler of SIGTERM: Ray's ends the driver in the middle of whatever it does.

    Ray sets two: one of Python's, and one of C++ that prints a stack as after a crash, behind Python's back.

    Args:
        when_up: called once Ray is up; an attempt that fails ends its own processes before, and is followed by another one.
    """
    import ray

    original_init, original_set = ray.init, ray._private.utils.set_sigterm_handler

    @functools.wraps(original_init)
    def init(*args: Any, **kwargs: Any) -> Any:
        try:
            context = original_init(*args, **kwargs)
            when_up()
            return context
        finally:
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))

    ray.init, ray._private.utils.set_sigterm_handler = init, lambda handler: None
    try:
        yield
    finally:
        ray.init, ray._private.utils.set_sigterm_handler = original_init, original_set


class Waits:
    """Threads that wait for calls of worker groups. They leave Ray before it is shut down.

    A thread that asks Ray for something after its shutdown ends the whole process, with exit code 1 and without Python's own
    end: nothing would be said, and nothing put away.
    """

    def __init__(self) -> None:
        self._leaving = threading.Event()
        self._changed = threading.Condition()
        self._waiting = 0

    def results(self, references: Sequence[Any]) -> list[Any] | None:
        """Return what calls return, as soon as all have; None if `end` comes first.

        Raises:
            Exception: what the first call that fails has raised, at once.
        """
        import ray

        with self._changed:
            self._waiting += 1
        try:
            found: dict[Any, Any] = {}
            while len(found) < len(references):
                if self._leaving.is_set():
                    return None
                waited_for = [reference for reference in references if reference not in found]
                ready, _ = ray.wait(waited_for, num_returns=1, timeout=WAIT_S)
                found.update(zip(ready, ray.get(ready), strict=True))
            return [found[reference] for reference in references]
        finally:
            with self._changed:
                self._waiting -= 1
                self._changed.notify_all()

    def end(self, timeout_s: float) -> bool:
        """Let all of them leave; returns whether they have."""
        self._leaving.set()
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting == 0, timeout_s)


def report_failures(failures: list[BaseException]) -> Waits:
    """Collect what Ray says about failed calls and dying processes, instead of printing 20 lines of it.

    A call that fails puts its exception into `failures` and wakes this process with SIGUSR1. Returns what waits for calls
    from here on.
    """
    import ray
    from rlinf.scheduler.worker.worker_group import WorkerGroupFuncResult

    waits = Waits()

    def wait_for_results(self: Any) -> None:
        try:
            results = waits.results(self._remote_results)
        except Exception as error:  # as RLinf's own, which prints it and ends the driver
            failures.append(error)
            os.kill(os.getpid(), signal.SIGUSR1)
        else:
            self._local_results, self._wait_done = results, results is not None

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
    return waits


def shut_down(timeout_s: float) -> None:
    """Leave Ray, and end it if it is ours; it may not answer when some of it has died."""
    import ray

    def leave() -> None:
        with suppress(Exception):  # of servers that have gone
            ray.shutdown()

    thread = threading.Thread(target=leave, name="ray.shutdown", daemon=True)
    thread.start()
    thread.join(timeout_s)
