"""What a training run consists of, and its set-up and end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from searchr1.agent.trajectory import Sample
from searchr1.cluster.launch import TrainingCluster, training_cluster
from searchr1.config.schema import Config
from searchr1.data.dataset import load_data
from searchr1.data.loader import PromptLoader
from searchr1.device import Device
from searchr1.evaluation.tasks import watch_servers
from searchr1.files.folder_lock import FolderLock, folder_lock
from searchr1.preflight.check import check_before_start
from searchr1.retrieval.client.outages import OutageWatch
from searchr1.tracking.loggers import hosted_loggers, require_backends, require_logins, start_loggers
from searchr1.tracking.run_log import RunLog
from searchr1.tracking.run_path import NAMED_BY, run_path
from searchr1.training.health import Health
from searchr1.training.run_folder import RunFolder
from searchr1.training.weight_sync import actor_logprobs, sync_weights, validate_weights

PROBES = 8
"""Prompts that actor and engines both score after the first weight update."""


@dataclass(frozen=True, slots=True)
class Run:
    """A training run that has been set up."""

    cluster: TrainingCluster
    loader: PromptLoader
    """Training questions."""
    validation: list[Sample]
    """Questions of `data.val_data_paths`."""
    total_steps: int
    folder: RunFolder
    lock: FolderLock
    log: RunLog
    health: Health
    servers: OutageWatch


@contextmanager
def start_run(config: Config) -> Iterator[Run]:
    """Read the data, start the worker groups, and go on from a checkpoint if one is asked for; end all of it afterwards.

    Nothing is written before everything has started: a run that is rejected leaves its folder as it was.

    Raises:
        UserError: something that the user can put right; nothing that was saved is lost.
        WorkerDied: a process of the run has died; nothing that was saved is lost.
    """
    check_before_start(config, for_training=True)
    with folder_lock(run_path(config), NAMED_BY, "searchr1 train") as lock:
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
        with (
            folder.explaining_how_to_go_on(),
            training_cluster(config, device, total_steps * config.algorithm.n_minibatches) as cluster,
            watch_servers(config) as servers,
        ):
            first_step = folder.step
            probes = PROBES if config.rollout.validate_weight_first_sync else 0
            probe = [sample.prompt_ids for sample in data.train[:probes]]
            with cluster.engines_asleep():
                folder.load(cluster)
                health = Health.open(config, folder.path, folder.resume_from, first_step)
                expected = actor_logprobs(cluster, probe) if probe else []
            sync_weights(cluster, first_step)
            if probe:
                validate_weights(cluster, probe, expected, (config.actor.model.precision, config.rollout.model.precision))
            hosted = start_loggers(
                lambda: hosted_loggers(folder.path, config.runner, dataclasses.asdict(config), first_step)
            )
            lock.require()
            folder.begin()
            with RunLog(folder.path, config, hosted, first_step=first_step, total_steps=total_steps) as log:
                yield Run(cluster, loader, data.val, total_steps, folder, lock, log, health, servers)
                folder.finish_save()
