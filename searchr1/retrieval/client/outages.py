"""Report at once that a retrieval server does not answer, and when it does again.

A client tries again for as long as a search may take, which is right for a server that is restarted, and silent. So the
servers are asked beside it, whether they can be searched, by a thread that costs a request every few seconds.
"""

from __future__ import annotations

import http.client
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from searchr1.retrieval.client.client import base_url

ASK_EVERY_S = 2.0
ANSWER_WITHIN_S = 2.0
AGAIN_AFTER_S = 1.0
IN_A_ROW = 2
"""A server that refuses connections is down at once, one with another problem if it has it so many times in a row."""
REMIND_EVERY_S = 60.0
DOWN = {502, 503, 504}
REFUSED = "connection refused"
SILENT = f"no answer within {ANSWER_WITHIN_S:.0f} s"


class ServerState:
    """The state of one server, and what there is to report about it. No network."""

    def __init__(self, name: str, consequence: str, awaited: bool = True) -> None:
        """Begin with a server that nobody has asked yet.

        Args:
            name: of the server for people: what it was given as, and its address.
            consequence: of an outage, for people.
            awaited: whether it is missed before it has answered once.
        """
        self._name = name
        self._consequence = consequence
        self._awaited = awaited
        self._problems = 0
        self._down_since: float | None = None
        self._reported_at = 0.0
        self.outages = 0

    def note(self, problem: str | None, now: float) -> str | None:
        """Take in an answer, None, or what was wrong with it. Return what a person should know now, if anything."""
        if problem is None:
            self._awaited, self._problems = True, 0
            if self._down_since is None:
                return None
            seconds, self._down_since = now - self._down_since, None
            return f"{self._name} answers again after {seconds:.0f} s"
        self._problems += IN_A_ROW if problem == REFUSED else 1
        if not self._awaited or self._problems < IN_A_ROW:
            return None
        if self._down_since is None:
            self._down_since = self._reported_at = now
            self.outages += 1
            return f"{self._name} does not answer ({problem}); {self._consequence}"
        if now - self._reported_at < REMIND_EVERY_S:
            return None
        self._reported_at = now
        seconds = now - self._down_since
        return f"{self._name} has not answered for {seconds:.0f} s ({problem}); {self._consequence}"


class OutageWatch:
    """Ask every server again and again while the block runs, and print what changes to stderr."""

    def __init__(
        self,
        addresses: Sequence[str],
        timeout_s: float,
        *,
        key: str = "tools.search.server_addr",
        limit: str = " (tools.search.timeout_s)",
        awaited: bool = True,
        every_s: float = ASK_EVERY_S,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """Prepare.

        Args:
            addresses: of the servers; none is watched if there are none.
            timeout_s: how long a search is tried again.
            key: what the addresses were given as.
            limit: what `timeout_s` was given as, if it can be changed.
            awaited: whether a server is missed before it has answered once.
            every_s: between two questions to one server.
            report: what to call with a line, in place of printing it.
        """
        urls = list(dict.fromkeys(base_url(address) for address in addresses))
        retried = f"searches are tried again for up to {timeout_s:g} s each{limit}"
        if len(urls) > 1:
            retried = f"the other {'one is' if len(urls) == 2 else f'{len(urls) - 1} are'} asked instead; {retried}"
        self._states = {url: ServerState(f"{key}: {url}", retried, awaited) for url in urls}
        self._every_s = every_s
        self._report = report or _print
        self._over = threading.Event()
        self._reported = 0

    def __enter__(self) -> Self:
        for url in self._states:
            threading.Thread(target=self._watch, args=(url,), name=f"watch {url}", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()

    def metrics(self) -> dict[str, float]:
        """Return how many outages began since the last call; nothing if no server is watched."""
        if not self._states:
            return {}
        outages = sum(state.outages for state in self._states.values())
        since, self._reported = outages - self._reported, outages
        return {"tool/server_outages": float(since)}

    def _watch(self, url: str) -> None:
        state = self._states[url]
        while not self._over.is_set():
            problem = problem_of(url)
            if self._over.is_set():
                return
            if text := state.note(problem, time.monotonic()):
                self._report(text)
            self._over.wait(self._every_s if problem is None else min(AGAIN_AFTER_S, self._every_s))


def problem_of(url: str) -> str | None:
    """Return why a server cannot be searched, by its /ready; None if any server answers there at all."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/ready", timeout=ANSWER_WITHIN_S):
            return None
    except urllib.error.HTTPError as error:
        error.close()
        return f"status {error.code}" if error.code in DOWN else None
    except TimeoutError:
        return SILENT
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            return SILENT
        return _reason(error.reason)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return _reason(error)


def _reason(error: object) -> str:
    if isinstance(error, ConnectionRefusedError):
        return REFUSED
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
