"""The evaluation within a training run."""

from __future__ import annotations

from searchr1.agent.trajectory import Sample, Trajectory
from searchr1.cluster.collect import collect_batch
from searchr1.cluster.launch import EvaluationCluster
from searchr1.config.schema import Config
from searchr1.data.loader import eval_batches
from searchr1.evaluation.summary import validation_metrics
from searchr1.tracking.run_log import RunLog


def validate(cluster: EvaluationCluster, samples: list[Sample], config: Config, log: RunLog, step: int) -> dict[str, float]:
    """Answer every question once, greedily, and log it. Return `val/<data source>/<name>`."""
    trajectories: list[Trajectory] = []
    batch_size = config.data.val_rollout_batch_size or len(samples)
    for number, questions in enumerate(eval_batches(samples, batch_size)):
        batch = collect_batch(cluster, questions, step=step, mode="eval", group_size=1, seed=config.runner.seed + number)
        trajectories.extend(batch.trajectories)
    metrics = validation_metrics(trajectories, config.evaluation.untagged)
    log.evaluation(step, trajectories, metrics)
    return metrics
