"""Retries of a call that may fail for a while: how many, until when, and how long to wait before the next attempt."""

from __future__ import annotations

import email.utils
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

LONGEST_RETRY_AFTER_S = 3600.0
MOST_DOUBLINGS = 64


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waiting times that double from `first_s` up to `longest_s`, each times a random factor of the range `jitter`."""

    first_s: float
    longest_s: float
    jitter: tuple[float, float]

    def wait_s(self, failures: int, rng: random.Random) -> float:
        """Return how long to wait after so many failed attempts (at least 1)."""
        return min(self.first_s * 2.0 ** min(failures - 1, MOST_DOUBLINGS), self.longest_s) * rng.uniform(*self.jitter)


class Retries:
    """The attempts of one call. Pure bookkeeping: the caller makes the attempts, and waits."""

    def __init__(
        self,
        backoff: Backoff,
        rng: random.Random,
        *,
        attempts: int | None = None,
        timeout_s: float | None = None,
        last_attempt: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        Args:
            backoff: how long to wait between attempts.
            rng: draws the jitter.
            attempts: how many there may be; None: any number.
            timeout_s: from now on, for all attempts and waiting times; None: any time.
            last_attempt: cut a waiting time that would go beyond the deadline, so that there is an attempt at the deadline;
                otherwise there is no further attempt.
            clock: gives seconds, from any start.
        """
        self._backoff, self._rng, self._clock = backoff, rng, clock
        self._attempts = attempts
        self._deadline = math.inf if timeout_s is None else clock() + timeout_s
        self._last_attempt = last_attempt
        self.failures = 0

    def remaining_s(self) -> float:
        """Return the seconds until the deadline, at least 0."""
        return max(self._deadline - self._clock(), 0.0)

    def next_wait_s(self, at_least_s: float = 0.0) -> float | None:
        """Count a failed attempt and return how long to wait before the next one; None: there is no next one.

        Args:
            at_least_s: what the server asked for.
        """
        self.failures += 1
        remaining_s = self.remaining_s()
        if self.failures == self._attempts or remaining_s == 0.0:
            return None
        wait_s = max(self._backoff.wait_s(self.failures, self._rng), at_least_s)
        if self._last_attempt:
            return min(wait_s, remaining_s)
        return wait_s if wait_s < remaining_s else None


def parse_retry_after(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, as a number or as a date; None if it asks for none."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = max(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
        except (ValueError, TypeError, OverflowError):
            return None
    return min(seconds, LONGEST_RETRY_AFTER_S) if seconds >= 0 else None
