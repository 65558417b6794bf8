"""From the actor's weights to the rollout engines', and the proof that they agree."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from searchr1.rollout.backend import KV_CACHE, WEIGHTS
from searchr1.runner.groups import Group, Groups
from searchr1.runner.weight_probe import Gap, check_gap, coarser

logger = logging.getLogger(__name__)


def sync_weights(groups: Groups, version: int, timeout_s: float) -> float:
    """Pass the actor's weights on to every engine, a bucket at a time. Returns the seconds it took.

    While the engines load one bucket, the actor gathers and writes the next.
    """
    started = time.perf_counter()
    actor = _actor(groups)
    bucket = actor.call("publish_weights", version).wait(timeout_s)[0]
    warnings: list[str] = []
    while True:
        update = groups.rollout.call("update_weights", bucket)
        following = None if bucket.last else actor.call("next_bucket").wait(timeout_s)[0]
        warnings += [*bucket.warnings, *(text for engine in update.wait(timeout_s) for text in engine)]
        if following is None:
            break
        bucket = following
    actor.call("release_weights", bucket).wait(timeout_s)
    for text in dict.fromkeys(warnings):  # buffers are made once, and so is each of these
        logger.warning("%s", text)
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
) -> Gap:
    """Compare both sides' log-probabilities of probe sequences. Return the largest gap of an engine.

    Args:
        groups: with engines that have the actor's weights.
        probe: token ids; some hundred tokens together, for a percentile.
        expected: what `actor_logprobs` gave for them.
        precisions: the actor's and the engine's; the coarser of them says what rounding explains.
        timeout_s: for the engines.

    Raises:
        UserError: it is larger than rounding explains: an engine does not run the actor's weights.
    """
    engines = groups.rollout.call("probe_logprobs", probe)
    gaps = [check_gap(expected, scored, coarser(precisions)) for scored in engines.wait(timeout_s)]
    worst = max(gaps, key=lambda gap: gap.mean)
    logger.info("weights agree: differences of log-probabilities: %s", worst)
    return worst


def _actor(groups: Groups) -> Group:
    if groups.actor is None:
        raise RuntimeError("there is no actor group in an evaluation")
    return groups.actor
