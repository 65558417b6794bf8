"""From the actor's weights to the rollout engines', and the proof that they agree."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from searchr1.cluster.launch import TrainingCluster
from searchr1.errors import UserError


@dataclass(frozen=True, slots=True)
class Limits:
    """Differences of a token's log-probability that rounding explains."""

    mean: float
    tail: float
    """The difference that a share `tail_at` of all tokens stays below."""
    tail_at: float = 0.99


LIMITS = {
    # 24 significant bits: sums in another order differ by 1e-6 to 1e-4. No token is an exception.
    "fp32": Limits(mean=1e-3, tail=1e-3, tail_at=1.0),
    # 11 significant bits: an eighth of bf16's rounding, with the same room above it.
    "fp16": Limits(mean=0.0075, tail=0.05),
    # 8 significant bits: logits between 16 and 32 come in steps of 1/8, and a single token can be off by several. Means
    # are .01 to .03 (the demo's model: .016, percentile .08); wrong weights give a mean above 1, a matrix of the demo's
    # model that is half zeros mostly one above .06.
    "bf16": Limits(mean=0.06, tail=0.4),
}
"""By precision."""


@dataclass(frozen=True, slots=True)
class Gap:
    """How far two lists of log-probabilities are apart."""

    mean: float
    tail: float
    worst: float
    tokens: int

    def __str__(self) -> str:
        return f"mean {self.mean:.2g}, 99th percentile {self.tail:.2g}, largest {self.worst:.2g} of {self.tokens} tokens"


def coarser(precisions: Sequence[str]) -> str:
    """Return the precision whose rounding is larger."""
    return max(precisions, key=lambda precision: LIMITS[precision].mean)


def check_gap(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], precision: str) -> Gap:
    """Compare log-probabilities of the same sequences, one value per token; a first token has none and is left out.

    Wrong weights show in the mean, wrong weights that few tokens use in the 99th percentile. Below 102 tokens the
    percentile is the second largest difference: one token may be far off, and the mean judges it.

    Raises:
        UserError: they differ by more than `precision` explains, or a difference is not a number.
    """
    differences = [np.abs(np.subtract(a, b))[1:] for a, b in zip(ours, theirs, strict=True)]
    values = np.concatenate(differences) if differences else np.empty(0)
    if not values.size:
        raise UserError("rollout.validate_weight_first_sync: no prompt has two tokens to compare; use longer prompts")
    limits = LIMITS[precision]
    tail = float(np.quantile(values, limits.tail_at, method="lower"))
    gap = Gap(float(values.mean()), tail, float(values.max()), values.size)
    # A NaN is in all three numbers, and below no limit.
    if not (gap.mean <= limits.mean and gap.tail <= limits.tail):
        raise UserError(
            f"rollout.validate_weight_first_sync: actor and rollout disagree on a probe: {gap} (in {precision} at most "
            f"{limits.mean:g} in the mean and {limits.tail:g} for {limits.tail_at:.0%} of tokens); "
            "rollout.model.model_path and actor.model must be the same model"
        )
    return gap


logger = logging.getLogger(__name__)


def sync_weights(cluster: TrainingCluster, version: int) -> None:
    """Bring the actor's weights to every engine, and give the engines their KV caches back.

    These come last, when the actor has left the GPU as far as `actor.offload_…` asks for it: the two need not fit at once.
    """
    send_weights(cluster, version)
    cluster.wake_kv_caches()


def send_weights(cluster: TrainingCluster, version: int) -> None:
    """Pass the actor's weights on to every engine, a bucket at a time.

    While the engines load one bucket, the actor gathers and writes the next.
    """
    bucket = cluster.actor.publish_weights(version).wait()[0]
    warnings: list[str] = []
    while True:
        update = cluster.rollout.update_weights(bucket)
        following = None if bucket.last else cluster.actor.next_bucket().wait()[0]
        warnings += [*bucket.warnings, *(text for engine in update.wait() for text in engine)]
        if following is None:
            break
        bucket = following
    cluster.actor.release_weights(bucket).wait()
    for text in dict.fromkeys(warnings):  # buffers are made once, and so is each of these
        logger.warning("%s", text)


def actor_logprobs(cluster: TrainingCluster, probe: list[list[int]]) -> list[list[float]]:
    """Return log-probabilities of probe sequences under the actor's weights, for `validate_weights`.

    Ask before the engines wake: a forward pass beside a KV cache need not fit.
    """
    return cluster.actor.probe_logprobs(probe).wait()[0]


def validate_weights(
    cluster: TrainingCluster, probe: list[list[int]], expected: list[list[float]], precisions: Sequence[str]
) -> Gap:
    """Compare both sides' log-probabilities of probe sequences. Return the largest gap of an engine.

    Args:
        cluster: whose engines have the actor's weights.
        probe: token ids; some hundred tokens together, for a percentile.
        expected: what `actor_logprobs` returned for them.
        precisions: the actor's and the engine's; the coarser of them determines what rounding explains.

    Raises:
        UserError: it is larger than rounding explains: an engine does not run the actor's weights.
    """
    engines = cluster.rollout.probe_logprobs(probe)
    gaps = [check_gap(expected, scored, coarser(precisions)) for scored in engines.wait()]
    worst = max(gaps, key=lambda gap: gap.mean)
    logger.info("weights agree: differences of log-probabilities: %s", worst)
    return worst
