"""Every workaround of Ray and RLinf, each with its reason: what they would do otherwise, and their private names.

Nothing else in this project imports RLinf, replaces a function of either, or uses a name that begins with an underscore.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from searchr1.errors import UserError

os.environ.setdefault("RLINF_LOG_LEVEL", "WARNING")  # RLinf reads it once, when it is imported

from rlinf.scheduler import (
    Channel,
    Cluster,
    FlexiblePlacementStrategy,
    NodePlacementStrategy,
    Worker,
)

__all__ = ["Channel", "Cluster", "NodePlacementStrategy", "Worker"]

logger = logging.getLogger(__name__)

SHOW_WORKER_LOGS = "SEARCHR1_WORKER_LOGS"
"""Environment variable: 1 shows what workers print on the console."""
RAY_START_S = 30
"""How long Ray itself waits for each of its processes."""
WAIT_S = 0.2
"""How long a thread that waits for a call stays in Ray at a time."""

# Names by which the processes and logs of a run are recognised.
MANAGERS = ("WorkerManager", "CollectiveManager", "NodeManager", "DeviceLockManager", "PortLockManager")
"""RLinf's own actors, without which no worker group works."""
WORKER_MARK, WORKER_GROUP, WORKER_RANK = "RAY_ACTOR", "GROUP_NAME", "RANK"
"""Environment variables that RLinf sets in every worker process."""
LOG_MARKS = (":job_id:", ":actor_name:", ":task_name:")
"""Beginnings of the lines with which Ray marks its logs."""
SERVER_WARNING = re.compile(r"\[\S+ \S+ [WEF] ")
"""Beginning of a warning, an error or a fatal error of Ray's servers, which log much else."""


def _at_least_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


for _name in ("NodePlacementStrategy", "OrderedPlacement"):  # they set their own level back to INFO
    logging.getLogger(_name).addFilter(_at_least_warning)


class OrderedPlacement(FlexiblePlacementStrategy):
    """Processes on GPUs of one machine, both in the order in which they are given; RLinf's own strategy sorts them."""

    def __init__(self, gpus_of_ranks: Sequence[Sequence[int]]) -> None:
        super().__init__([list(gpus) for gpus in gpus_of_ranks])
        self._given = [list(gpus) for gpus in gpus_of_ranks]

    def get_placement(self, cluster: Any, isolate_accelerator: bool = True) -> list[Any]:
        """Return RLinf's placements, of which rank r has the GPUs given at r."""
        placements = {frozenset(p.local_hardware_ranks): p for p in super().get_placement(cluster, isolate_accelerator)}
        ordered = [placements[frozenset(gpus)] for gpus in self._given]
        for rank, (placement, gpus) in enumerate(zip(ordered, self._given, strict=True)):
            placement.rank = placement.local_rank = rank
            placement.local_hardware_ranks = list(gpus)
            placement.local_accelerator_rank = gpus[0]
            placement.visible_accelerators = [str(gpu) for gpu in gpus]
        return ordered


def gpu_placement(cluster: Any, ranks: Sequence[Sequence[int]], gpus: Sequence[int]) -> OrderedPlacement:
    """Place each rank on the GPUs of its slots.

    RLinf counts all GPUs of a machine, whatever `CUDA_VISIBLE_DEVICES` says, and sets that variable for every worker that it
    places on some. So workers are placed by the machine's numbers of the GPUs that this process was given.

    Args:
        cluster: RLinf's.
        ranks: slots of each.
        gpus: the machine's number of the GPU of each slot (`visible_gpus`).

    Raises:
        UserError: RLinf does not see these GPUs.
    """
    seen = cluster.get_node_info(0).num_accelerators
    if max(gpus) >= seen:
        raise UserError(
            f"cluster.device: torch uses GPU {max(gpus)}, but the driver's management library lists {seen} GPUs; check that "
            "nvidia-smi works here and lists them all"
        )
    return OrderedPlacement([[gpus[slot] for slot in slots] for slots in ranks])


@contextmanager
def without_gpus(cluster: Any) -> Iterator[None]:
    """Launch workers in the block as on a machine without GPUs.

    On one with GPUs RLinf sets `CUDA_VISIBLE_DEVICES` to all of them for workers that are placed on none, and opens NCCL
    (of which a torch for CPUs has none) beside gloo between any two workers, although only host memory is sent. Two
    workers of which one was launched in here speak gloo.
    """
    nodes = [cluster.get_node_info(rank) for rank in range(cluster.num_nodes)]
    hardware = [node.hardware_resources for node in nodes]
    for node in nodes:
        node.hardware_resources = []
    try:
        yield
    finally:
        for node, resources in zip(nodes, hardware, strict=True):
            node.hardware_resources = resources


@contextmanager
def replaced_init(init: Callable[..., Any]) -> Iterator[None]:
    """Let RLinf's `Cluster` call `init(ray.init, **arguments)`: it calls `ray.init` without a limit of time."""
    import ray

    original = ray.init
    ray.init = functools.partial(init, original)
    try:
        yield
    finally:
        ray.init = original


@contextmanager
def checked_nodes(check: Callable[[list[Any]], None]) -> Iterator[None]:
    """Call `check` with a cluster's nodes whenever RLinf asks for them: it asks without end until there are enough."""
    nodes = Cluster.get_alive_nodes

    def listed() -> list[Any]:
        alive: list[Any] = nodes()
        check(alive)
        return alive

    Cluster.get_alive_nodes = staticmethod(listed)
    try:
        yield
    finally:
        Cluster.get_alive_nodes = staticmethod(nodes)


@contextmanager
def start_timeout(seconds: int) -> Iterator[None]:
    """Let Ray wait this long for each of its processes; what the user's environment sets has precedence.

    Ray reads its limits from the environment, but asks for the new raylet only for 30 s, also when that has ended.
    """
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
    if seconds > RAY_START_S:
        os.environ.update(limits)
    try:
        yield
    finally:
        services.get_node = original
        for name in limits:
            os.environ.pop(name, None)


def _raylet_has_ended() -> bool:
    """Return whether this process has no raylet that runs."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name() == "raylet" and child.status() != psutil.STATUS_ZOMBIE:
                return False
    return True


def logs_folder() -> Path:
    """Return Ray's folder of logs, where what workers print is kept. There is no public way to ask."""
    import ray

    node = ray._private.worker._global_node
    if node is None:
        return Path(tempfile.gettempdir()) / "ray/session_latest/logs"
    return Path(node.get_logs_dir_path())


def bootstrap_address(address: str) -> str:
    """Return HOST:PORT of the cluster that `address` ("auto" or HOST:PORT) stands for.

    Raises:
        ConnectionError: there is no cluster.
    """
    from ray._private import services

    return str(services.canonicalize_bootstrap_address(address))


def is_host_and_port(address: str) -> bool:
    """Return whether Ray reads `address` as HOST:PORT."""
    from ray._common.network_utils import parse_address

    parsed = parse_address(address)
    return bool(parsed and parsed[0] and parsed[1].isdecimal() and 0 < int(parsed[1]) < 65536)


def object_store_bytes() -> tuple[int, int]:
    """Return the free bytes of /dev/shm and those that Ray's object store would take: Ray's own warning is 10 lines."""
    from ray._private import utils

    return utils.get_shared_memory_bytes(), utils.resolve_object_store_memory(utils.estimate_available_memory())


@contextmanager
def own_sigterm_handler(when_up: Callable[[], None]) -> Iterator[None]:
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


@contextmanager
def own_failure_handler(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Keep SIGUSR1, which reports a failed call, for `handler`: RLinf's `Cluster` sets one that ends the driver."""
    signal.signal(signal.SIGUSR1, handler)
    yield
    signal.signal(signal.SIGUSR1, handler)


class Waits:
    """Threads that wait for calls of worker groups, which leave Ray before it is shut down.

    A thread that asks Ray for something after its shutdown ends the whole process, with exit code 1 and without Python's own
    end: nothing would be reported, and nothing put away.
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
            results: dict[Any, Any] = {}
            while len(results) < len(references):
                if self._leaving.is_set():
                    return None
                waited_for = [reference for reference in references if reference not in results]
                ready, _ = ray.wait(waited_for, num_returns=1, timeout=WAIT_S)
                results.update(zip(ready, ray.get(ready), strict=True))
            return [results[reference] for reference in references]
        finally:
            with self._changed:
                self._waiting -= 1
                self._changed.notify_all()

    def end(self, timeout_s: float) -> bool:
        """Let all of them leave; return whether they have."""
        self._leaving.set()
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting == 0, timeout_s)


def report_failures(failures: list[BaseException]) -> Waits:
    """Collect what Ray reports about failed calls and dying processes: RLinf would end the driver, and Ray print 20 lines.

    A call that fails puts its exception into `failures` and wakes this process with SIGUSR1. Return what waits for calls
    from here on.
    """
    import ray
    from rlinf.scheduler.worker.worker_group import WorkerGroupFuncResult

    waits = Waits()

    def wait_for_results(self: Any) -> None:
        try:
            results = waits.results(self._remote_results)
        except Exception as error:
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
