"""For all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Where test.sh puts what is only compared with; last, so that it hides nothing.
sys.path.append(str(Path(sys.prefix) / "oracles"))

# The tests' processes import `support` too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("searchr1", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("searchr1")

# Test processes that run beside each other share the cores. Before torch is imported; what tests start inherits it.
if "PYTEST_XDIST_WORKER" in os.environ:
    cores = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # who waits leaves its core to the other process


LONG = ("tests/e2e/", "tests/learner/")
"""Folders that begin: their tests take longest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Name what is not text by its argument: an archive holds the time, and every process must name a test the same."""
    return argname if isinstance(val, bytes) and not val.isascii() else None
