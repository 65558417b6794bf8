"""The seams of retrieval: an index (queries in, rows and scores out) and a searcher that answers for the server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from searchr1.retrieval.documents import Page

Hits = list[tuple[int, float]]
"""(row, score), best first."""


class Index(Protocol):
    """What a server searches."""

    @property
    def rows(self) -> int:
        """Number of passages in the index."""
        ...

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        """Return at most `topk` hits for each query."""
        ...


Document = dict[str, Any]
"""A passage as it travels: `{"id", "contents", "url"?}`."""

SearchResults = list[list[tuple[Document, float]]]
"""For each query (passage, score), best first."""


BatchObserver = Callable[[int, float], None]
"""Called after every batch with the number of its queries, or pairs, and the seconds that it took."""


class SearchFailed(Exception):
    """A search that cannot be answered now; the server answers 503 with the message.

    `retry_after_s`: when it may be worth trying again, if known.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Searcher(Protocol):
    """Queries in, passages out; called from one event loop by many requests at once."""

    async def search(self, queries: Sequence[str], topk: int) -> SearchResults:
        """Return at most `topk` passages for each query.

        Raises:
            SearchFailed: no answer now; the message is for the client.
        """
        ...

    async def aclose(self) -> None:
        """Give back threads, connections and files."""
        ...


@runtime_checkable
class Reranks(Searcher, Protocol):
    """A searcher with a second stage."""

    async def search_reranked(self, queries: Sequence[str], topk_retrieval: int, topk_rerank: int) -> SearchResults:
        """Return the best `topk_rerank` of `topk_retrieval` passages for each query.

        Raises:
            SearchFailed: no answer now.
        """
        ...


class PageSource(Protocol):
    """Addresses in, pages out."""

    async def access(self, urls: Sequence[str]) -> list[Page | None]:
        """Return the page behind each address, or None."""
        ...
