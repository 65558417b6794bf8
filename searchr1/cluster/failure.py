"""Exceptions of workers as values.

RLinf ends the driver with a signal when a worker raises. Here a worker's method returns its failure instead, so that the
driver can save what it has, stop the other worker groups and print one clear message.
"""

from __future__ import annotations

import asyncio
import functools
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from searchr1.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Failure:
    """A failure of a worker, as a value."""

    message: str
    traceback: str
    by_user: bool
    """True for a `UserError`: the message is complete without a traceback."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Return the exception being handled as a value."""
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return cls(text, traceback.format_exc(), isinstance(error, UserError))


class WorkerError(RuntimeError):
    """A worker failed for a reason that is not the user's; the message holds its traceback."""


def reported(method: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T | Failure]]:
    """Make an async worker method return a `Failure` instead of raising."""

    @functools.wraps(method)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> T | Failure:
        try:
            return await method(*args, **kwargs)
        except (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError):
            raise
        except BaseException as error:  # PyTorch's CheckpointException is no Exception
            return Failure.of(error)

    return wrapper


def unwrap(results: list[Any], group: str) -> list[Any]:
    """Return the results of all ranks.

    Raises:
        UserError: a rank met a user's mistake.
        WorkerError: a rank failed otherwise.
    """
    for rank, result in enumerate(results):
        if isinstance(result, Failure):
            if result.by_user:
                raise UserError(result.message)
            raise WorkerError(f"{group} rank {rank}: {result.message}\n{result.traceback}")
    return results
