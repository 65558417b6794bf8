"""What the policy can call. A tool that fails answers with a message; the trajectory goes on and the failure is counted."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from searchr1.agent.protocol import Document, InformationStyle, neutralise, render_body
from searchr1.config.schema import ToolsConfig
from searchr1.errors import UserError
from searchr1.retrieval.client.client import ClientStats, SearchClient, SearchUnavailable, server_addresses
from searchr1.retrieval.documents import Page, RetrievedDocument

FAILURE_WINDOW = 200
"""The failure rate is taken over this many of the latest calls."""
MIN_CALLS = 20
"""No verdict before so many."""

PAGE_CHARACTERS = 250_000
CHUNK_CHARACTERS = 25_000
MAX_CHUNKS = 10


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What stands between the information tags, and what went wrong if something did."""

    body: str
    error: str | None = None
    found: list[list[Document]] = field(default_factory=list)
    """Passages of each query, or the page of each address: for those who watch. The policy reads `body`."""


class SearchBackend(Protocol):
    """Where tools look: `SearchClient`, or an online engine in this process."""

    @property
    def stats(self) -> ClientStats:
        """Counts since the start."""
        ...

    async def search(self, queries: Sequence[str]) -> list[list[RetrievedDocument]]:
        """Return passages for each query; raises SearchUnavailable."""
        ...

    async def access(self, urls: Sequence[str]) -> list[Page | None]:
        """Return the page behind each address, or None; raises SearchUnavailable."""
        ...

    async def aclose(self) -> None:
        """Give back connections."""
        ...


class Tool(Protocol):
    """One kind of call."""

    async def call(self, arguments: Sequence[str]) -> ToolResult:
        """Answer one call of the policy; a failure is a result too."""
        ...

    async def aclose(self) -> None:
        """Give back connections."""
        ...


class FailureMonitor:
    """Stops a run whose tools mostly fail: it would train on nothing but error messages."""

    def __init__(self, max_rate: float, what: str) -> None:
        self._max_rate = max_rate
        self._what = what
        self._latest: deque[bool] = deque(maxlen=FAILURE_WINDOW)

    def record(self, failed: bool, error: str = "") -> None:
        """Count one call.

        Raises:
            UserError: too many of the latest calls failed.
        """
        self._latest.append(failed)
        rate = sum(self._latest) / len(self._latest)
        if failed and len(self._latest) >= MIN_CALLS and rate > self._max_rate:
            raise UserError(
                f"{self._what}: {rate:.0%} of the latest {len(self._latest)} calls failed, more than "
                f"tools.search.max_failure_rate = {self._max_rate:g}; the last one: {error}. Start the retrieval server "
                "(searchr1 retrieval-server), check tools.search.server_addr, or raise tools.search.timeout_s"
            )


class SearchTool:
    """Passages for queries."""

    def __init__(
        self, client: SearchBackend, style: InformationStyle, monitor: FailureMonitor, no_results_message: str | None = None
    ) -> None:
        self._client = client
        self._style = style
        self._monitor = monitor
        self._no_results_message = no_results_message

    async def call(self, arguments: Sequence[str]) -> ToolResult:
        """Search all queries of one turn in one request."""
        try:
            results = await self._client.search(list(arguments))
        except SearchUnavailable as error:
            self._monitor.record(True, str(error))
            return ToolResult("The search engine did not answer. Try again or answer without it.", str(error))
        self._monitor.record(False)
        documents = [[as_document(found) for found in query] for query in results]
        return ToolResult(render_body(documents, self._style, self._no_results_message), found=documents)

    @property
    def stats(self) -> ClientStats:
        """What the client did since the start; the page tool's calls are among them."""
        return self._client.stats

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()


class AccessTool:
    """Pages for addresses, long ones in numbered parts."""

    def __init__(self, client: SearchBackend, monitor: FailureMonitor) -> None:
        self._client = client
        self._monitor = monitor

    async def call(self, arguments: Sequence[str]) -> ToolResult:
        """Fetch the pages of one turn."""
        try:
            pages = await self._client.access(list(arguments))
        except SearchUnavailable as error:
            self._monitor.record(True, str(error))
            return ToolResult("The page could not be fetched. Try again or answer without it.", str(error))
        self._monitor.record(False)
        body = "\n\n".join(show_page(page.contents if page else None) for page in pages)
        return ToolResult(body, found=[[Document("", page.contents, url=page.url)] if page else [] for page in pages])

    async def aclose(self) -> None:
        """The search tool owns the connections."""


class DummySearchTool:
    """`tools.search.dummy_mode`: every search finds nothing, without a server."""

    def __init__(self, style: InformationStyle, no_results_message: str | None = None) -> None:
        self._body = render_body([], style, no_results_message)

    async def call(self, arguments: Sequence[str]) -> ToolResult:
        """Find nothing."""
        return ToolResult(self._body)

    async def aclose(self) -> None:
        """Nothing to close."""


def as_document(found: RetrievedDocument) -> Document:
    """Return a passage as the agent shows it."""
    return Document(found.title, found.text, found.id, found.url or "", found.score, found.contents)


def client_stats(tools: Mapping[str, Tool]) -> ClientStats:
    """Return what the search client did since the start; zeros where there is none."""
    search = tools.get("search")
    return search.stats if isinstance(search, SearchTool) else ClientStats()


def show_page(contents: str | None) -> str:
    """Return a page as the policy sees it."""
    if contents is None:
        return "No such page."
    if not contents.strip():
        return "The page is empty."
    text = neutralise(contents[:PAGE_CHARACTERS])
    chunks = [text[i : i + CHUNK_CHARACTERS] for i in range(0, len(text), CHUNK_CHARACTERS)][:MAX_CHUNKS]
    return "\n\n".join(f">>>> Page {number} >>>>\n\n{chunk}" for number, chunk in enumerate(chunks, start=1))


def build_tools(config: ToolsConfig, style: InformationStyle, no_results_message: str | None = None) -> dict[str, Tool]:
    """Return the tools of a run by the action that calls them."""
    search = config.search
    if search.dummy_mode:
        return {"search": DummySearchTool(style, no_results_message)}
    client = SearchClient.from_config(search)
    monitor = FailureMonitor(search.max_failure_rate, f"tools.search.server_addr {', '.join(server_addresses(search))}")
    tools: dict[str, Tool] = {"search": SearchTool(client, style, monitor, no_results_message)}
    if config.access.enabled:
        tools["access"] = AccessTool(client, monitor)
    return tools
