"""The retrieval server, its indexes and its client."""

from typing import TYPE_CHECKING

from searchr1.exports import export

if TYPE_CHECKING:
    from searchr1.retrieval.client.client import SearchClient, SearchUnavailable
    from searchr1.retrieval.documents import Page, RetrievedDocument
    from searchr1.retrieval.searcher import Searcher
else:
    __getattr__, __dir__ = export(
        __name__,
        {
            "client.client": ["SearchClient", "SearchUnavailable"],
            "documents": ["Page", "RetrievedDocument"],
            "searcher": ["Searcher"],
        },
    )

__all__ = [
    "Page",
    "RetrievedDocument",
    "SearchClient",
    "SearchUnavailable",
    "Searcher",
]
