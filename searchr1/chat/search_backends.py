"""Where the model searches: a retrieval server, an online engine in this process, or nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from searchr1.config.schema import SearchToolConfig
from searchr1.errors import UserError
from searchr1.retrieval.client.client import (
    ClientStats,
    SearchClient,
    SearchUnavailable,
    base_url,
    server_addresses,
    wait_until_healthy,
)
from searchr1.retrieval.documents import Page, RetrievedDocument, split_contents

HEALTH_SECONDS = 3.0
PROBE_SECONDS = 15.0


class OnlineBackend:
    """An online engine; its key comes from the environment."""

    def __init__(self, engine: str, topk: int, timeout_s: float, address: str | None, snippet_only: bool) -> None:
        """Prepare the engine; it connects at the first search.

        Raises:
            UserError: no such engine, or its key is missing.
        """
        from searchr1.retrieval.online.engines import ENGINES
        from searchr1.retrieval.online.searcher import OnlineSearcher

        if engine not in ENGINES:
            raise UserError(f"--engine {engine}: is not known; use one of {', '.join(ENGINES)}")
        self._topk = topk
        self._searcher = OnlineSearcher(
            ENGINES[engine], address=address, snippet_only=snippet_only, concurrency=32, timeout_s=timeout_s
        )

    @property
    def stats(self) -> ClientStats:
        """The engine's retries are its own affair."""
        return ClientStats()

    async def search(self, queries: Sequence[str]) -> list[list[RetrievedDocument]]:
        """Return passages for each query."""
        from searchr1.retrieval.searcher import SearchFailed

        try:
            results = await self._searcher.search(queries, self._topk)
        except SearchFailed as error:
            raise SearchUnavailable(str(error)) from error
        return [[_passage(document, score) for document, score in passages] for passages in results]

    async def access(self, urls: Sequence[str]) -> list[Page | None]:
        """Return pages of the public internet, as text."""
        return await self._searcher.access(urls)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._searcher.aclose()


def _passage(document: dict[str, object], score: float) -> RetrievedDocument:
    contents = str(document["contents"])
    title, text = split_contents(contents)
    return RetrievedDocument(str(document.get("id", "")), title, text, str(document.get("url") or ""), score, contents)


async def check_servers(search: SearchToolConfig) -> str | None:
    """Return what keeps the first retrieval server from answering, None if it answers. Servers of other systems, without a
    /health, are asked a question instead."""
    import asyncio

    address = server_addresses(search)[0]
    try:
        await asyncio.to_thread(wait_until_healthy, address, HEALTH_SECONDS)
        return None
    except UserError as error:
        problem = str(error)
    client = SearchClient.from_config(replace(search, server_addr=address, topk=1, timeout_s=PROBE_SECONDS, retries=0))
    try:
        await client.search(["test"])
        return None
    except SearchUnavailable as error:
        return f"{problem}; a search got: {error}" if "answered" in problem else f"no answer from {base_url(address)}"
    finally:
        await client.aclose()
