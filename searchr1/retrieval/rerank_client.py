"""A reranker on another machine: POST /rerank of `searchr1 rerank-server`, or of Search-R1's."""

from __future__ import annotations

import os
from collections.abc import Sequence

import aiohttp

from searchr1.retrieval.client import base_url
from searchr1.retrieval.searcher import Document, Found, SearchFailed


class RemoteReranker:
    """See `searchr1.retrieval.rerank.Reranker`."""

    def __init__(self, address: str, timeout_s: float = 30.0) -> None:
        self._url = f"{base_url(address).removesuffix('/rerank')}/rerank"
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def rerank(self, queries: Sequence[str], documents: Sequence[Sequence[Document]], topk: int) -> Found:
        """The best `topk` of each query's documents.

        Raises:
            SearchFailed: the server did not answer, or not as expected.
        """
        if self._session is None:
            token = os.environ.get("SEARCHR1_RERANK_TOKEN")
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            self._session = aiohttp.ClientSession(timeout=self._timeout, headers=headers)
        body = {"queries": list(queries), "documents": [list(row) for row in documents]}
        try:
            async with self._session.post(self._url, json=body | {"rerank_topk": topk, "return_scores": True}) as answer:
                if answer.status != 200:
                    raise SearchFailed(f"{self._url} answered {answer.status}: {(await answer.text())[:200]}", 1.0)
                result = (await answer.json())["result"]
            return [[(item["document"], float(item["score"])) for item in row] for row in result]
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
            raise SearchFailed(f"{self._url}: {type(error).__name__} {error}".strip(), 1.0) from error

    async def aclose(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
