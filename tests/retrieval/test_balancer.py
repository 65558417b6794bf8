"""Which server is asked, by a clock that the test holds."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from searchr1.retrieval.client.balancer import BREAK_AFTER, LONGEST_OPEN_S, Balancer


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def make(servers):
    clock = Clock()
    return Balancer(servers, clock, random.Random(0)), clock


def fail(balancer, server, times=1):
    for _ in range(times):
        assert balancer.choose([n for n in range(9) if n != server]) == server
        balancer.done(server, worked=False)


def test_the_least_busy_server_is_asked():
    balancer, _ = make(3)
    first = [balancer.choose() for _ in range(3)]
    assert sorted(first) == [0, 1, 2]
    balancer.done(1, worked=True)
    assert balancer.choose() == 1
    balancer.cancelled(2)
    assert balancer.choose() == 2


def test_one_that_was_tried_comes_last():
    balancer, _ = make(2)
    assert balancer.choose(tried=[0]) == 1
    assert balancer.choose(tried=[0]) == 1
    assert balancer.choose(tried=[0, 1]) == 0


def test_failures_in_a_row_make_a_server_rest_and_one_call_finds_out():
    balancer, clock = make(2)
    fail(balancer, 0, BREAK_AFTER - 1)
    balancer.choose([1])
    balancer.done(0, worked=True)  # not in a row any more
    fail(balancer, 0, BREAK_AFTER)
    assert balancer.opens == 1
    assert [balancer.choose() for _ in range(6)] == [1] * 6
    clock.now += 1.0
    assert balancer.choose() == 0
    assert [balancer.choose() for _ in range(6)] == [1] * 6, "only one call tries it"
    balancer.done(0, worked=True)
    assert balancer.choose() == 0
    assert balancer.choose() == 0


def test_rests_double_up_to_a_limit():
    balancer, clock = make(2)
    fail(balancer, 0, BREAK_AFTER)
    opens = []
    for _ in range(9):
        until = balancer._servers[0].until
        opens.append(until - clock.now)
        clock.now = until
        fail(balancer, 0)
    for number, seconds in enumerate(opens):
        whole = min(2.0**number, LONGEST_OPEN_S)
        assert whole / 2 <= seconds <= whole


def test_a_call_given_up_during_the_trial_lets_another_try():
    balancer, clock = make(2)
    fail(balancer, 0, BREAK_AFTER)
    clock.now += 1
    assert balancer.choose([1]) == 0
    assert balancer.choose() == 1
    balancer.cancelled(0)
    assert [balancer.choose() for _ in range(9)].count(0) == 1


def test_when_all_rest_the_one_that_is_ready_first_is_asked():
    balancer, clock = make(2)
    balancer.choose([1])
    balancer.busy(0, 7)
    balancer.choose([0])
    balancer.busy(1, 3)
    assert balancer.choose() == 1
    balancer.cancelled(1)
    clock.now += 3
    assert balancer.choose() == 1


def test_a_busy_server_rests_as_long_as_it_said_but_not_forever():
    balancer, clock = make(2)
    balancer.choose([1])
    balancer.busy(0, 1000)
    assert balancer.choose() == 1
    clock.now += LONGEST_OPEN_S
    assert balancer.choose() == 0


@given(st.integers(1, 4), st.lists(st.tuples(st.sampled_from("cfwgbt"), st.integers(0, 3), st.floats(0, 40)), max_size=80))
def test_somebody_is_always_asked_and_counts_stay_right(servers, events):
    balancer, clock = make(servers)
    running = []
    for event, number, seconds in events:
        if event == "c":
            chosen = balancer.choose([number])
            assert 0 <= chosen < servers
            running.append(chosen)
        elif event == "t":
            clock.now += seconds
        elif running:
            server = running.pop(number % len(running))
            if event == "b":
                balancer.busy(server, seconds)
            elif event == "g":
                balancer.cancelled(server)
            else:
                balancer.done(server, worked=event == "w")
        assert [state.in_flight for state in balancer._servers] == [running.count(n) for n in range(servers)]
