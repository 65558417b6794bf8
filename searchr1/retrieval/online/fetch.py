"""Pages from the web as text: bounded in size and time, never from a private address, through the environment's proxy."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import urllib.request
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from searchr1.errors import UserError
from searchr1.retrieval.documents import Page


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy that requests go through."""

    variable: str
    """Name of the environment variable, for messages."""
    url: str = field(repr=False)
    """With user and password, if it has them; aiohttp takes them out and sends them."""


def proxy_for(address: str) -> Proxy | None:
    """Return the proxy for a web address, or None.

    Raises:
        UserError: the variable holds something else than the address of an HTTP proxy.
    """
    target = urlsplit(address)
    proxies = urllib.request.getproxies_environment()
    kind = target.scheme if proxies.get(target.scheme) else "all"
    text = proxies.get(kind)
    if not text or urllib.request.proxy_bypass(target.netloc.rpartition("@")[2]):
        return None
    variable = f"{kind.upper()}_PROXY"
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"{variable}: is not the address of an HTTP proxy; give http://host:port")
    return Proxy(variable, f"{parts.scheme}://{parts.netloc}")


TYPES = {"text/html", "application/xhtml+xml", "text/plain"}
REDIRECTS = {301, 302, 303, 307, 308}
MAX_REDIRECTS = 5
READ_BYTES = 1 << 16
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class PrivateAddress(OSError):
    """A host that must not be connected to."""


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


class PublicResolver(AbstractResolver):
    """Resolves names, and IP addresses in any notation, to public addresses only."""

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        """Return the addresses to connect to.

        Raises:
            PrivateAddress: one of them is not public.
        """
        loop = asyncio.get_running_loop()
        addresses = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=socket.AF_UNSPEC)
        results = []
        for kind, _, protocol, _, address in addresses:
            ip = str(address[0])
            if not is_public(ip):
                raise PrivateAddress(f"{host} is not on the public internet")
            results.append(
                ResolveResult(hostname=host, host=ip, port=port, family=kind, proto=protocol, flags=socket.AI_NUMERICHOST)
            )
        return results

    async def close(self) -> None:
        """Do nothing: there are no resources."""


class PageFetcher:
    """`await fetch(url)`: the text of a page, or None."""

    def __init__(
        self,
        *,
        max_bytes: int = 2 << 20,
        timeout_s: float = 10.0,
        concurrency: int = 64,
        resolver: AbstractResolver | None = None,
    ) -> None:
        """Make a fetcher; tests give another `resolver` than the public internet's.

        Raises:
            UserError: HTTPS_PROXY names no proxy.
        """
        proxy_for("https://any.example/")
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._free = asyncio.Semaphore(concurrency)
        self._resolver = resolver or PublicResolver()
        self._session: aiohttp.ClientSession | None = None
        self._proxied: aiohttp.ClientSession | None = None
        self.failures: dict[str, int] = {}
        """Pages that could not be fetched, counted by reason."""

    async def fetch(self, url: str) -> Page | None:
        """Return the page as text; None if it cannot be fetched, is not text, or has none."""
        try:
            async with self._free, asyncio.timeout(self._timeout_s):
                body, charset, kind, final = await self._get(url)
                text = await asyncio.to_thread(extract, body, charset, kind)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, RecursionError) as error:
            reason = type(error).__name__
            self.failures[reason] = self.failures.get(reason, 0) + 1
            return None
        return Page(final, text) if text else None

    async def aclose(self) -> None:
        """Close the connections."""
        for session in (self._session, self._proxied):
            if session is not None:
                await session.close()

    async def _get(self, url: str) -> tuple[bytes, str | None, str, str]:
        """Return (body, charset, type, final address).

        Raises:
            ValueError: an address or an answer that is not taken.
        """
        for _ in range(MAX_REDIRECTS + 1):
            check_address(url)
            async with await self._ask(url) as answer:
                if answer.status in REDIRECTS:
                    url = urljoin(url, answer.headers.get("location", ""))
                    continue
                if answer.status != 200:
                    raise ValueError(f"status {answer.status}")
                if answer.content_type not in TYPES:
                    raise ValueError(f"type {answer.content_type}")
                body = bytearray()
                async for block in answer.content.iter_chunked(READ_BYTES):  # unpacked: a small answer may be a large page
                    body += block
                    if len(body) > self._max_bytes:
                        raise ValueError("too large")
                return bytes(body), answer.charset, answer.content_type, url
        raise ValueError("too many redirects")

    async def _ask(self, url: str) -> aiohttp.ClientResponse:
        """Ask for a page, through the proxy if there is one for it.

        Raises:
            OSError: its host is not on the public internet.
        """
        proxy = proxy_for(url) if url.lower().startswith("https:") else None
        if proxy is None:
            if self._session is None:
                self._session = self._open(CheckedConnector(resolver=self._resolver, use_dns_cache=False))
            return await self._session.get(url, allow_redirects=False)
        if self._proxied is None:
            self._proxied = self._open(aiohttp.TCPConnector(force_close=True))  # hosts may share an address
        target = URL(url)
        host = target.host or ""
        addresses = await self._resolver.resolve(host, target.port or 443)
        return await self._proxied.get(
            target.with_host(addresses[0]["host"]),
            allow_redirects=False,
            proxy=proxy.url,
            server_hostname=host,
            headers={"Host": host if target.is_default_port() else f"{host}:{target.port}"},
        )

    def _open(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "searchr1"},
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
        )


class CheckedConnector(aiohttp.TCPConnector):
    """Asks the resolver about IP addresses too, which aiohttp would otherwise connect to at once."""

    async def _resolve_host(self, host: str, port: int, traces: Any = None) -> list[ResolveResult]:
        return await self._resolver.resolve(host, port, family=self._family)


def check_address(url: str) -> None:
    """Accept only plain http and https.

    Raises:
        ValueError: anything else.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("no web address")
    if parts.username or parts.password:
        raise ValueError("a password in the address")


def extract(body: bytes, charset: str | None, kind: str) -> str:
    """Return the readable text of a page."""
    if kind == "text/plain":
        try:
            return body.decode(charset or "utf-8", errors="replace").strip()
        except LookupError:
            return body.decode(errors="replace").strip()
    import trafilatura

    source: bytes | str = body
    if charset:
        try:
            source = body.decode(charset, errors="replace")
        except LookupError:
            source = body
    return (trafilatura.extract(source, include_comments=False) or "").strip()
