"""Metrics of a step's trajectories, and the table of an evaluation's. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from searchr1.agent.trajectory import Trajectory

STEP_METRICS = {
    "reward/mean": "mean reward of a trajectory, `reward.reward_scale` included",
    "reward/std": "standard deviation of the reward over all trajectories",
    "reward/exact_match": "share of trajectories whose last answer is a gold answer",
    "reward/f1": "mean token F1 of the last answer against the best gold answer",
    "rollout/searches": "search queries of a trajectory",
    "rollout/turns": "generations of a trajectory",
    "rollout/response_length": "tokens of a response, the environment's included",
    "rollout/response_length_max": "the longest response",
    "rollout/policy_tokens": "tokens of a response that the policy sampled",
    "rollout/entropy": "mean negative log-probability of a sampled token, which estimates the policy's entropy",
    "rollout/invalid_rate": "share of turns that neither called a tool nor answered",
    "rollout/answered": "share of trajectories that ended with an answer",
    "rollout/truncated": "share of trajectories that ran out of tokens",
    "rollout/failed": "share of trajectories that an error ended",
    "rollout/forced_final": "share of trajectories whose last turn was forced because the search turns were used up",
    "rollout/uniform_groups": "share of groups whose rollouts all have the same reward, and so no advantage",
    "tool/calls": "tool calls of all trajectories together",
    "tool/failure_rate": "share of tool calls that failed",
    "tool/seconds_p50": "median seconds of a tool call",
    "tool/seconds_p99": "seconds that 99% of the tool calls stayed below",
}
"""What `step_metrics` returns; a reward function's own parts come as `reward/<part>` besides."""


def step_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Return what the policy did in one batch (at least one trajectory), by the names of `STEP_METRICS`."""
    rewards = np.array([t.reward for t in trajectories])
    lengths = np.array([t.response_length for t in trajectories])
    turns = sum(len(t.turns) for t in trajectories)
    calls = sum(t.tool_calls for t in trajectories)
    seconds = [turn.tool_seconds for t in trajectories for turn in t.turns if turn.action in ("search", "access")]
    logprobs_P = np.concatenate([t.rollout_logprobs[t.loss_mask] for t in trajectories])
    groups = defaultdict(list)
    for t in trajectories:
        groups[t.sample.index].append(t.reward)
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "rollout/searches": _mean([t.searches for t in trajectories]),
        "rollout/turns": turns / len(trajectories),
        "rollout/response_length": float(lengths.mean()),
        "rollout/response_length_max": float(lengths.max()),
        "rollout/policy_tokens": _mean([t.policy_length for t in trajectories]),
        "rollout/entropy": -float(logprobs_P.mean(dtype=np.float64)) if len(logprobs_P) else 0.0,
        "rollout/invalid_rate": sum(t.invalid_actions for t in trajectories) / max(turns, 1),
        "rollout/answered": _mean([t.stop == "answer" for t in trajectories]),
        "rollout/truncated": _mean([t.stop == "length" for t in trajectories]),
        "rollout/failed": _mean([t.stop == "error" for t in trajectories]),
        "rollout/forced_final": _mean([t.forced_final for t in trajectories]),
        "rollout/uniform_groups": _mean([len(set(values)) == 1 for values in groups.values()]),
        "tool/calls": float(calls),
        "tool/failure_rate": sum(t.tool_failures for t in trajectories) / max(calls, 1),
        "tool/seconds_p50": float(np.percentile(seconds, 50)) if seconds else 0.0,
        "tool/seconds_p99": float(np.percentile(seconds, 99)) if seconds else 0.0,
    }
    for part in sorted({name for t in trajectories for name in t.reward_parts} - {"reward"}):
        metrics[f"reward/{part}"] = _mean([t.reward_parts.get(part, 0.0) for t in trajectories])
    return metrics


def data_sources(metrics: Mapping[str, object]) -> list[str]:
    """Return the data sources of an evaluation's metrics, sorted; a source's name may itself hold slashes."""
    ending = "/questions"
    return sorted(
        key[len("val/") : -len(ending)]
        for key in metrics
        if key.startswith("val/") and key.count("/") > 1 and key.endswith(ending)
    )


def eval_table(metrics: Mapping[str, float]) -> str:
    """Return the evaluation for people: a row per data source and one for all."""
    names = ("questions", "exact_match", "f1", "searches", "response_length", "invalid_rate", "untagged")
    prefixes = {source: f"val/{source}" for source in data_sources(metrics)} | {"all": "val"}
    width = max(16, *(len(label) + 1 for label in prefixes))
    lines = [" " * width + "".join(f"{name:>17}" for name in names)]
    for label, prefix in prefixes.items():
        cells = []
        for name in names:
            value = metrics.get(f"{prefix}/{name}", float("nan"))
            cells.append(f"{value:>17.0f}" if name == "questions" else f"{value:>17.3f}")
        lines.append(f"{label:<{width}}" + "".join(cells))
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
