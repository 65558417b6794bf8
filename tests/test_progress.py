"""The progress bar."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from searchr1.progress import ProgressBar


def drawn(label, total, unit, act, terminal=True, **settings):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    with ProgressBar(label, total, unit, console=console, **settings) as bar:
        act(bar)
        bar._progress.refresh()
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("total", "unit", "act", "shown"),
    [
        (3000, "bytes", lambda bar: bar.advance(1500), "1.5/3.0 kB"),
        (30, "passages", lambda bar: [bar.advance(5) for _ in range(2)], "10/30"),
        (30, "questions", lambda bar: bar.update(7, "0.4/s, exact match 0.250"), "0.4/s, exact match 0.250"),
        (100, "%", lambda bar: bar.update(37.4), "37%"),
    ],
)
def test_each_unit_is_shown_in_its_own_way(total, unit, act, shown):
    text = drawn("what [is] done", total, unit, act)
    assert shown in text
    assert "what [is] done" in text


def test_what_was_done_before_counts():
    assert "12/30" in drawn("rows", 30, "rows", lambda bar: bar.advance(2), done=10)


@pytest.mark.parametrize(("terminal", "least", "is_drawn"), [(True, 100, True), (True, 101, False), (False, 0, False)])
def test_a_log_and_a_small_amount_get_no_bar(terminal, least, is_drawn):
    text = drawn("reading", 100, "bytes", lambda bar: bar.advance(50), terminal, least=least)
    assert ("reading" in text) == is_drawn
