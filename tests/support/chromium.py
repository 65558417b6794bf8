"""A headless Chromium driven over its debugging protocol: enough to click, type and look."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

QUIET = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-extensions --remote-debugging-port=0 --window-size=1100,900"""


def find_chromium() -> str | None:
    """The browser's path, if there is one."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tab:
    """One open page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self.console: list[str] = []
        """Errors and messages of the page."""

    async def send(self, method: str, **params: Any) -> Any:
        """One command of the protocol; gives its result."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=30)
            if message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.console.append(str(message["params"]))
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    async def open(self, url: str) -> None:
        """Go to an address and wait until it is loaded."""
        for domain in ("Page", "Runtime", "Log"):
            await self.send(f"{domain}.enable")
        await self.send("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression (promises are awaited)."""
        result = await self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    async def until(self, condition: str, seconds: float = 15) -> None:
        """Wait for a JavaScript condition."""
        deadline = time.monotonic() + seconds
        while not await self.run(f"Boolean({condition})"):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{condition}: not within {seconds} s; the page says {await self.run('document.body.innerText')}"
                )
            await asyncio.sleep(0.03)

    async def screenshot(self, path: Path) -> None:
        """A PNG of what is seen."""
        found = await self.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[Tab]:
    """A browser of its own with one empty tab."""
    binary = find_chromium()
    assert binary is not None
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        command = [binary, *QUIET.split(), f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            announced = Path(profile) / "DevToolsActivePort"
            deadline = time.monotonic() + 30
            while not announced.exists() or not announced.read_text().strip():
                assert process.poll() is None, "the browser ended"
                assert time.monotonic() < deadline, "the browser did not start"
                await asyncio.sleep(0.05)
            port = announced.read_text().split()[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                    pages = [page for page in await answer.json() if page["type"] == "page"]
                async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    yield Tab(socket)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
