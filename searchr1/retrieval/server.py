"""The retrieval server's HTTP interface."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

from searchr1.retrieval.corpus import Corpus
from searchr1.retrieval.indexes import Index
from searchr1.retrieval.pages import Pages

MAX_QUERIES = 1024
MAX_QUERY_CHARACTERS = 4096
MAX_TOPK = 100

Query = Annotated[str, Field(max_length=MAX_QUERY_CHARACTERS)]


class RetrieveRequest(BaseModel):
    """`POST /retrieve`."""

    queries: Annotated[list[Query], Field(max_length=MAX_QUERIES)]
    topk: Annotated[int, Field(ge=1, le=MAX_TOPK)] | None = None
    return_scores: bool = False


class AccessRequest(BaseModel):
    """`POST /access`."""

    urls: Annotated[list[Query], Field(max_length=MAX_QUERIES)]


class Batcher:
    """Searches what has come in while the last search ran, all at once: one matrix product instead of many."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._waiting: list[tuple[list[str], int, asyncio.Future[list[list[tuple[int, float]]]]]] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="search")
        self._running: asyncio.Task[None] | None = None

    async def search(self, queries: list[str], topk: int) -> list[list[tuple[int, float]]]:
        """At most `topk` (row, score) for each query."""
        future: asyncio.Future[list[list[tuple[int, float]]]] = asyncio.get_running_loop().create_future()
        self._waiting.append((queries, topk, future))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting, []
            texts = list(dict.fromkeys(query for queries, _, _ in batch for query in queries))
            topk = max(topk for _, topk, _ in batch)
            try:
                found = dict(
                    zip(texts, await loop.run_in_executor(self._pool, self._index.search, texts, topk), strict=True)
                )
            except Exception as error:
                for _, _, future in batch:
                    if not future.done():
                        future.set_exception(RuntimeError(f"search failed: {error}"))
                continue
            for queries, limit, future in batch:
                if not future.done():
                    future.set_result([found[query][:limit] for query in queries])


def create_app(corpus: Corpus, index: Index, pages: Pages | None, default_topk: int) -> FastAPI:
    """The application; shapes as Search-R1, RLinf and ASearcher clients expect them."""
    app = FastAPI(title="searchr1 retrieval server", docs_url=None, redoc_url=None)
    batcher = Batcher(index)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "passages": len(corpus), "pages": len(pages) if pages is not None else 0}

    @app.post("/retrieve")
    async def retrieve(request: RetrieveRequest) -> dict[str, Any]:
        topk = request.topk or default_topk
        found = await batcher.search(request.queries, topk) if request.queries else []
        result: list[Any] = []
        for hits in found:
            if request.return_scores:
                result.append([{"document": corpus[row], "score": score} for row, score in hits])
            else:
                result.append([corpus[row] for row, _ in hits])
        return {"result": result}

    @app.post("/access")
    async def access(request: AccessRequest) -> dict[str, Any]:
        if pages is None:
            raise HTTPException(404, "this server was started without --pages_path")
        found = [pages.get(url) for url in request.urls]
        return {"result": [{"url": page.url, "contents": page.contents} if page else None for page in found]}

    return app
