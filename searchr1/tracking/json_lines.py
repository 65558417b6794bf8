"""JSON lines of metrics and trajectories, read so that every number is one that JavaScript reads too."""

from __future__ import annotations

import json
import math
from typing import Any


def parse_json(line: bytes | str) -> Any:
    """Return the value of a line of JSON; NaN and numbers beyond every float become None.

    Raises:
        ValueError: not JSON.
    """
    return json.loads(
        line, parse_constant=lambda _: None, parse_float=lambda text: finite_number(float(text)), parse_int=_integer
    )


def finite_number(value: object) -> float | None:
    """Return a finite number as a float, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer beyond every float
        return None
    return number if math.isfinite(number) else None


def _integer(text: str) -> int | None:
    return None if finite_number(int(text)) is None else int(text)
