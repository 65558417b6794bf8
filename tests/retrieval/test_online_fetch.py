"""Fetching pages: what is refused, what is cut short, what becomes text."""

from __future__ import annotations

import asyncio
import gzip
import socket
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from searchr1.retrieval.online.fetch import MAX_REDIRECTS, PageFetcher, extract, is_public

ARTICLE = "<html><head><title>T</title></head><body><article><h1>Ada</h1>" + "".join(
    f"<p>Ada Lovelace wrote a program, which is paragraph number {i} of this page about her.</p>" for i in range(8)
)


class Everything(AbstractResolver):
    """Resolves each name to this machine, which the public resolver would refuse."""

    async def resolve(self, host, port=0, family=socket.AF_INET):
        return [ResolveResult(hostname=host, host="127.0.0.1", port=port, family=socket.AF_INET, proto=0, flags=0)]

    async def close(self):
        pass


@asynccontextmanager
async def site(handler):
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    listening = web.TCPSite(runner, "127.0.0.1", 0)
    await listening.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def fetch(handler, path="/", resolver=True, host="wiki.example", **settings):
    async def run():
        async with site(handler) as port:
            fetcher = PageFetcher(resolver=Everything() if resolver else None, **settings)
            page = await fetcher.fetch(f"http://{host}:{port}{path}")
            await fetcher.aclose()
            return page, fetcher.failures

    return asyncio.run(run())


def reply(body, content_type="text/html", **headers):
    async def handler(_):
        return web.Response(body=body, headers={"content-type": content_type, **headers})

    return handler


def test_the_text_of_a_page_without_its_markup():
    page, failures = fetch(reply(ARTICLE.encode()))
    assert "paragraph number 7" in page.contents
    assert "<p>" not in page.contents
    assert failures == {}


def test_charsets():
    assert fetch(reply("Café".encode("latin-1"), "text/plain; charset=latin-1"))[0].contents == "Café"
    assert fetch(reply("Café".encode(), "text/plain; charset=nonsense"))[0].contents == "Café"
    html = ARTICLE.replace("Ada", "Zoë").encode("latin-1")
    assert "Zoë Lovelace" in fetch(reply(html, "text/html; charset=latin-1"))[0].contents


@pytest.mark.parametrize(
    "handler",
    [
        reply(b"%PDF", "application/pdf"),
        reply(b"", "text/html"),
        reply(b"<html></html>"),
        reply(b"x" * 3_000_000, "text/plain"),
        reply(gzip.compress(b"x" * 30_000_000), "text/plain", **{"content-encoding": "gzip"}),
        reply(b"not gzip", "text/plain", **{"content-encoding": "gzip"}),
    ],
    ids=["type", "empty", "no text", "large", "bomb", "bad gzip"],
)
def test_what_is_no_page_is_none(handler):
    assert fetch(handler)[0] is None


def test_errors_and_slow_pages_are_none_and_counted():
    async def missing(_):
        raise web.HTTPNotFound

    assert fetch(missing) == (None, {"ValueError": 1})

    async def drip(request):
        response = web.StreamResponse(headers={"content-type": "text/plain"})
        await response.prepare(request)
        for _ in range(100):
            await response.write(b"x")
            await asyncio.sleep(0.1)
        return response

    assert fetch(drip, timeout_s=0.5) == (None, {"TimeoutError": 1})


def test_redirects_are_followed_and_counted():
    async def hop(request):
        number = int(request.path.strip("/") or 0)
        if number == 0:
            return web.Response(text="arrived", content_type="text/plain")
        raise web.HTTPFound(f"/{number - 1}")

    page, _ = fetch(hop, f"/{MAX_REDIRECTS}")
    assert page.contents == "arrived"
    assert page.url.endswith("/0")
    assert fetch(hop, f"/{MAX_REDIRECTS + 1}")[0] is None


def test_a_redirect_to_a_file_is_not_followed():
    async def away(_):
        raise web.HTTPFound("file:///etc/passwd")

    assert fetch(away)[0] is None


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "127.1",
        "0x7f.1",
        "2130706433",
        "0177.0.0.1",
        "[::ffff:127.0.0.1]",
        "[::1]",
        "0.0.0.0",
        "[::]",
    ],
)
def test_this_machine_is_never_asked_in_any_notation(host):
    asked = []

    async def handler(request):
        asked.append(request)
        return web.Response(text="secret", content_type="text/plain")

    page, failures = fetch(handler, resolver=False, host=host)
    assert page is None
    assert asked == []
    assert sum(failures.values()) == 1


@pytest.mark.parametrize(
    "url", ["ftp://x/y", "file:///etc/passwd", "http://", "http://user:pw@wiki.example/", "x", "", "http://[x"]
)
def test_what_is_no_plain_web_address_is_none(url):
    async def run():
        fetcher = PageFetcher()
        page = await fetcher.fetch(url)
        await fetcher.aclose()
        return page

    assert asyncio.run(run()) is None


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
    ],
)
def test_which_addresses_are_public(address, public):
    assert is_public(address) is public


def test_text_without_markup_is_itself():
    assert extract(b"  a < b\n", None, "text/plain") == "a < b"
