"""Which of several servers to ask: the least busy one whose circuit breaker is closed. Pure bookkeeping, no network."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass

BREAK_AFTER = 5
"""Failures in a row that open a server's circuit breaker."""
FIRST_OPEN_S = 1.0
LONGEST_OPEN_S = 30.0


@dataclass(slots=True)
class _Server:
    in_flight: int = 0
    asked: int = 0
    failures: int = 0
    """In a row."""
    opens: int = 0
    """Openings of the breaker in a row: each lasts twice as long as the one before."""
    until: float = 0.0
    """The breaker is open until then."""
    trying: bool = False
    """The breaker is half-open: one call tries whether the server works again."""


class Balancer:
    """The state of each server, by its number."""

    def __init__(self, servers: int, clock: Callable[[], float], rng: random.Random | None = None) -> None:
        """Start with closed circuit breakers; `clock` gives seconds, from any start."""
        self._servers = [_Server() for _ in range(servers)]
        self._clock = clock
        self._rng = rng or random.Random()
        self.opens = 0
        """How often a circuit breaker was opened, or a server asked for time."""

    def choose(self, tried: Collection[int] = ()) -> int:
        """Return the number of the server for the next attempt; the caller reports the outcome with `done`.

        Of those whose breaker is closed and that were not tried, the one with the fewest calls in flight, then with the
        fewest so far. If there is none: one with an open breaker before one that was tried, first the one whose breaker
        closes first; one is always asked.
        """
        now = self._clock()

        def order(number: int) -> tuple[bool, bool, float, int, int, float]:
            server = self._servers[number]
            is_open = server.until > now or server.trying
            return (
                number in tried,
                is_open,
                server.until if is_open else 0.0,
                server.in_flight,
                server.asked,
                self._rng.random(),
            )

        number = min(range(len(self._servers)), key=order)
        server = self._servers[number]
        server.in_flight += 1
        server.asked += 1
        if server.opens and server.until <= now:
            server.trying = True
        return number

    def done(self, number: int, worked: bool) -> None:
        """Record the end of a call. Enough failures in a row, or one while the breaker is half-open, open it (again)."""
        server = self._servers[number]
        server.in_flight -= 1
        was_trying, server.trying = server.trying, False
        if worked:
            server.failures = server.opens = 0
            server.until = 0.0
            return
        server.failures += 1
        if (was_trying or server.failures >= BREAK_AFTER) and server.until <= self._clock():
            seconds = min(FIRST_OPEN_S * 2**server.opens, LONGEST_OPEN_S) * self._rng.uniform(0.5, 1.0)
            server.opens += 1
            server.until = self._clock() + seconds
            self.opens += 1

    def cancelled(self, number: int) -> None:
        """Record that the caller cancelled a call, which is not evidence about the server."""
        server = self._servers[number]
        server.in_flight -= 1
        server.trying = False

    def busy(self, number: int, seconds: float) -> None:
        """Record the end of a call that the server answered with "try later"; that is not a failure."""
        server = self._servers[number]
        server.in_flight -= 1
        server.trying = False
        server.until = max(server.until, self._clock() + min(seconds, LONGEST_OPEN_S))
        self.opens += 1
