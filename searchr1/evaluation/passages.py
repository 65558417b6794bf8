"""An evaluation's own calls of the retrieval server: is it there, and passages for RAG."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from searchr1.agent.protocol import Document, InformationStyle, render_body
from searchr1.agent.tools import as_document
from searchr1.config.schema import Config, SearchToolConfig
from searchr1.errors import UserError
from searchr1.retrieval.client.client import SearchClient, SearchUnavailable, server_addresses
from searchr1.retrieval.client.outages import OutageWatch

QUERIES_PER_CALL = 32
CALLS_AT_ONCE = 8


def require_server(config: Config) -> None:
    """Search once, so that a server that is down or slow is reported before a model is loaded.

    Raises:
        UserError: it does not answer.
    """
    asyncio.run(_search(config.tools.search, ["Who wrote the first encyclopedia?"], lambda count: None))


def watch_servers(config: Config, searched: bool = True) -> OutageWatch:
    """Report while the block runs that a retrieval server does not answer; there is none to watch without searches.

    A loop of one's own need not search: it misses a server only after that has answered once.
    """
    search = config.tools.search
    servers = server_addresses(search) if searched and not search.dummy_mode else []
    return OutageWatch(servers, search.timeout_s, awaited=config.agentloop.generate_fn is None)


def retrieve_passages(
    config: Config, style: InformationStyle, questions: Sequence[str], progress: Callable[[int], None]
) -> list[str]:
    """Return the passages for each question, rendered as the search tool shows them, without its tags.

    Args:
        config: with the server's address and the number of passages in `tools.search`.
        style: how documents are shown.
        questions: the queries.
        progress: called with the number of questions that got theirs.

    Raises:
        UserError: the server does not answer.
    """
    results = asyncio.run(_search(config.tools.search, questions, progress))
    return [render_body([documents], style, config.agentloop.no_results_message) for documents in results]


async def _search(search: SearchToolConfig, queries: Sequence[str], progress: Callable[[int], None]) -> list[list[Document]]:
    """Search with one client for the whole list: `QUERIES_PER_CALL` queries a call, `CALLS_AT_ONCE` calls at once."""
    client = SearchClient.from_config(search)
    slots = asyncio.Semaphore(CALLS_AT_ONCE)
    results: list[list[Document]] = [[] for _ in queries]

    async def one_call(start: int) -> None:
        part = queries[start : start + QUERIES_PER_CALL]
        async with slots:
            answers = await client.search(part)
        for place, documents in enumerate(answers, start=start):
            results[place] = [as_document(document) for document in documents]
        progress(len(part))

    try:
        with OutageWatch(server_addresses(search), search.timeout_s):
            async with asyncio.TaskGroup() as calls:
                for start in range(0, len(queries), QUERIES_PER_CALL):
                    calls.create_task(one_call(start))
    except ExceptionGroup as errors:
        first = errors.exceptions[0]
        if not isinstance(first, SearchUnavailable):
            raise first from None
        raise UserError(
            f"tools.search.server_addr: {first}. Start the retrieval server "
            "(examples/searchr1/launch_local_server.sh), or raise tools.search.timeout_s"
        ) from None
    finally:
        await client.aclose()
    return results
