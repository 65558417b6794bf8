"""The engines: how each is asked, and how its answer is read. A new one is two functions and a line in `ENGINES`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from searchr1.errors import UserError

GOOGLE_PAGE = 10
"""Custom Search gives at most so many results a call."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One result of a search."""

    title: str
    url: str
    snippet: str


@dataclass(frozen=True, slots=True)
class Request:
    """The HTTP request to an engine. `headers` and `params` may hold a key: they are never logged."""

    method: str
    url: str
    headers: dict[str, str] = field(default_factory=dict)
    params: dict[str, str | int] = field(default_factory=dict)
    json: dict[str, Any] | None = None


Keys = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Engine:
    """An online search engine."""

    name: str
    address: str
    variables: tuple[str, ...]
    """Environment variables that hold its keys."""
    ask: Callable[[str, str, int, Keys], Request]
    """(address, query, topk, keys) -> request"""
    read: Callable[[Any], list[Hit]]
    """Parsed answer -> results; raises KeyError, TypeError or AttributeError for another shape."""

    def keys(self) -> dict[str, str]:
        """Return the keys from the environment.

        Raises:
            UserError: one is missing.
        """
        missing = [name for name in self.variables if not os.environ.get(name)]
        if missing:
            raise UserError(f"--engine {self.name}: needs its key in the environment variable {missing[0]}")
        return {name: os.environ[name] for name in self.variables}


def ask_serper(address: str, query: str, topk: int, keys: Keys) -> Request:
    """Ask https://serper.dev."""
    return Request("POST", address, {"X-API-KEY": keys["SERPER_API_KEY"]}, json={"q": query, "num": topk})


def read_serper(answer: Any) -> list[Hit]:
    """Return the answer box first, where there is one that names its page."""
    box = answer.get("answerBox") or {}
    hits = [Hit(box.get("title", ""), box["link"], box.get("answer") or box.get("snippet", ""))] if box.get("link") else []
    return hits + [Hit(r.get("title", ""), r["link"], r.get("snippet", "")) for r in answer.get("organic", [])]


def ask_serpapi(engine: str) -> Callable[[str, str, int, Keys], Request]:
    """Return the function that asks https://serpapi.com, in front of Google or Bing."""

    def ask(address: str, query: str, topk: int, keys: Keys) -> Request:
        count = "num" if engine == "google" else "count"
        return Request(
            "GET", address, params={"engine": engine, "q": query, count: topk, "api_key": keys["SERPAPI_API_KEY"]}
        )

    return ask


def read_serpapi(answer: Any) -> list[Hit]:
    """Return the answer box first, where there is one that names its page. An empty search is an answer with `error`."""
    box = answer.get("answer_box") or {}
    hits = [Hit(box.get("title", ""), box["link"], box.get("answer") or box.get("snippet", ""))] if box.get("link") else []
    return hits + [Hit(r.get("title", ""), r["link"], r.get("snippet", "")) for r in answer.get("organic_results", [])]


def ask_google(address: str, query: str, topk: int, keys: Keys) -> Request:
    """Ask Google's Custom Search JSON API."""
    params: dict[str, str | int] = {"q": query, "num": min(topk, GOOGLE_PAGE)}
    return Request("GET", address, params=params | {"key": keys["GOOGLE_API_KEY"], "cx": keys["GOOGLE_CSE_ID"]})


def read_google(answer: Any) -> list[Hit]:
    """Return the items; without results there are none."""
    return [Hit(r.get("title", ""), r["link"], r.get("snippet", "")) for r in answer.get("items", [])]


def ask_brave(address: str, query: str, topk: int, keys: Keys) -> Request:
    """Ask https://api-dashboard.search.brave.com."""
    headers = {"X-Subscription-Token": keys["BRAVE_API_KEY"], "Accept": "application/json"}
    return Request("GET", address, headers, params={"q": query, "count": min(topk, 20), "text_decorations": "false"})


def read_brave(answer: Any) -> list[Hit]:
    """Return the results of the web."""
    results = (answer.get("web") or {}).get("results", [])
    return [Hit(r.get("title", ""), r["url"], r.get("description", "")) for r in results]


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("serper", "https://google.serper.dev/search", ("SERPER_API_KEY",), ask_serper, read_serper),
        Engine("serpapi-google", "https://serpapi.com/search", ("SERPAPI_API_KEY",), ask_serpapi("google"), read_serpapi),
        Engine("serpapi-bing", "https://serpapi.com/search", ("SERPAPI_API_KEY",), ask_serpapi("bing"), read_serpapi),
        Engine(
            "google",
            "https://www.googleapis.com/customsearch/v1",
            ("GOOGLE_API_KEY", "GOOGLE_CSE_ID"),
            ask_google,
            read_google,
        ),
        Engine("brave", "https://api.search.brave.com/res/v1/web/search", ("BRAVE_API_KEY",), ask_brave, read_brave),
    )
}
