"""Checks of `runner.health`."""

from __future__ import annotations

from collections.abc import Iterator

from searchr1.config.load import Problem
from searchr1.config.schema_health import HealthConfig


def check_health(health: HealthConfig) -> Iterator[Problem]:
    """Limits that no run could keep, or none could break."""
    for name in ("window", "min_history", "patience"):
        if getattr(health, name) < 1:
            yield Problem(f"runner.health.{name}", f"must be 1 or more, found {getattr(health, name)}")
    if health.window < health.min_history:
        yield Problem("runner.health.window", f"{health.window} is less than min_history = {health.min_history}")
    for name in ("truncated", "invalid", "skipped", "uniform_groups"):
        limit = getattr(health, f"{name}_max")
        if limit is not None and not 0 <= limit < 1:
            yield Problem(f"runner.health.{name}_max", f"must be 0 or more and less than 1, found {limit:g}; null is off")
    for name in ("length_ratio_max", "grad_norm_ratio_max"):
        limit = getattr(health, name)
        if limit is not None and limit <= 1:
            yield Problem(f"runner.health.{name}", f"must be more than 1, which is what is usual; found {limit:g}")
    for name in ("length_ratio_min", "reward_ratio_min", "effective_sample_size_min"):
        limit = getattr(health, name)
        if limit is not None and not 0 < limit < 1:
            yield Problem(f"runner.health.{name}", f"must be between 0 and 1, found {limit:g}; null is off")
    low, high = health.entropy_min, health.entropy_max
    if low is not None and high is not None and not 0 <= low < high:
        yield Problem("runner.health.entropy_max", f"must be more than entropy_min = {low:g}, and that 0 or more")
    if health.mismatch_kl_max is not None and health.mismatch_kl_max <= 0:
        yield Problem("runner.health.mismatch_kl_max", f"must be more than 0, found {health.mismatch_kl_max:g}")
