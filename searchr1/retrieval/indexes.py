"""What a server searches: queries in, rows and scores out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Hits = list[tuple[int, float]]
"""(row, score), best first."""


class Index(Protocol):
    """What a server searches."""

    @property
    def rows(self) -> int:
        """Passages in the index."""
        ...

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        """At most `topk` hits for each query."""
        ...
