"""A reranker in another process: POST /rerank of `searchr1 rerank-server`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from typing import Any

import aiohttp

from searchr1.errors import UserError
from searchr1.retrieval.client.answers import read_error, read_json
from searchr1.retrieval.client.client import base_url
from searchr1.retrieval.documents import PAIRS_PER_TIMEOUT, encode_json, scaled_timeout
from searchr1.retrieval.searcher import Document, SearchFailed, SearchResults

RERANK_TOKEN_VARIABLE = "SEARCHR1_RERANK_TOKEN"
"""The rerank server's bearer token; read by the server too."""
RETRY_AFTER_S = 1.0
SENT_CHARACTERS = 1 << 15
"""Most characters of a passage: as many as a model of 8192 tokens reads."""
CALL_CHARACTERS = 1 << 22
"""Most characters of one call, about: rerank servers take no more than 16 MiB, and a character is at most 3 bytes."""
KEPT_S = 4.0
"""Idle connections are closed before the server does so, after 5 s: a request could be lost in between."""


class RemoteReranker:
    """A `Reranker` that returns the passages that it was given, not the server's copies."""

    def __init__(self, address: str, timeout_s: float = 30.0) -> None:
        """Make a client; `timeout_s` is for a whole call of 5,120 pairs, larger requests have more.

        Raises:
            UserError: no address.
        """
        try:
            self._url = f"{base_url(address.rstrip('/').removesuffix('/rerank'))}/rerank"
        except UserError as error:
            raise UserError(f"--reranker_url {address}: is not an address; give host:port of the rerank server") from error
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def rerank(self, queries: Sequence[str], documents: Sequence[Sequence[Document]], topk: int) -> SearchResults:
        """Return the best `topk` of each query's documents.

        Raises:
            SearchFailed: the server did not answer, or not as expected.
        """
        # The server answers one call after the other, so each may take as long as all of them.
        timeout_s = scaled_timeout(self._timeout_s, sum(map(len, documents)), PAIRS_PER_TIMEOUT)
        calls = [
            asyncio.ensure_future(self._call(queries[part], documents[part], topk, timeout_s)) for part in parts(documents)
        ]
        try:
            return [hits for results in await asyncio.gather(*calls) for hits in results]
        finally:
            for call in calls:
                call.cancel()

    async def aclose(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def _call(
        self, queries: Sequence[str], documents: Sequence[Sequence[Document]], topk: int, timeout_s: float
    ) -> SearchResults:
        body = {
            "queries": list(queries),
            "documents": [[{"id": i, "contents": sent(document)} for i, document in enumerate(row)] for row in documents],
            "rerank_topk": topk,
            "return_scores": True,
        }
        headers = {"content-type": "application/json"}
        try:
            limit = aiohttp.ClientTimeout(total=timeout_s)
            async with self._open().post(self._url, data=encode_json(body), headers=headers, timeout=limit) as answer:
                if answer.status != 200:
                    reason = (await read_error(answer))[:200]
                    raise SearchFailed(f"{self._url} answered {answer.status}: {reason}", RETRY_AFTER_S)
                result = (await read_json(answer))["result"]
            return [ranked(row, items, topk) for row, items in zip(documents, result, strict=True)]
        except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError) as error:
            raise SearchFailed(f"{self._url}: {type(error).__name__} {error}".strip(), RETRY_AFTER_S) from error

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            token = os.environ.get(RERANK_TOKEN_VARIABLE)
            self._session = aiohttp.ClientSession(
                headers={"Authorization": f"Bearer {token}"} if token else {},
                connector=aiohttp.TCPConnector(keepalive_timeout=KEPT_S),
            )
        return self._session


def sent(document: Document) -> str:
    """Return the text of a passage that is sent."""
    return str(document.get("contents", ""))[:SENT_CHARACTERS]


def parts(documents: Sequence[Sequence[Document]]) -> Iterator[slice]:
    """Yield neighbouring queries whose passages fit into one call; a query's passages stay together."""
    start = characters = 0
    for query, row in enumerate(documents):
        more = sum(len(sent(document)) for document in row)
        if query > start and characters + more > CALL_CHARACTERS:
            yield slice(start, query)
            start, characters = query, 0
        characters += more
    if start < len(documents):
        yield slice(start, len(documents))


def ranked(documents: Sequence[Document], items: Sequence[dict[str, Any]], topk: int) -> list[tuple[Document, float]]:
    """Return the passages that were sent in the order of a server's answer for one query.

    Raises:
        ValueError, LookupError, TypeError: the answer is not about these passages.
    """
    places = [int(item["document"]["id"]) for item in items]
    if len(set(places)) != min(topk, len(documents)) or len(places) != len(set(places)) or min(places, default=0) < 0:
        raise ValueError(f"{len(places)} passages in the answer, of {len(documents)} that were sent")
    return [(documents[place], float(item["score"])) for place, item in zip(places, items, strict=True)]
