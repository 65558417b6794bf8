"""From the actor's weights to the rollout engines', and the proof that they agree."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np

from searchr1.errors import UserError
from searchr1.rollout.backend import KV_CACHE, WEIGHTS
from searchr1.runner.groups import Group, Groups

logger = logging.getLogger(__name__)

PROBE_TOLERANCE = {"fp32": 1e-3, "bf16": 0.25, "fp16": 0.05}
"""Largest difference of a log-probability that rounding explains, by precision; a stale or torn copy differs by more."""


def sync_weights(groups: Groups, version: int, timeout_s: float) -> float:
    """Pass the actor's weights on to every engine, a bucket at a time. Returns the seconds it took.

    While the engines load one bucket, the actor gathers and writes the next.
    """
    started = time.perf_counter()
    actor = _actor(groups)
    bucket = actor.call("publish_weights", version).wait(timeout_s)[0]
    while True:
        update = groups.rollout.call("update_weights", bucket)
        following = None if bucket.last else actor.call("next_bucket").wait(timeout_s)[0]
        update.wait(timeout_s)
        if following is None:
            break
        bucket = following
    actor.call("release_weights", bucket).wait(timeout_s)
    return time.perf_counter() - started


def refresh_engines(groups: Groups, version: int, timeout_s: float) -> float:
    """Bring the actor's weights to engines that sleep or not, and wake them. Returns the seconds it took.

    The KV cache wakes last, when the actor has left the GPU as far as `actor.offload_…` says so: the two need not fit
    at once.
    """
    started = time.perf_counter()
    groups.wake_engines(WEIGHTS, timeout_s)
    sync_weights(groups, version, timeout_s)
    groups.wake_engines(KV_CACHE, timeout_s)
    return time.perf_counter() - started


def actor_logprobs(groups: Groups, probe: list[list[int]], timeout_s: float) -> list[list[float]]:
    """Log-probabilities of probe sequences under the actor's weights, for `validate_weights`.

    Ask before the engines wake: a forward pass beside a KV cache need not fit.
    """
    found: list[list[float]] = _actor(groups).call("probe_logprobs", probe).wait(timeout_s)[0]
    return found


def validate_weights(
    groups: Groups, probe: list[list[int]], expected: list[list[float]], precisions: Sequence[str], timeout_s: float
) -> float:
    """Compare both sides' log-probabilities of probe sequences. Returns the largest difference.

    Args:
        groups: with engines that have the actor's weights.
        probe: token ids.
        expected: what `actor_logprobs` gave for them.
        precisions: the actor's and the engine's; the coarser of them says what rounding explains.
        timeout_s: for the engines.

    Raises:
        UserError: it is larger than rounding explains: the engines do not run the actor's weights.
    """
    engines = groups.rollout.call("probe_logprobs", probe)
    worst = 0.0
    for found in engines.wait(timeout_s):
        for ours, theirs in zip(expected, found, strict=True):
            # Unlike Python's max, numpy's keeps a NaN.
            worst = float(np.maximum(worst, np.abs(np.subtract(ours, theirs)).max()))
    coarser = max(precisions, key=PROBE_TOLERANCE.__getitem__)
    tolerance = PROBE_TOLERANCE[coarser]
    if not worst <= tolerance:
        raise UserError(
            f"rollout.validate_weight_first_sync: actor and rollout disagree by {worst:.2g} on a probe (at most "
            f"{tolerance:g} in {coarser}); rollout.model.model_path and actor.model must be the same model"
        )
    logger.info("weights agree: largest difference of a log-probability %.2g", worst)
    return worst


def _actor(groups: Groups) -> Group:
    if groups.actor is None:
        raise RuntimeError("there is no actor group in an evaluation")
    return groups.actor
