"""Which of several servers to ask: the least busy one whose circuit breaker is closed. Pure bookkeeping, no network."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass

BREAK_AFTER = 5
"""Failures in a row that open a server's circuit breaker."""
FIRST_REST_S = 1.0
LONGEST_REST_S = 30.0


@dataclass(slots=True)
class _Server:
    in_flight: int = 0
    asked: int = 0
    failures: int = 0
    """In a row."""
    rests: int = 0
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
        self.rests = 0
        """How often a circuit breaker was opened, or a server asked for time."""

    def choose(self, tried: Collection[int] = ()) -> int:
        """Return the number of the server for the next attempt; the caller reports the outcome with `done`.

        Of those that neither rest nor were tried, the one with the fewest calls in flight, then with the fewest so far. If
        there is none: one that rests before one that was tried, the one whose rest ends first; somebody is always asked.
        """
        now = self._clock()

        def order(number: int) -> tuple[bool, bool, float, int, int, float]:
            server = self._servers[number]
            resting = server.until > now or server.trying
            return (
                number in tried,
                resting,
                server.until if resting else 0.0,
                server.in_flight,
                server.asked,
                self._rng.random(),
            )

        number = min(range(len(self._servers)), key=order)
        server = self._servers[number]
        server.in_flight += 1
        server.asked += 1
        if server.rests and server.until <= now:
            server.trying = True
        return number

    def done(self, number: int, worked: bool) -> None:
        """Record the end of a call. Enough failures in a row, or one while the breaker is half-open, open it (again)."""
        server = self._servers[number]
        server.in_flight -= 1
        was_trying, server.trying = server.trying, False
        if worked:
            server.failures = server.rests = 0
            server.until = 0.0
            return
        server.failures += 1
        if (was_trying or server.failures >= BREAK_AFTER) and server.until <= self._clock():
            seconds = min(FIRST_REST_S * 2**server.rests, LONGEST_REST_S) * self._rng.uniform(0.5, 1.0)
            server.rests += 1
            server.until = self._clock() + seconds
            self.rests += 1

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
        server.until = max(server.until, self._clock() + min(seconds, LONGEST_REST_S))
        self.rests += 1
