"""How long a request may take: the larger it is, the longer. Servers and clients count alike."""

from __future__ import annotations

QUERIES_PER_TIMEOUT = 512
PAIRS_PER_TIMEOUT = 5120
"""Of query and passage, for a reranker."""


def grown(timeout_s: float, count: int, per: int) -> float:
    """`timeout_s` for every `per` things of a request, and for what is left over."""
    return timeout_s * max(-(-count // per), 1)
