"""Read the answers of servers with a bound: another program wrote them, and they may be packed, endless or nested."""

from __future__ import annotations

from typing import Any

import aiohttp

from searchr1.files.text_rows import parse_json

MAX_ANSWER_BYTES = 64 << 20
"""Of one query or address, unpacked; more of them may have more."""
BYTES_EACH = 4 << 20
MAX_ERROR_BYTES = 4096
READ_BYTES = 1 << 16


async def read_json(response: aiohttp.ClientResponse, asked: int = 1) -> Any:
    """Return the JSON of an answer to so many queries.

    Raises:
        ValueError: too large, or no JSON.
        aiohttp.ClientError: the connection broke.
    """
    limit = max(MAX_ANSWER_BYTES, asked * BYTES_EACH)
    body = await _read(response, limit)
    if len(body) > limit:
        response.close()
        raise ValueError(f"the answer is larger than {limit >> 20} MiB")
    return parse_json(body.decode("utf-8"))


async def read_error(response: aiohttp.ClientResponse) -> str:
    """Return the beginning of an answer that says why a request failed.

    Raises:
        aiohttp.ClientError: the connection broke.
    """
    body = await _read(response, MAX_ERROR_BYTES)
    if len(body) > MAX_ERROR_BYTES:
        response.close()
    return body[:MAX_ERROR_BYTES].decode("utf-8", "replace")


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """Return all of an answer, or a little more than `limit` bytes of it."""
    body = bytearray()
    async for block in response.content.iter_chunked(READ_BYTES):  # unpacked: a small answer may be a large one
        body += block
        if len(body) > limit:
            break
    return bytes(body)
