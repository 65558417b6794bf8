"""An evaluation's progress where there is no terminal."""

from __future__ import annotations

from searchr1.tracking import eval_progress
from searchr1.tracking.eval_progress import EvalProgress


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(eval_progress.time, "monotonic", lambda: now[0])
    with EvalProgress("search", total=100, done=10) as bar:
        for _ in range(30):
            now[0] += 2
            bar.advance(2, right=1, scored=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "search: 10 of 100 questions were finished before",
        "search: 42/100  1.0/s, exact match 0.500  left 1.0 min",
        "search: 70/100  1.0/s, exact match 0.500  left 0.5 min",
    ]


def test_nothing_done_yet_is_no_division_by_zero(capsys):
    with EvalProgress("rag: passages", total=3):
        pass
    assert capsys.readouterr().out.startswith("rag: passages: 0/3  0.0/s")
