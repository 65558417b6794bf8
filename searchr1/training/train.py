"""`searchr1 train`: the whole algorithm, top to bottom."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch

from searchr1.agent.trajectory import Sample, Trajectory
from searchr1.cluster import channels
from searchr1.cluster.actor_worker import ActorShare
from searchr1.cluster.collect import Batch, collect
from searchr1.cluster.groups import Groups, launch
from searchr1.config.layout import actor_layout
from searchr1.config.schema import Config
from searchr1.data.load import load_data
from searchr1.data.loader import PromptLoader
from searchr1.device import Device
from searchr1.evaluation.passages import watch_servers
from searchr1.evaluation.validation import validate
from searchr1.files.folder_lock import FolderLock, folder_lock
from searchr1.learner.packing import sequence_length, split_balanced
from searchr1.tracking.loggers import hosted_loggers, require_backends, start_loggers
from searchr1.tracking.logins import require_logins
from searchr1.tracking.metrics import step_metrics
from searchr1.tracking.run_log import RunLog
from searchr1.tracking.run_path import NAMED_BY, run_path
from searchr1.training.advantages import Advantage, assign_credit
from searchr1.training.critic import train_critic
from searchr1.training.dynamic_sampling import Filled, collect_with_spread
from searchr1.training.health import Health
from searchr1.training.run_folder import RunFolder
from searchr1.training.weight_sync import actor_logprobs, refresh_engines, validate_weights


def train(config: Config) -> Path:
    """Train the policy that `config` describes. Returns the run's folder.

    Raises:
        UserError: something the user can put right; nothing that was saved is lost.
        WorkerDied: a process of the run has died; nothing that was saved is lost.
    """
    with folder_lock(run_path(config), NAMED_BY, "searchr1 train") as lock:
        return train_in(lock, config)


def train_in(lock: FolderLock, config: Config) -> Path:
    """The algorithm, in a folder that no other process writes to."""
    device = Device.detect(config.cluster.device)
    data = load_data(config)
    loader = PromptLoader(
        data.train,
        config.data.rollout_batch_size,
        seed=config.data.seed,
        shuffle=config.data.shuffle,
        max_epochs=config.runner.max_epochs,
    )
    total_steps = loader.total_steps if config.runner.max_steps < 0 else config.runner.max_steps
    folder = RunFolder.open(config, loader)
    require_backends(config.runner.logger.logger_backends)
    require_logins(config.runner.logger.logger_backends)
    if description := folder.describe():
        print(description, flush=True)
    optimizer_steps = total_steps * config.algorithm.n_minibatches
    with (
        folder.explaining_how_to_go_on(),
        launch(config, device, optimizer_steps) as groups,
        watch_servers(config) as servers,
    ):
        timeout_s = config.runner.step_timeout_s
        step = folder.step
        folder.load(groups)
        health = Health.open(config, folder.path, folder.resume_from, step)
        probe = [sample.prompt_ids for sample in data.train[:8]] if config.rollout.validate_weight_first_sync else []
        expected = actor_logprobs(groups, probe, timeout_s) if probe else []
        refresh_engines(groups, step, timeout_s)
        if probe:
            precisions = (config.actor.model.precision, config.rollout.model.precision)
            validate_weights(groups, probe, expected, precisions, timeout_s)
        # Up to `begin` nothing is written: a run that is refused leaves the folder as it was.
        hosted = start_loggers(lambda: hosted_loggers(folder.path, config.runner, dataclasses.asdict(config), step))
        lock.require()
        folder.begin()
        with RunLog(folder.path, config, hosted, first_step=step, total_steps=total_steps) as log:
            if step == 0 and config.runner.val_before_train:
                validate(groups, data.val, config, log, step)

            while step < total_steps:
                step += 1
                started = time.perf_counter()
                filled = collect_training_batch(groups, loader, config, step)
                batch = filled.batch
                folder.finish_save()
                groups.sleep_engines(timeout_s)
                actor_metrics = train_on(groups, batch.trajectories, config, step)
                step_seconds = time.perf_counter() - started
                lock.require()
                saves = is_due(step, total_steps, config.runner.save_interval)
                if saves:  # while the engines sleep: it takes weights and optimizer state on the GPU
                    folder.save(groups, loader, step)
                update_seconds = refresh_engines(groups, step, timeout_s)
                metrics = step_metrics(batch.trajectories) | batch.metrics() | filled.metrics() | actor_metrics
                metrics |= servers.metrics()
                metrics |= {"time/weight_update": update_seconds, "time/step": step_seconds + update_seconds}
                log.step(step, batch.trajectories, metrics)
                folder.step = step
                health.check(step, metrics)
                if is_due(step, total_steps, config.runner.val_check_interval):
                    validate(groups, data.val, config, log, step)
                # What was saved counts from here on: a run killed before evaluates again instead of never.
                if saves and not health.allows_saving(step):
                    folder.drop_save()
                elif not config.runner.async_save:
                    folder.finish_save()
            folder.finish_save()
    return folder.path


def collect_training_batch(groups: Groups, loader: PromptLoader, config: Config, step: int) -> Filled:
    """Scored attempts at the next questions, and at more of them while groups without spread may be replaced."""

    def collect_one(samples: list[Sample], refill: int) -> Batch:
        return collect(
            groups,
            samples,
            step=step,
            mode="train",
            group_size=config.algorithm.group_size,
            seed=hash_seed(config.runner.seed, step, refill),
            timeout_s=config.runner.step_timeout_s,
        )

    return collect_with_spread(loader.next_batch, collect_one, config.algorithm.max_refills)


def train_on(groups: Groups, trajectories: list[Trajectory], config: Config, step: int) -> dict[str, float]:
    """Advantages of whole groups, then every replica of the actor trains on its share. Returns the actor's metrics."""
    assert groups.actor is not None
    minibatches = minibatch_ids(trajectories, config, step)
    critic_metrics: dict[str, float] = {}
    if groups.critic is None:
        advantages: list[Advantage] = assign_credit(trajectories, config.algorithm)
    else:
        advantages, critic_metrics = train_critic(groups.critic, groups.channel, trajectories, minibatches, config)
        if step <= config.critic.warmup_steps:
            return critic_metrics
    replicas = actor_layout(config, groups.actor.size).data_parallel
    for replica, share in enumerate(split_balanced([sequence_length(t) for t in trajectories], replicas)):
        part = ActorShare([trajectories[i] for i in share], [advantages[i] for i in share], [minibatches[i] for i in share])
        groups.channel.put(part, key=channels.actor_key(replica))
    call = groups.actor.call("train_step")
    metrics: dict[str, float] = call.wait(config.runner.step_timeout_s)[0]
    return metrics | critic_metrics | {"time/actor": call.seconds}


def minibatch_ids(trajectories: list[Trajectory], config: Config, step: int) -> list[int]:
    """Which optimizer step of this rollout step each trajectory trains in; a group is never split."""
    prompts = max(t.sample.index for t in trajectories) + 1
    order = torch.arange(prompts)
    if config.algorithm.shuffle_rollout:
        order = torch.randperm(prompts, generator=torch.Generator().manual_seed(hash_seed(config.runner.seed, step)))
    minibatch_P = torch.empty(prompts, dtype=torch.long)
    minibatch_P[order] = torch.arange(prompts) * config.algorithm.n_minibatches // prompts
    return [int(minibatch_P[t.sample.index]) for t in trajectories]


def hash_seed(seed: int, step: int, refill: int = 0) -> int:
    """A seed for one step, or one refill of it; far apart for neighbouring runs and steps."""
    return (seed * 1_000_003 + step * 7_919 + refill * 611_953) % (1 << 31)


def is_due(step: int, total_steps: int, interval: int) -> bool:
    """Every `interval` steps, and after the last one; -1 or 0 means never."""
    return interval > 0 and (step % interval == 0 or step == total_steps)
