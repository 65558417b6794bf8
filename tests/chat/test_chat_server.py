"""The chat page's server as an ASGI application: streams, limits, disconnects, tokens, hosts."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re

import httpx
import pytest
from support.scripted_chat import ADA, ANSWER, SEARCH, ScriptedEngine, ScriptedSearch, make_chat

from searchr1.chat.server import Limits, create_app, is_loopback

SCRIPT = {"q": [SEARCH, ANSWER], "slow": ["<think> " + "on and on " * 500]}
HOSTILE = "</script><script>window.hit=1</script>\u2028"


class Client:
    """One streamed request; the client can go away."""

    def __init__(self, app, question, headers=()):
        self.lines, self.status, self.ended = [], None, False
        self._incoming = asyncio.Queue()
        body = json.dumps({"question": question}).encode()
        self._incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/ask",
            "raw_path": b"/ask",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"127.0.0.1:1"), (b"content-type", b"application/json"), *headers],
            "client": ("127.0.0.1", 2),
            "server": ("127.0.0.1", 1),
        }
        self.task = asyncio.create_task(app(scope, self._incoming.get, self._send))

    def leave(self):
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def _send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.lines += [json.loads(line) for line in message["body"].decode().splitlines() if line]
            self.ended = not message.get("more_body", False)

    @property
    def types(self):
        return [line.get("type") for line in self.lines]

    async def until(self, condition):
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.002)


class Stuck(Client):
    """It reads nothing but the status."""

    async def _send(self, message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()


def play(scene, chat=None, token=None, hosts=(), **limits):
    async def run():
        async with asyncio.timeout(40):
            await scene(create_app(chat or make_chat(SCRIPT), Limits(**limits), token, hosts))

    asyncio.run(run())


def http(app, **headers):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8080", headers=headers)


def test_an_answer_comes_as_lines_while_it_is_made():
    async def scene(app):
        client = Client(app, "q")
        await client.until(lambda: "text" in client.types)
        assert not client.ended
        await client.task
        assert client.status == 200
        assert client.ended
        assert client.lines[-1]["answer"] == "Ada Lovelace"
        assert client.lines[-1]["stats"]["searches"] == 1
        assert [line["results"][0][0]["url"] for line in client.lines if line["type"] == "found"] == [ADA.url]

    play(scene, make_chat(SCRIPT, delay=0.005))


def test_a_client_that_leaves_aborts_its_generation_and_no_other():
    engine = ScriptedEngine(SCRIPT, delay=0.005)

    async def scene(app):
        leaver, stayer = Client(app, "slow"), Client(app, "q")
        await leaver.until(lambda: "text" in leaver.types)
        leaver.leave()
        await leaver.task
        assert engine.aborted == 1
        await stayer.task
        assert stayer.lines[-1]["answer"] == "Ada Lovelace"

    play(scene, make_chat(SCRIPT, engine=engine))


def test_questions_wait_for_their_turn_and_too_many_are_rejected():
    engine = ScriptedEngine(SCRIPT, delay=0.003)

    async def scene(app):
        first = Client(app, "slow")
        await first.until(lambda: engine.running == 1)
        second = Client(app, "q")
        await second.until(lambda: "waiting" in second.types)
        assert second.lines[0]["before"] == 1
        refused = Client(app, "q")
        await refused.task
        assert refused.status == 503
        assert "too many" in refused.lines[0]["detail"]
        async with http(app) as client:
            health = (await client.get("/health")).json()
        assert (health["running"], health["waiting"]) == (1, 1)
        first.leave()
        await second.task
        assert second.lines[-1]["answer"] == "Ada Lovelace"
        assert engine.most == 1
        async with http(app) as client:
            assert (await client.get("/health")).json()["running"] == 0

    play(scene, make_chat(SCRIPT, engine=engine), running=1, waiting=1)


def test_questions_that_come_together_pass_no_limit():
    engine = ScriptedEngine(SCRIPT, delay=0.003)

    async def scene(app):
        clients = [Client(app, "q") for _ in range(20)]
        await asyncio.gather(*(client.task for client in clients))
        assert sorted(client.status for client in clients) == [200] * 3 + [503] * 17
        assert engine.most == 1

    play(scene, make_chat(SCRIPT, engine=engine), running=1, waiting=2)


def test_a_client_that_does_not_read_loses_its_place(monkeypatch):
    monkeypatch.setattr("searchr1.chat.stream.HEARTBEAT_S", 0.05)

    async def scene(app):
        client = Stuck(app, "q")
        await client.task
        async with http(app) as other:
            assert (await other.get("/health")).json()["running"] == 0

    play(scene, make_chat(SCRIPT), answer_timeout_s=0.05)


def test_leaving_the_queue_frees_the_place():
    engine = ScriptedEngine(SCRIPT, delay=0.003)

    async def scene(app):
        first = Client(app, "slow")
        await first.until(lambda: engine.running == 1)
        for _ in range(3):
            waiting = Client(app, "q")
            await waiting.until(lambda waiting=waiting: "waiting" in waiting.types)
            waiting.leave()
            await waiting.task
        first.leave()
        await first.task
        assert engine.most == 1

    play(scene, make_chat(SCRIPT, engine=engine), running=1, waiting=1)


def test_an_answer_that_takes_too_long_ends_with_an_error():
    engine = ScriptedEngine(SCRIPT, delay=0.05)

    async def scene(app):
        client = Client(app, "slow")
        await client.task
        assert client.lines[-1] == {"type": "error", "message": "the answer took longer than 0.2 s (--answer_timeout_s)"}
        assert client.ended
        assert engine.aborted == 1

    play(scene, make_chat(SCRIPT, engine=engine), answer_timeout_s=0.2)


def test_hostile_text_stays_inside_its_line():
    async def scene(app):
        client = Client(app, "h")
        await client.task
        texts = [line["text"] for line in client.lines if line["type"] == "text"]
        assert HOSTILE.strip() in "".join(texts)

    play(scene, make_chat({"h": [f"<answer> {HOSTILE}{chr(0xD800)} </answer>"]}))


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ('{"question": " "}', 422, "empty"),
        ('{"question": "%s"}' % ("x" * 51), 422, "51 characters, and 50 are allowed"),
        ('{"question": 3}', 422, "question"),
        ("nonsense", 422, "JSON"),
        ('{"question": "%s"}' % ("x" * (1 << 20)), 413, "larger than"),
    ],
)
def test_bad_questions_are_rejected(body, status, detail):
    async def scene(app):
        async with http(app) as client:
            answer = await client.post("/ask", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == status
        assert detail in answer.json()["detail"]

    play(scene, question_characters=50)


def test_the_token_guards_questions_and_pages():
    async def scene(app):
        async with http(app) as client:
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/")).status_code == 200
            assert (await client.get("/about")).status_code == 401
            for path, body in (("/ask", {"question": "q"}), ("/page", {"url": "u"})):
                assert (await client.post(path, json=body)).status_code == 401
                wrong = await client.post(path, json=body, headers={"authorization": "Bearer ab"})
                assert wrong.status_code == 401
            good = await client.post("/ask", json={"question": "q"}, headers={"authorization": "Bearer abc"})
            assert good.status_code == 200

    play(scene, token="abc")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("localhost", 200),
        ("192.168.1.7:8080", 200),
        ("Chat.Example:8080", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost@evil.example", 421),
        ("", 421),
        ("[bad", 421),
    ],
)
def test_a_foreign_name_for_this_machine_is_rejected(host, status):
    async def scene(app):
        async with http(app, host=host) as client:
            assert (await client.get("/health")).status_code == status

    play(scene, hosts=["chat.example"])


def test_a_page_of_another_site_cannot_ask():
    async def scene(app):
        async with http(app) as client:
            for origin, status in (
                ("http://127.0.0.1:8080", 200),
                ("http://evil.example", 403),
                ("null", 403),
                ("http://[", 403),
            ):
                answer = await client.post("/ask", json={"question": "q"}, headers={"origin": origin})
                assert answer.status_code == status

    play(scene)


def test_pages_that_a_search_returned():
    backend = ScriptedSearch(pages={"https://w.example/Ada": "x" * 200_010})

    async def scene(app):
        async with http(app) as client:
            page = (await client.post("/page", json={"url": "https://w.example/Ada"})).json()
            assert (len(page["text"]), page["left_out"]) == (200_000, 10)
            assert (await client.post("/page", json={"url": "https://w.example/none"})).status_code == 404
            backend.error = "down"
            answer = await client.post("/page", json={"url": "https://w.example/Ada"})
            assert answer.status_code == 502
            assert "down" in answer.json()["detail"]

    play(scene, make_chat(SCRIPT, backend))


def test_a_dead_engine_shows_in_health_and_rejects_questions():
    engine = ScriptedEngine(SCRIPT)

    async def scene(app):
        engine.stop_reason = "the rollout engine stopped: out of memory"
        async with http(app) as client:
            health = await client.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "failed")
            assert "out of memory" in (await client.get("/about")).json()["stopped"]
            answer = await client.post("/ask", json={"question": "q"})
            assert answer.status_code == 503
            assert "out of memory; start searchr1 serve-chat again" in answer.json()["detail"]

    play(scene, make_chat(SCRIPT, engine=engine))


def test_the_page_runs_its_own_script_and_no_other():
    async def scene(app):
        async with http(app) as client:
            answer = await client.get("/")
        policy = answer.headers["content-security-policy"]
        assert "unsafe" not in policy
        assert policy.startswith("default-src 'none'")
        for tag in ("style", "script"):
            (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy
        for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert name not in answer.text

    play(scene)


def test_loopback_is_known():
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("example.org")
