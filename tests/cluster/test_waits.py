"""Threads that wait for Ray: they give what calls return, and leave before Ray is shut down."""

from __future__ import annotations

import threading
import time

import pytest
import ray

from searchr1.cluster.rlinf_compat import Waits


class FakeRay:
    """Calls that return, or raise, when `finish` says so."""

    def __init__(self) -> None:
        self.results: dict[str, object] = {}
        self.asked_after = 0.0
        self._changed = threading.Condition()

    def finish(self, reference: str, result: object) -> None:
        with self._changed:
            self.results[reference] = result
            self._changed.notify_all()

    def wait(self, references, *, num_returns, timeout):
        self.asked_after = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: any(r in self.results for r in references), timeout)
        ready = [r for r in references if r in self.results][:num_returns]
        return ready, [r for r in references if r not in ready]

    def get(self, references):
        found = [self.results[r] for r in references]
        for value in found:
            if isinstance(value, Exception):
                raise value
        return found


@pytest.fixture
def fake(monkeypatch):
    found = FakeRay()
    monkeypatch.setattr(ray, "wait", found.wait)
    monkeypatch.setattr(ray, "get", found.get)
    return found


def in_thread(function):
    got = []
    thread = threading.Thread(target=lambda: got.append(function()))
    thread.start()
    return thread, got


def test_results_come_in_the_order_of_the_ranks(fake):
    fake.finish("b", 2)
    thread, got = in_thread(lambda: Waits().results(["a", "b"]))
    fake.finish("a", 1)
    thread.join(5)
    assert got == [[1, 2]]


def test_one_rank_that_fails_is_not_waited_on_by_the_others(fake):
    fake.finish("b", ValueError("out of paper"))
    with pytest.raises(ValueError, match="out of paper"):  # "a" never returns
        Waits().results(["a", "b"])


def test_threads_leave_before_the_end_and_do_not_come_back(fake):
    waits = Waits()
    threads = [in_thread(lambda: waits.results(["never"])) for _ in range(5)]
    while not fake.asked_after:
        time.sleep(0.01)
    assert waits.end(5.0)
    ended = time.monotonic()
    for thread, got in threads:
        thread.join(5)
        assert got == [None]
    assert waits.results(["another"]) is None
    assert fake.asked_after <= ended


def test_a_thread_that_does_not_leave_is_not_waited_for_without_end(fake, monkeypatch):
    waits, release = Waits(), threading.Event()
    monkeypatch.setattr(ray, "wait", lambda references, **_: (release.wait(), (list(references), []))[1])
    fake.finish("a", 1)
    thread, got = in_thread(lambda: waits.results(["a"]))
    time.sleep(0.05)
    assert not waits.end(0.1)
    release.set()
    thread.join(5)
    assert got == [[1]]
