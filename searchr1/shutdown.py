"""Stop cleanly when somebody asks for it: Ctrl-C (SIGINT), a closed terminal (SIGHUP), a scheduler or `kill` (SIGTERM).

The first signal raises `Stopped` in the main thread: what is open is closed as for any other error. A second one, or a stop
that takes too long, ends the process at once, with all that it has started.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECOND_AFTER_SECONDS = 1.0
"""Sooner, a signal is the same one: a terminal and a parent both send it."""
STOP_WITHIN_SECONDS = 60.0

_stopping_since: float | None = None
_overdue: threading.Timer | None = None
_at_once: list[Callable[[], object]] = []


class Stopped(KeyboardInterrupt):
    """Somebody asked this process to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.go_on = ""
        """What has been done, and how to go on with it: the end of the sentence."""

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells report it: 130, 143, 129."""
        return 128 + self.signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}{self.go_on}"


@contextmanager
def stops_cleanly() -> Iterator[None]:
    """Raise `Stopped` in this block when a signal asks for it. Those that the parent ignores (nohup) stay ignored.

    Outside of the main thread nothing changes: Python handles no signals there.
    """
    global _stopping_since, _overdue
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handle(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked child, which has nothing to put away
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        _stop(signum)

    before = {kind: signal.getsignal(kind) for kind in STOP_SIGNALS}
    for kind, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(kind, handle)
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
        if _overdue is not None:
            _overdue.cancel()
        _stopping_since = _overdue = None


@contextmanager
def ended_at_once(action: Callable[[], object]) -> Iterator[None]:
    """Call `action` when this process has to end at once in this block: what it started must not outlive it."""
    _at_once.append(action)
    try:
        yield
    finally:
        _at_once.remove(action)


def is_stopping() -> bool:
    """Return whether a signal has asked for a stop."""
    return _stopping_since is not None


def _stop(signum: int) -> None:
    global _stopping_since, _overdue
    if signum == signal.SIGHUP:
        _drop_closed_output()
    if _stopping_since is None:
        _stopping_since = time.monotonic()
        _overdue = threading.Timer(STOP_WITHIN_SECONDS, end_at_once, (signum,))
        _overdue.daemon = True
        _overdue.start()
        raise Stopped(signum)
    if time.monotonic() - _stopping_since > SECOND_AFTER_SECONDS:
        end_at_once(signum)


def _drop_closed_output() -> None:
    """Send what would be written to a terminal that has been closed to the null device: writing there is an error."""
    watch = select.poll()
    for number in (1, 2):
        watch.register(number, 0)
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    for number, event in watch.poll(0):
        if event & (select.POLLHUP | select.POLLERR):
            os.dup2(null, number)
    os.close(null)


def end_at_once(signum: int) -> NoReturn:
    """End this process and what it has started without putting anything away."""
    for action in reversed(_at_once):
        with suppress(Exception):
            action()
    leave(128 + signum)


def leave(code: int) -> NoReturn:
    """End this process without Python's own end: threads of Ray that still wait would turn it into an abort."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)
