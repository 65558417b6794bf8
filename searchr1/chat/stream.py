"""Answers that are streamed while they are sampled, and aborted when the client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from searchr1.chat.events import Event, Failed, Waiting

HEARTBEAT_S = 15.0
"""Seconds of silence after which an empty line is sent: proxies keep the connection, and a dead one is noticed."""


class Admission:
    """How many questions are answered at once, and how many may wait."""

    def __init__(self, running: int, waiting: int) -> None:
        self.turn = asyncio.Semaphore(running)
        """Held by the questions that are answered."""
        self._most = running + waiting
        self._running = running
        self._inside = 0

    @property
    def full(self) -> bool:
        """Whether no further question may even wait."""
        return self._inside >= self._most

    @property
    def inside(self) -> int:
        """Questions that are answered or wait."""
        return self._inside

    @property
    def before_next(self) -> int:
        """Answers that have to end before the next question gets its place."""
        return max(self._inside - self._running + 1, 0)

    @contextmanager
    def seat(self) -> Iterator[None]:
        """Count as a question that is answered or waits. Enter it with no await after reading `full`."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1


class EventStream(Response):
    """Events as lines of JSON. When the client goes away, the events are closed, which aborts the generation."""

    media_type = "application/x-ndjson"

    def __init__(
        self, events: AsyncGenerator[Event, None], admission: Admission, timeout_s: float, rejection: Response
    ) -> None:
        """Prepare the response; nothing runs until it is called.

        Args:
            events: of the answer.
            admission: of the server.
            timeout_s: of the whole answer, its place in the queue not counted.
            rejection: response that is sent instead where no more may wait.
        """
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"cache-control": "no-store", "x-content-type-options": "nosniff", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._admission = admission
        self._timeout_s = timeout_s
        self._rejection = rejection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client is gone."""
        if self._admission.full:
            await self._events.aclose()
            await self._rejection(scope, receive, send)
            return
        before = self._admission.before_next
        with self._admission.seat():
            await self._answer(receive, send, before)

    async def _answer(self, receive: Receive, send: Send, before: int) -> None:
        sending = asyncio.create_task(self._send_all(send, before))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, gone):
                task.cancel()
            results = await asyncio.gather(sending, gone, return_exceptions=True)
            await self._events.aclose()
        if isinstance(results[0], Exception) and not isinstance(results[0], OSError):
            raise results[0]

    async def _send_all(self, send: Send, before: int) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if before:
            await _send_line(send, Waiting(before))
        last: Event | None = None
        try:
            async with _heart(send), self._admission.turn, asyncio.timeout(self._timeout_s):
                async with aclosing(self._events) as events:
                    async for event in events:
                        await _send_line(send, event)
        except TimeoutError:
            last = Failed(f"the answer took longer than {self._timeout_s:g} s (--answer_timeout_s)")
        with suppress(TimeoutError):  # a client that does not read keeps its place no longer
            async with asyncio.timeout(HEARTBEAT_S):
                if last is not None:
                    await _send_line(send, last)
                await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_line(send: Send, event: Event) -> None:
    # Escapes keep half surrogate pairs and odd line ends of retrieved text out of the bytes.
    line = json.dumps(event.as_json(), ensure_ascii=True) + "\n"
    await send({"type": "http.response.body", "body": line.encode(), "more_body": True})


@asynccontextmanager
async def _heart(send: Send) -> AsyncIterator[None]:
    async def beat() -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await send({"type": "http.response.body", "body": b"\n", "more_body": True})

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
