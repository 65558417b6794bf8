"""The training loop: the whole algorithm, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from searchr1.agent.trajectory import Trajectory
from searchr1.cluster.collect import Batch, collect_batch
from searchr1.cluster.critic_worker import CriticGroup
from searchr1.cluster.launch import TrainingCluster
from searchr1.config.schema import AlgorithmConfig, Config
from searchr1.data.loader import PromptLoader
from searchr1.evaluation.evaluate import validate
from searchr1.tracking.metrics import step_metrics
from searchr1.training.advantages import Advantage, compute_advantages, compute_token_advantages
from searchr1.training.dynamic_sampling import replace_uniform_groups
from searchr1.training.run import start_run
from searchr1.training.weight_sync import sync_weights


def update_critic(
    critic: CriticGroup, trajectories: Sequence[Trajectory], minibatch_ids: Sequence[int], algorithm: AlgorithmConfig
) -> tuple[list[Advantage], dict[str, float]]:
    """Train the critic on a step's trajectories. Return their advantages from the critic as it was, and its metrics."""
    shares = critic.shares(trajectories)
    values = critic.values(trajectories, shares)
    advantages, returns = compute_token_advantages(trajectories, algorithm, values)
    metrics = critic.train_step(returns, minibatch_ids, shares).wait()[0]
    return list(advantages), metrics


def train(config: Config) -> Path:
    """Train the policy that `config` describes. Return the run's folder.

    Raises:
        UserError: something that the user can put right; nothing that was saved is lost.
        WorkerDied: a process of the run has died; nothing that was saved is lost.
    """
    with start_run(config) as run:
        cluster, folder = run.cluster, run.folder
        if folder.step == 0 and config.runner.val_before_train:
            validate(cluster, run.validation, config, run.log, step=0)

        for step in range(folder.step + 1, run.total_steps + 1):
            started = time.perf_counter()
            batch = rollout(cluster, run.loader, config, step)
            if config.algorithm.max_refills:
                more = partial(rollout, cluster, run.loader, config, step)
                batch = replace_uniform_groups(batch, more, config.algorithm.max_refills)
            folder.finish_save()

            with cluster.engines_asleep():
                metrics = update_models(cluster, batch.trajectories, config, step)
                updated = time.perf_counter()
                run.lock.require()
                saves = is_due(step, run.total_steps, config.runner.save_interval)
                if saves:
                    folder.save(cluster, run.loader, step)
                saved = time.perf_counter()
            sync_weights(cluster, step)
            synced = time.perf_counter()

            metrics = step_metrics(batch.trajectories) | batch.metrics() | metrics | run.servers.metrics()
            metrics |= {"time/weight_update": synced - saved, "time/step": updated - started + synced - saved}
            run.log.step(step, batch.trajectories, metrics)
            folder.step = step
            run.health.check(step, metrics)
            if is_due(step, run.total_steps, config.runner.val_check_interval):
                validate(cluster, run.validation, config, run.log, step)
            # What was saved counts from here on: a run killed before evaluates again instead of never.
            if saves and not run.health.allows_saving(step):
                folder.drop_save()
            elif not config.runner.async_save:
                folder.finish_save()
    return folder.path


def rollout(cluster: TrainingCluster, loader: PromptLoader, config: Config, step: int, refill: int = 0) -> Batch:
    """Answer the next questions `group_size` times each, and score the answers."""
    return collect_batch(
        cluster,
        loader.next_batch(),
        step=step,
        mode="train",
        group_size=config.algorithm.group_size,
        seed=hash_seed(config.runner.seed, step, refill),
    )


def update_models(
    cluster: TrainingCluster, trajectories: Sequence[Trajectory], config: Config, step: int
) -> dict[str, float]:
    """Train the critic, if there is one, and the policy on a step's trajectories. Return their metrics."""
    minibatches = minibatch_ids(trajectories, config, step)
    critic_metrics: dict[str, float] = {}
    if cluster.critic is None:
        advantages = compute_advantages(trajectories, config.algorithm)
    else:
        advantages, critic_metrics = update_critic(cluster.critic, trajectories, minibatches, config.algorithm)
        if step <= config.critic.warmup_steps:
            return critic_metrics
    update = cluster.actor.train_step(trajectories, advantages, minibatches)
    metrics = update.wait()[0]
    return metrics | critic_metrics | {"time/actor": update.seconds}


def minibatch_ids(trajectories: Sequence[Trajectory], config: Config, step: int) -> list[int]:
    """Return which optimizer step of this rollout step each trajectory trains in; a group is never split."""
    prompts = max(t.sample.index for t in trajectories) + 1
    order = torch.arange(prompts)
    if config.algorithm.shuffle_rollout:
        order = torch.randperm(prompts, generator=torch.Generator().manual_seed(hash_seed(config.runner.seed, step)))
    minibatch_P = torch.empty(prompts, dtype=torch.long)
    minibatch_P[order] = torch.arange(prompts) * config.algorithm.n_minibatches // prompts
    return [int(minibatch_P[t.sample.index]) for t in trajectories]


def hash_seed(seed: int, step: int, refill: int = 0) -> int:
    """Return a seed for one step, or one refill of it; far apart for neighbouring runs and steps."""
    return (seed * 1_000_003 + step * 7_919 + refill * 611_953) % (1 << 31)


def is_due(step: int, total_steps: int, interval: int) -> bool:
    """Return whether `step` is one of every `interval` steps, or the last one; -1 or 0 means never."""
    return interval > 0 and (step % interval == 0 or step == total_steps)
