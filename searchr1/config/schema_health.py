"""`runner.health`: when a run counts as unhealthy, and what happens then."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class HealthConfig:
    """Limits that a healthy run keeps (docs/health.md); null turns one off."""

    entropy_min: float | None = 0.005
    """Entropy of a sampled token in nats, at least."""
    entropy_max: float | None = 3.0
    """The same, at most."""
    length_ratio_max: float | None = 3.0
    """Policy tokens of a response divided by their running median, at most."""
    length_ratio_min: float | None = 0.25
    """The same, at least."""
    truncated_max: float | None = 0.9
    """Share of trajectories that ran out of tokens, at most."""
    invalid_max: float | None = 0.5
    """Share of turns without a valid action, at most."""
    mismatch_kl_max: float | None = 0.05
    """KL of engine and actor per token (`mismatch/kl_k3`), at most."""
    effective_sample_size_min: float | None = 0.5
    """Effective share of the sampled tokens under the actor's weights, at least."""
    grad_norm_ratio_max: float | None = 10.0
    """Gradient norm divided by its running median, at most."""
    skipped_max: float | None = 0.5
    """Share of a step's updates that were left out because a gradient was not finite, at most."""
    uniform_groups_max: float | None = 0.95
    """Share of groups whose attempts all earned the same, at most."""
    reward_ratio_min: float | None = 0.4
    """Mean reward of five steps divided by the best such mean, at least."""
    window: int = 20
    """Healthy steps that a running median is taken over."""
    min_history: int = 5
    """Healthy steps that a running median needs."""
    patience: int = 5
    """Unhealthy steps in a row that end the run."""
    warn_only: bool = False
    """Warn, but never end the run."""
    save_unhealthy: bool = False
    """Write checkpoints at unhealthy steps too."""
