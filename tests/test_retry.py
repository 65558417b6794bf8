"""Waiting times, deadlines and Retry-After, with a clock of the test's own."""

from __future__ import annotations

import email.utils
import random

import pytest

from searchr1.retry import Backoff, Retries, parse_retry_after

FIXED = Backoff(1.0, 5.0, (1.0, 1.0))


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def retries(clock=None, **arguments):
    return Retries(arguments.pop("backoff", FIXED), random.Random(0), clock=clock or Clock(), **arguments)


def test_waiting_times_double_up_to_the_longest():
    calls = retries()
    assert [calls.next_wait_s() for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_a_call_may_fail_thousands_of_times():
    calls = retries()
    assert {calls.next_wait_s() for _ in range(5000)} == {1.0, 2.0, 4.0, 5.0}


def test_jitter_stays_in_its_range_and_comes_from_the_seed():
    backoff = Backoff(1.0, 5.0, (0.5, 1.5))
    first, second = ([retries(backoff=backoff).next_wait_s() for _ in range(1)] for _ in range(2))
    assert first == second
    calls = retries(backoff=backoff)
    waits = [calls.next_wait_s() for _ in range(200)][3:]
    assert 2.5 <= min(waits) < 3.0
    assert 7.0 < max(waits) <= 7.5


def test_the_number_of_attempts_is_kept():
    calls = retries(attempts=3)
    assert [calls.next_wait_s() is None for _ in range(3)] == [False, False, True]
    assert calls.failures == 3
    assert retries(attempts=1).next_wait_s() is None


def test_what_a_server_asks_for_is_waited_at_least():
    calls = retries()
    assert calls.next_wait_s(at_least_s=9.0) == 9.0
    assert calls.next_wait_s(at_least_s=0.5) == 2.0


def test_without_a_last_attempt_a_wait_beyond_the_deadline_ends_the_call():
    clock = Clock()
    calls = retries(clock, timeout_s=3.0)
    assert calls.next_wait_s() == 1.0
    clock.now += 1.0
    assert calls.remaining_s() == 2.0
    assert calls.next_wait_s() is None  # a wait of 2 s would end at the deadline


def test_a_last_attempt_is_made_at_the_deadline():
    clock = Clock()
    calls = retries(clock, timeout_s=3.0, last_attempt=True)
    assert calls.next_wait_s() == 1.0
    clock.now += 1.5
    assert calls.next_wait_s() == 1.5
    clock.now += 1.5
    assert calls.remaining_s() == 0.0
    assert calls.next_wait_s() is None


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("1.5", 1.5),
        ("0", 0.0),
        ("9" * 400, 3600.0),
        ("inf", 3600.0),
        ("nan", None),
        ("-1", None),
        ("²", None),
        ("soon", None),
        ("", None),
        (None, None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600.0),
    ],
)
def test_retry_after(header, seconds):
    assert parse_retry_after(header) == seconds


def test_retry_after_as_a_date_is_the_time_until_then(monkeypatch):
    monkeypatch.setattr("searchr1.retry.time.time", lambda: 1_000_000.0)
    assert parse_retry_after(email.utils.formatdate(1_000_030, usegmt=True)) == 30.0
