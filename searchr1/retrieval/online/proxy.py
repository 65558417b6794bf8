"""The proxy that the environment names for an address: HTTPS_PROXY, HTTP_PROXY or ALL_PROXY, unless NO_PROXY has its host.

Credentials are in the address of a proxy: nothing here prints one.
"""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from searchr1.errors import UserError


@dataclass(frozen=True, slots=True)
class Proxy:
    """How requests go through a proxy."""

    variable: str
    """Of the environment, for messages."""
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
