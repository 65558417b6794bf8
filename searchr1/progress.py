"""One progress bar: drawn on a terminal while its block runs, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

Advance = Callable[[int], object]
"""Takes the size of every further lot: `ProgressBar.advance`."""
SPEED_PERIOD_S = 3600.0
"""The speed is a mean over this long: one lot (a part of an index) may take minutes."""


class _SpeedColumn(ProgressColumn):
    """The caller's own text, or units per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(task.fields["note"] or (f"{speed:,.0f} {self._unit}/s" if speed else ""))


class ProgressBar:
    """How much is done, the speed, the time left. A context manager.

    Args:
        label: what stands before the bar.
        total: how much there is.
        unit: what is counted: "bytes", "%", or a word in the plural.
        done: how much of it was done before.
        least: below this total nothing is drawn.
        console: where to draw (default: stderr).
    """

    def __init__(
        self, label: str, total: int, unit: str = "bytes", *, done: int = 0, least: int = 0, console: Console | None = None
    ) -> None:
        console = console or Console(stderr=True)
        speed: list[ProgressColumn] = [_SpeedColumn(unit), TimeElapsedColumn(), TextColumn("left")]
        columns: dict[str, list[ProgressColumn]] = {
            "bytes": [DownloadColumn(), TransferSpeedColumn()],
            "%": [TaskProgressColumn()],
        }
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *columns.get(unit, [MofNCompleteColumn(), *speed]),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=SPEED_PERIOD_S if unit not in columns else 30.0,
            transient=True,
            disable=not console.is_terminal or total < least,
        )
        self._task = self._progress.add_task(label, total=total, completed=done, note="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def advance(self, count: int) -> None:
        """Count some more as done; threads may call it."""
        self._progress.advance(self._task, count)

    def update(self, done: float, note: str = "") -> None:
        """Set how much is done, and what stands in place of the speed."""
        self._progress.update(self._task, completed=done, note=note)
