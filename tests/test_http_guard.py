"""The guard in front of an application that counts what reaches it."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from searchr1.http_guard import Guard, HostNames


def guard(**arguments):
    async def echo(request):
        return PlainTextResponse(str(len(await request.body())))

    app = Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST"])])
    return Guard(app, **{"max_body_bytes": 1 << 16, "open_paths": {"/health"}} | arguments)


def ask(app, method="POST", path="/ask", **request):
    async def run():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:80") as client:
            return await client.request(method, path, **request)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("host", "accepted"),
    [
        ("localhost", True),
        ("LOCALHOST:1", True),
        ("127.0.0.1:8080", True),
        ("[::1]:8080", True),
        ("here.example", True),
        ("Here.Example:80", True),
        ("box", True),
        ("evil.example", False),
        ("here.example.evil.example", False),
        ("localhost@evil.example", False),
        ("evil.example@localhost", False),
        ("127.0.0.1.evil.example", False),
        ("localhost:80:80", False),
        ("local host", False),
        ("localhost/", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_a_host_header_must_name_this_server(monkeypatch, host, accepted):
    monkeypatch.setattr("socket.gethostname", lambda: "Box")
    assert HostNames(["Here.example"]).accept(host) is accepted


def test_without_names_any_host_and_origin_is_served():
    answer = ask(guard(), headers={"host": "evil.example", "origin": "http://evil.example"})
    assert (answer.status_code, answer.text) == (200, "0")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "evil.example", "origin": "http://evil.example", "content-length": "99999999"}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"origin": "http://127.0.0.1"}, 401),
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "abc"}, 401),
        ({"authorization": "Bearer abc"}, 200),
        ({"authorization": "Bearer abc", "content-length": "65537"}, 413),
    ],
)
def test_the_checks_come_in_one_order(headers, status):
    app = guard(token="abc", hosts=HostNames([]))
    headers = {"host": "127.0.0.1"} | headers
    answer = ask(app, content=b"" if "content-length" not in headers else None, headers=headers)
    assert answer.status_code == status
    if status != 200:
        assert list(answer.json()) == ["detail"]
        assert answer.headers["connection"] == "close"
        assert ("www-authenticate" in answer.headers) == (status == 401)


def test_open_paths_need_no_token():
    app = guard(token="abc")
    assert ask(app, "GET", "/health").status_code == 200
    assert ask(app, "GET", "/healthy").status_code == 401


@pytest.mark.parametrize(("size", "status"), [(1 << 16, 200), ((1 << 16) + 1, 413)])
def test_a_body_of_unknown_length_is_counted(size, status):
    async def body():
        for start in range(0, size, 1 << 12):
            yield b"x" * min(1 << 12, size - start)

    answer = ask(guard(), content=body())
    assert answer.status_code == status
    assert answer.text == (str(size) if status == 200 else "the body is larger than 64 KiB")


def test_every_request_is_observed():
    seen = []
    app = guard(token="abc", observe=lambda path, status, seconds: seen.append((path, status, seconds >= 0)))
    ask(app, "GET", "/health")
    ask(app, "GET", "/other")
    assert seen == [("/health", 200, True), ("/other", 401, True)]
