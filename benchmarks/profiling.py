"""Where a step's time goes: the operations that take most of it, and what makes the host wait for the GPU."""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

WAITS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpyAsync", "cudaLaunchKernel",
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::_to_copy",
)  # fmt: skip
"""Calls that are counted. The first three and every copy to pageable host memory make the host wait."""


def profile(step: Callable[[], Any], synchronize: Callable[[], None], top: int = 15) -> list[str]:
    """Lines about one call of `step`, which must have run before.

    It is called three times: on the clock, under torch.profiler, and (on a GPU) with a warning at each synchronisation.
    """
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    on_gpu = torch.cuda.is_available()
    synchronize()
    started = time.perf_counter()
    step()
    synchronize()
    wall = time.perf_counter() - started
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        step()
        synchronize()
    averages = profiler.key_averages()
    # On a GPU: kernels only, so that nothing counts twice (an operation's own device time is that of its kernels).
    kernels = [e for e in averages if (e.device_type == DeviceType.CUDA) == on_gpu and not e.is_user_annotation]
    cost = {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e3 for e in kernels}
    total, what = sum(cost.values()), "kernels" if on_gpu else "operations"
    lines = [f"a step of one micro-batch, optimizer included: {wall * 1e3:.1f} ms by the clock, {total:.1f} ms of {what}"]
    for event in sorted(kernels, key=lambda e: -cost[e.key])[:top]:
        share = 100 * cost[event.key] / total
        lines.append(f"  {cost[event.key]:9.2f} ms {share:5.1f} % {event.count:6d} x  {event.key[:95]}")
    counts = {event.key: event.count for event in averages}
    lines.append("  calls: " + ", ".join(f"{name} {counts[name]}" for name in WAITS if name in counts))
    return lines + (synchronizations(step) if on_gpu else [])


def synchronizations(step: Callable[[], Any]) -> list[str]:
    """Which lines of Python made the host wait for the GPU, and how often."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{warning.filename.removeprefix(sys.prefix)}:{warning.lineno}"
        for warning in caught
        if "synchroniz" in str(warning.message)
    )
    lines = [f"  the host waited {places.total()} times, at {len(places)} places"]
    return lines + [f"  {count:6d} x  {place}" for place, count in places.most_common(15)]
