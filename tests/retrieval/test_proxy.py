"""Behind a proxy: which requests go through it, what it is asked for, and that nobody reads its password."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from contextlib import asynccontextmanager

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from searchr1.errors import UserError
from searchr1.retrieval.online import searcher as searcher_module
from searchr1.retrieval.online.engines import ENGINES
from searchr1.retrieval.online.fetch import PageFetcher, proxy_for
from searchr1.retrieval.online.searcher import OnlineSearcher
from searchr1.retrieval.searcher import SearchFailed
from searchr1.retry import Backoff

PASSWORD = "p4ss/w:rd"
QUOTED = "p4ss%2Fw%3Ard"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("SERPER_API_KEY", "k3y")
    monkeypatch.setattr(searcher_module, "BACKOFF", Backoff(0.01, 8.0, (0.5, 1.5)))


@asynccontextmanager
async def proxy_server(status=200):
    """A proxy that answers itself, as serper would; refuses CONNECT. Gives its port and what it was asked."""
    asked = []

    async def talk(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        asked.append((first, {line.partition(": ")[0].lower(): line.partition(": ")[2] for line in lines}))
        body = json.dumps({"organic": [{"title": "T", "link": "https://a.example/", "snippet": "s"}]}).encode()
        answer = 502 if first.startswith("CONNECT") else status
        writer.write(f"HTTP/1.1 {answer} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], asked


def search(monkeypatch, variables, address="http://engine.example/search", status=200):
    """Search once through the proxy; gives what was found, or the failure's text, and what the proxy was asked."""

    async def run():
        async with proxy_server(status) as (port, asked):
            for name, value in variables.items():
                monkeypatch.setenv(name, value.replace("PORT", str(port)))
            searcher = OnlineSearcher(ENGINES["serper"], address=address, snippet_only=True, timeout_s=10)
            try:
                return [hit[0]["id"] for hit in (await searcher.search(["q"], 3))[0]], asked
            except SearchFailed as failure:
                return str(failure), asked
            finally:
                await searcher.aclose()

    return asyncio.run(run())


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_an_engine_is_asked_through_the_proxy(monkeypatch, name):
    found, asked = search(monkeypatch, {name: f"http://user:{QUOTED}@127.0.0.1:PORT"})
    assert found == ["https://a.example/"]
    line, headers = asked[0]
    assert line == "POST http://engine.example/search HTTP/1.1"
    assert headers["proxy-authorization"] == "Basic " + base64.b64encode(f"user:{PASSWORD}".encode()).decode()
    assert headers["x-api-key"] == "k3y"


def test_an_engine_behind_tls_is_connected_to_by_its_name(monkeypatch):
    proxy = f"http://user:{QUOTED}@127.0.0.1:PORT"
    failure, asked = search(monkeypatch, {"HTTPS_PROXY": proxy}, "https://engine.example/search")
    line, headers = asked[0]
    assert line == "CONNECT engine.example:443 HTTP/1.1"
    assert "x-api-key" not in headers
    assert failure == "serper: ClientHttpProxyError (through the proxy of HTTPS_PROXY, which answered 502)"


@pytest.mark.parametrize("excepted", ["engine.example", "example", ".example", "other, engine.example", "*"])
def test_no_proxy_goes_straight(monkeypatch, excepted):
    failure, asked = search(monkeypatch, {"HTTP_PROXY": "http://127.0.0.1:PORT", "NO_PROXY": excepted})
    assert asked == []
    assert failure.startswith("serper: Client"), "there is no such host"
    assert "proxy" not in failure


def test_failures_do_not_show_the_password(monkeypatch):
    refused, _ = search(monkeypatch, {"HTTP_PROXY": f"http://user:{QUOTED}@127.0.0.1:PORT"}, status=407)
    assert refused == "serper: the proxy of HTTP_PROXY wants another user or password (407)"
    dead, _ = search(monkeypatch, {"HTTP_PROXY": f"http://user:{QUOTED}@127.0.0.1:9"})
    assert dead == "serper: ClientProxyConnectionError (through the proxy of HTTP_PROXY)"
    monkeypatch.setenv("HTTP_PROXY", f"http://user:{QUOTED}@127.0.0.1:9")
    assert "user" not in repr(proxy_for("http://x.example/"))
    for text in (f"socks5://user:{QUOTED}@h:1", f"http://user:{QUOTED}@h:port", "http://", "http://[::1"):
        monkeypatch.setenv("HTTP_PROXY", text)
        with pytest.raises(UserError, match=r"^HTTP_PROXY: is not the address of an HTTP proxy; give http://host:port$"):
            proxy_for("http://x.example/")


def test_which_proxy(monkeypatch):
    assert proxy_for("https://x.example/") is None
    monkeypatch.setenv("ALL_PROXY", "proxy.example:3128")
    monkeypatch.setenv("HTTPS_PROXY", "https://[::1]:8443/")
    assert proxy_for("https://x.example/").url == "https://[::1]:8443"
    found = proxy_for("http://x.example/")
    assert (found.variable, found.url) == ("ALL_PROXY", "http://proxy.example:3128")


class Elsewhere(AbstractResolver):
    async def resolve(self, host, port=0, family=socket.AF_INET):
        if host == "private.example":
            raise OSError("not public")
        return [ResolveResult(hostname=host, host="203.0.113.7", port=port, family=socket.AF_INET, proto=0, flags=0)]

    async def close(self):
        pass


def test_pages_go_through_the_proxy_to_the_address_that_was_checked(monkeypatch):
    async def run():
        async with proxy_server() as (port, asked):
            monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
            fetcher = PageFetcher(resolver=Elsewhere(), timeout_s=5)
            for url in ("https://wiki.example/a", "https://private.example/", "https://wiki.example:8443/a"):
                assert await fetcher.fetch(url) is None
            await fetcher.aclose()
            return [line for line, _ in asked], fetcher.failures

    asked, failures = asyncio.run(run())
    assert asked == ["CONNECT 203.0.113.7:443 HTTP/1.1", "CONNECT 203.0.113.7:8443 HTTP/1.1"]
    assert failures == {"ClientHttpProxyError": 2, "OSError": 1}


def test_private_addresses_are_rejected_behind_a_proxy_too(monkeypatch):
    async def run():
        async with proxy_server() as (port, asked):
            monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
            fetcher = PageFetcher(timeout_s=5)
            for host in ("127.0.0.1", "169.254.169.254", "localhost", "[::1]", "2130706433"):
                assert await fetcher.fetch(f"https://{host}/") is None
            await fetcher.aclose()
            return asked, fetcher.failures

    asked, failures = asyncio.run(run())
    assert asked == []
    assert failures == {"PrivateAddress": 5}
