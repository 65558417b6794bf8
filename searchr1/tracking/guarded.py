"""Loggers that may fail: what is logged is in metrics.jsonl too, so that no run ends over a service or an event file."""

from __future__ import annotations

import sys
from collections.abc import Callable

from searchr1.errors import UserError
from searchr1.tracking.loggers import Logger

FAILED = "logger/failed"
"""How often a logger has failed so far; only there once one has."""
LONGEST_REASON = 300


class GuardedLogger:
    """A logger whose failures are counted and reported once, and stop nothing."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._name = str(getattr(logger, "name", type(logger).__name__))
        self._logged = 0
        self.failed = 0

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record a step's metrics, if the logger can."""
        self._logged += 1
        self._try(lambda: self._logger.log(step, metrics), f"step {step}")

    def close(self) -> None:
        """End, and say how much is missing."""
        before = self.failed
        self._try(self._logger.close, "its end")
        if before:
            print(
                f"{FAILED}: {self._name} did not take {before} of {self._logged} rows; metrics.jsonl has all of them",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def _try(self, act: Callable[[], None], what: str) -> None:
        try:
            act()
        except (Exception, SystemExit) as error:  # a service's package may end the process where it is not logged in
            self.failed += 1
            if self.failed == 1:
                print(
                    f"warning: {self._name} failed at {what} ({_reason(error)}); the run goes on, metrics.jsonl has all",
                    file=sys.stderr, flush=True,
                )  # fmt: skip


def start_loggers(make: Callable[[], list[Logger]]) -> list[Logger]:
    """Start loggers.

    Raises:
        UserError: one does not start.
    """
    try:
        return make()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"runner.logger.logger_backends: a service did not start ({_reason(error)}); check its key and the network, log "
            "offline (WANDB_MODE=offline, SWANLAB_MODE=offline), or take it out of the list"
        ) from error


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON]
