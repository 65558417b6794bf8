from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest
import ray
from ray._private import services
from rlinf.scheduler import Cluster

from searchr1.cluster import ray_start, rlinf_compat
from searchr1.cluster.ray_start import cluster_address, own_ray, require_cluster, start_own
from searchr1.errors import UserError

TIMED_OUT = Exception(
    "The current node timed out during startup. This could happen because some of the raylet failed to startup or the GCS "
    "has become overloaded."
)
"""What Ray raises where its raylet is not up within 30 s, class and text."""


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize(
    ("given", "nodes", "expected"),
    [
        (None, 1, None),
        ("", 1, None),
        ("local", 1, None),
        ("10.0.0.5:6379", 1, "10.0.0.5:6379"),
        (" head.example:6380 ", 4, "head.example:6380"),
        ("[fd00::1]:6379", 2, "[fd00::1]:6379"),
    ],
)
def test_which_cluster_is_joined(monkeypatch, given, nodes, expected):
    if given is not None:
        monkeypatch.setenv("RAY_ADDRESS", given)
    assert cluster_address(nodes) == expected


@pytest.mark.parametrize("given", ["head", "head:", ":6379", "head:port", "head:0", "head:70000", "a b"])
def test_what_is_no_address_is_rejected(monkeypatch, given):
    monkeypatch.setenv("RAY_ADDRESS", given)
    with pytest.raises(UserError, match=rf"^RAY_ADDRESS: {given} is not an address; give HOST:PORT"):
        cluster_address(1)


@pytest.mark.parametrize("given", ["ray://head:10001", "http://head:8265", "anyscale://x"])
def test_addresses_for_clients_are_rejected(monkeypatch, given):
    monkeypatch.setenv("RAY_ADDRESS", given)
    with pytest.raises(UserError, match=f"^RAY_ADDRESS: {given} is an address for clients.*the cluster's own HOST:PORT"):
        cluster_address(1)


def test_several_nodes_need_a_cluster(monkeypatch):
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: set())
    monkeypatch.setattr(services, "find_bootstrap_address", lambda temp_dir: None)
    with pytest.raises(UserError, match=r"^cluster\.num_nodes: no Ray cluster runs on this node; start one \(ray start"):
        cluster_address(2)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(UserError, match=r"^RAY_ADDRESS: no Ray cluster runs on this node"):
        cluster_address(1)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(UserError, match=r"^RAY_ADDRESS: local is one node, cluster\.num_nodes is 2"):
        cluster_address(2)


def test_a_cluster_of_the_past_is_reported_where_auto_finds_it(monkeypatch):
    port = free_port()
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: set())
    monkeypatch.setattr(services, "find_bootstrap_address", lambda temp_dir: f"127.0.0.1:{port}")  # ray_current_cluster
    address = cluster_address(2)
    assert address is not None
    assert address.endswith(f":{port}")
    with pytest.raises(UserError, match="nothing answers"):
        require_cluster(address)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_cluster_that_is_gone_is_reported_at_once(monkeypatch, nodes):
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    before, started = ray.init, time.monotonic()
    port = address.partition(":")[2]
    with pytest.raises(
        UserError, match=rf"^RAY_ADDRESS: nothing answers at [\d.]+:{port} \(Connection refused\); start the"
    ):
        with own_ray(nodes):
            raise AssertionError("nothing is started")
    assert time.monotonic() - started < 5
    assert ray.init is before


def test_a_host_that_does_not_exist_is_reported():
    with pytest.raises(UserError, match=r"^RAY_ADDRESS: nothing answers at no-such-host\.invalid:6379 \("):
        require_cluster("no-such-host.invalid:6379")


def test_a_port_of_something_else_is_reported_after_a_while(monkeypatch):
    monkeypatch.setattr(ray_start, "JOIN_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"^RAY_ADDRESS: {address} answers, but not as a Ray cluster does within"):
            require_cluster(address)


@pytest.mark.parametrize(
    ("said", "errors", "expected"),
    [
        ("RuntimeError: Version mismatch: The cluster was started with:\n    Ray: 2.1.0\n    Python: 3.9.1", "",
         "RuntimeError: Version mismatch: The cluster was started with: Ray: 2.1.0 Python: 3.9.1; start one with the same"),
        ("", "E 2026 InvalidAuthToken: Unauthenticated", "RAY_AUTH_MODE=token sends this user's token"),
        ("", "", "no reason is given"),
    ],
)  # fmt: skip
def test_why_a_cluster_cannot_be_joined(monkeypatch, said, errors, expected):
    code = f"import sys; print({said!r}); print({errors!r}, file=sys.stderr); sys.exit(1)"
    monkeypatch.setattr(ray_start, "JOIN", code)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        with pytest.raises(UserError) as caught:
            require_cluster(f"127.0.0.1:{listening.getsockname()[1]}")
    assert str(caught.value).startswith("RAY_ADDRESS: the Ray cluster at 127.0.0.1:")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def joined(monkeypatch, init: Any) -> None:
    monkeypatch.setattr(ray_start, "cluster_address", lambda nodes: "10.0.0.5:6379")
    monkeypatch.setattr(ray_start, "require_cluster", lambda address: None)
    monkeypatch.setattr(ray, "init", init)


def test_a_cluster_that_goes_while_it_is_joined_is_no_reason_to_start_another(monkeypatch):
    def goes(**_: Any) -> None:
        raise ConnectionError("gone")

    joined(monkeypatch, goes)
    with own_ray(2), pytest.raises(UserError, match=r"10\.0\.0\.5:6379 cannot be joined: gone"):
        ray.init(address="auto")


def test_nodes_that_do_not_come_are_not_waited_for_without_end(monkeypatch):
    joined(monkeypatch, lambda **_: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}, {"Alive": False}])
    with own_ray(2):
        assert len(Cluster.get_alive_nodes()) == 1
        monkeypatch.setattr(ray_start, "NODES_S", -1.0)
        with pytest.raises(UserError, match=r"^cluster\.num_nodes: 2 nodes are wanted.*at 10\.0\.0\.5:6379 has 1; run ray"):
            Cluster.get_alive_nodes()
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * 2)
        assert len(Cluster.get_alive_nodes()) == 2
    assert len(Cluster.get_alive_nodes()) == 2


WAIT = "RAY_gcs_server_port_wait_time_s"


class Starts:
    """`ray.init` that fails in these ways, one after the other, each time leaving a process behind."""

    def __init__(self, *failures: Exception | None) -> None:
        self.failures = list(failures)
        self.left: list[subprocess.Popen[bytes]] = []
        self.given: list[dict[str, Any]] = []
        self.waits: list[str | None] = []

    def __call__(self, **given: Any) -> str:
        self.given.append(given)
        self.waits.append(os.environ.get(WAIT))
        failure = self.failures.pop(0)
        if failure is None:
            return "up"
        self.left.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        raise failure


@pytest.mark.parametrize(
    "failure", [TIMED_OUT, RuntimeError("Failed to start GCS."), TimeoutError("port"), ConnectionError()]
)
def test_a_ray_that_is_slow_to_start_gets_more_time(monkeypatch, capfd, failure):
    starts = Starts(failure, None)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert start_own(starts, namespace="n") == "up"
        assert [given["address"] for given in starts.given] == ["local", "local"]
        assert starts.waits == [None, "120"]
        assert WAIT not in os.environ
        assert not psutil.pid_exists(starts.left[0].pid)  # what the first attempt left is gone before the second
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait(30)
    assert "trying once more, with 120 s" in capfd.readouterr().err


def test_a_ray_that_does_not_start_is_one_sentence():
    starts = Starts(TIMED_OUT, TIMED_OUT)
    with pytest.raises(
        UserError, match=r"^cannot start Ray on this machine, tried 2 times: Exception: The current node timed"
    ):
        start_own(starts)
    assert not any(psutil.pid_exists(process.pid) for process in starts.left)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), ValueError("object store")])
def test_what_would_come_again_is_not_tried_again(failure):
    starts = Starts(failure, None)
    with pytest.raises(
        UserError, match=rf"^cannot start Ray on this machine: {type(failure).__name__}: .*{failure.args[-1]}"
    ):
        start_own(starts)
    assert len(starts.given) == 1


def test_the_second_attempt_waits_for_the_raylet(monkeypatch):
    asked: list[float] = []

    def late(address: str, node: str) -> dict[str, str]:
        asked.append(time.monotonic())
        if len(asked) < 3:
            raise RuntimeError("not there yet")
        return {"node": node}

    monkeypatch.setattr(services, "get_node", late)

    def start(**_: Any) -> Any:
        return services.get_node("address", "id")

    monkeypatch.setattr(rlinf_compat, "_raylet_has_ended", lambda: False)
    with rlinf_compat.start_timeout(120):
        assert start() == {"node": "id"}
    assert services.get_node is late
    asked.clear()
    monkeypatch.setattr(rlinf_compat, "_raylet_has_ended", lambda: True)
    with rlinf_compat.start_timeout(30), pytest.raises(ConnectionError, match="raylet has ended"):
        start()
    assert len(asked) == 1


def test_a_small_shared_memory_is_reported(monkeypatch, capsys):
    from ray._private import utils

    monkeypatch.setattr(utils, "estimate_available_memory", lambda: 64 << 30)
    for size, warned in ((64 << 20, True), (32 << 30, False)):
        monkeypatch.setattr(utils, "get_shared_memory_bytes", lambda size=size: size)
        start_own(Starts(None))
        assert ("warning: /dev/shm has 0.06 GiB free" in capsys.readouterr().err) == warned


@pytest.mark.slow  # a real Ray takes 10 to 20 s to start and to end
@pytest.mark.timeout(240)
def test_a_real_ray_below_a_long_folder_and_beside_a_cluster_that_is_gone(tmp_path):
    long = tmp_path / "ä" / ("x" * 80)
    long.mkdir(parents=True)
    code = (
        "import os, ray, tempfile\n"
        "from searchr1.cluster.ray_start import own_ray\n"
        "from searchr1.cluster.rlinf_compat import Cluster, logs_folder\n"
        "with own_ray(1):\n"
        "    cluster = Cluster(num_nodes=1)\n"
        "@ray.remote\n"
        "def where(): return tempfile.gettempdir()\n"
        "there = ray.get(where.remote())\n"
        "assert os.path.samefile(there, os.environ['LONG']) and len(there) < 40, there\n"
        "assert os.path.realpath(logs_folder()).startswith(os.path.realpath(os.environ['LONG'])), logs_folder()\n"
        "ray.shutdown(); print('up', there, flush=True)\n"
    )
    (long / "ray").mkdir()
    (long / "ray/ray_current_cluster").write_text("127.0.0.1:1")  # of a cluster that is gone
    env = os.environ | {"TMPDIR": str(long), "LONG": str(long)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=env, check=False)
    assert run.returncode == 0, run.stderr
    said, up = run.stdout.splitlines()[0], run.stdout.splitlines()[-1]
    assert said.startswith(
        f"TMPDIR: {long} is too long for sockets ({len(os.fsencode(str(long)))} bytes); reached as /tmp/sr1-"
    )
    assert up.startswith("up ")
    assert not os.path.lexists(up.removeprefix("up "))  # the shorter path is gone
