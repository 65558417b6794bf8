"""How far an evaluation is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console

from searchr1.progress import ProgressBar

LINE_EVERY_S = 30.0
"""Between two lines where there is no terminal."""


class EvalProgress:
    """Use as a context manager around one method's questions.

    Args:
        what: stands before the bar.
        total: questions in all.
        done: of them, finished before.
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self._what = what
        self._total = total
        self._first = self._done = done
        self._started = self._printed = time.monotonic()
        self._right = 0.0
        self._scored = 0
        self._console = Console(file=sys.stdout, soft_wrap=True)
        self._bar = ProgressBar(what, total, "questions", done=done, console=self._console)

    def __enter__(self) -> Self:
        if self._done:
            self._console.print(f"{self._what}: {self._done} of {self._total} questions were finished before", markup=False)
        self._bar.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.__exit__(kind, error, trace)
        if not self._console.is_terminal:
            self._console.print(self._line(), highlight=False, markup=False)

    def advance(self, questions: int, right: float = 0.0, scored: int = 0) -> None:
        """Add finished questions; `right` of their `scored` rollouts are exact matches."""
        self._done += questions
        self._right += right
        self._scored += scored
        self._bar.update(self._done, self._rate())
        if not self._console.is_terminal and time.monotonic() - self._printed > LINE_EVERY_S:
            self._printed = time.monotonic()
            self._console.print(self._line(), highlight=False, markup=False)

    def _rate(self) -> str:
        rate = f"{self._per_second():.1f}/s"
        return f"{rate}, exact match {self._right / self._scored:.3f}" if self._scored else rate

    def _per_second(self) -> float:
        return (self._done - self._first) / max(time.monotonic() - self._started, 1e-9)

    def _line(self) -> str:
        left = (self._total - self._done) / self._per_second() if self._per_second() else 0.0
        return f"{self._what}: {self._done}/{self._total}  {self._rate()}  left {left / 60:.1f} min"
