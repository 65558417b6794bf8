"""Fixtures of the learner's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import policy_ranks


@pytest.fixture(scope="module", autouse=True)
def no_idle_ranks() -> Iterator[None]:
    """End a file's ranks with it: torch's threads in a rank that waits for jobs take half a core."""
    yield
    policy_ranks.close_all()
