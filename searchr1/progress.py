"""One progress bar on stderr: bytes done, speed, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextmanager
def progress_bar(label: str, total_bytes: int, least_bytes: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the size of every further lot of bytes; below `least_bytes` nothing is shown."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=total_bytes < least_bytes) as progress:
        task = progress.add_task(label, total=total_bytes)

        def advance(count: int) -> None:
            progress.advance(task, count)

        yield advance
