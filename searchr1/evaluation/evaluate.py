"""Evaluate a model on question sets, method by method, or within a training run."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from searchr1.agent.trajectory import Sample, Trajectory
from searchr1.cluster.collect import Collection, RolloutStats, collect_batch
from searchr1.cluster.launch import EvaluationCluster, evaluation_cluster
from searchr1.config.load import given_keys
from searchr1.config.schema import Config
from searchr1.data.loader import eval_batches
from searchr1.device import Device
from searchr1.errors import UserError, WorkerDied
from searchr1.evaluation.manifest import billions
from searchr1.evaluation.methods import sampling_note
from searchr1.evaluation.result_files import write_results
from searchr1.evaluation.results import Results, method_result
from searchr1.evaluation.summary import flat_metrics, validation_metrics
from searchr1.evaluation.tasks import (
    Questions,
    Task,
    add_passages,
    begin,
    evaluation_path,
    follow_model,
    load_questions,
    open_tasks,
    require_server,
    watch_servers,
    with_judge,
)
from searchr1.files.folder_lock import FolderLock, folder_lock
from searchr1.preflight.check import check_before_start
from searchr1.preflight.check_backend import without_adapters
from searchr1.shutdown import Stopped
from searchr1.tracking.eval_progress import EvalProgress
from searchr1.tracking.loggers import (
    GuardedLogger,
    file_loggers,
    hosted_loggers,
    require_backends,
    require_logins,
    start_loggers,
)
from searchr1.tracking.run_log import RunLog
from searchr1.tracking.run_path import NAMED_BY, run_path


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


def evaluate(config: Config) -> tuple[Results, Path]:
    """Evaluate the model that `config` names, or go on with it. Return the results and the folder that holds them.

    Raises:
        UserError: something the user can put right; what was finished is kept, and the same call goes on from there.
        WorkerDied: a process of the run has died; the same holds.
    """
    follow_model(config, given_keys(config))
    check_before_start(config, for_training=False)
    with folder_lock(run_path(config), NAMED_BY, "searchr1 eval") as lock:
        return evaluate_in(lock, config)


def evaluate_in(lock: FolderLock, config: Config) -> tuple[Results, Path]:
    """Evaluate in a folder that no other process writes to."""
    config = without_adapters(with_judge(config))
    device = Device.detect(config.cluster.device)
    questions = load_questions(config)
    print(f"questions: {questions.described}", flush=True)
    folder = evaluation_path(config)
    require_backends(config.runner.logger.logger_backends)
    require_logins(config.runner.logger.logger_backends)
    tasks = open_tasks(config, folder, questions)
    print(f"attempts: {sampling_note(tasks[0].settings, config.algorithm.group_size)}", flush=True)
    try:
        answer_pending(lock, config, device, tasks, questions, folder)
    except UserError as error:
        raise UserError(f"{error}\n{kept(tasks, folder, config.runner.overwrite)}") from error
    except (Stopped, WorkerDied) as error:
        error.go_on = f"; {kept(tasks, folder, config.runner.overwrite)}"
        raise
    except BaseException:
        print(kept(tasks, folder, config.runner.overwrite), file=sys.stderr)
        raise
    finally:
        for task in tasks:
            task.ledger.close()
    results = summarise_tasks(config, tasks, questions)
    write_results(folder, results)
    log_results(config, tasks, results)
    return results, folder


def kept(tasks: list[Task], folder: Path, overwrite: bool) -> str:
    """Return a sentence about what an evaluation that stops leaves."""
    if overwrite and not tasks[0].ledger.begun:
        return f"nothing in {folder} was changed"
    done, total = sum(len(task.ledger.finished) for task in tasks), sum(len(task.samples) for task in tasks)
    again = "the same command without runner.overwrite=True" if overwrite else "the same command"
    return f"{done} of {total} questions are finished and kept in {folder}; {again} goes on from there"


def answer_pending(
    lock: FolderLock, config: Config, device: Device, every: list[Task], questions: Questions, folder: Path
) -> None:
    """Answer what is not finished. No process is started if everything is.

    Nothing is written before the worker groups have started: an evaluation that is rejected leaves the folder as it was.
    """
    tasks = [task for task in every if task.pending]
    if not tasks:
        begin(config, folder, every)
        print("every question was finished before", flush=True)
        return
    for task in tasks:
        if task.ledger.spoiled:
            print(
                f"{task.method.name}: {len(task.ledger.spoiled)} questions whose tool calls failed are asked again",
                flush=True,
            )
    if any(task.method.searches or task.method.retrieves for task in tasks) and not config.tools.search.dummy_mode:
        require_server(config)
    pending = {
        task.method.name: add_passages(config, task, questions) if task.method.retrieves else task.pending for task in tasks
    }
    searched = any(task.method.searches for task in tasks)
    with evaluation_cluster(config, device) as cluster, watch_servers(config, searched):
        lock.require()
        begin(config, folder, every)
        for task in tasks:
            answer(lock, cluster, task, pending[task.method.name], config)


def answer(lock: FolderLock, cluster: EvaluationCluster, task: Task, samples: list[Sample], config: Config) -> RolloutStats:
    """Answer one method's questions; each is in the ledger as soon as it is finished."""
    group_size = config.algorithm.group_size
    collection = Collection(
        cluster,
        samples,
        step=0,
        mode="eval",
        group_size=group_size,
        seed=config.runner.seed,
        settings=task.settings,
        # As many again as the engine takes at once: some wait for a search, and the engine never runs dry.
        in_flight=math.ceil(2 * config.rollout.max_running_requests / group_size),
    )
    with EvalProgress(task.method.name, len(task.samples), len(task.ledger.finished)) as bar:
        for trajectories in collection:
            lock.require()
            task.ledger.append(trajectories)
            questions = {trajectory.sample.index for trajectory in trajectories}
            task.ledger.finished |= questions
            right = sum(trajectory.reward_parts["exact_match"] for trajectory in trajectories)
            bar.advance(len(questions), right, len(trajectories))
    return collection.stats()


def summarise_tasks(config: Config, tasks: list[Task], questions: Questions) -> Results:
    """Score everything that the ledgers hold."""
    methods = {}
    for task in tasks:
        how = sampling_note(task.settings, config.algorithm.group_size)
        wanted = len(task.samples) * config.algorithm.group_size
        result = method_result(
            task.ledger.rows(), wanted, str(task.folder), how, config.runner.seed, config.evaluation.untagged
        )
        methods[task.method.name] = result
    model = config.rollout.model.model_path
    return Results(model, billions(model), methods, _settings(config, tasks, questions))


def log_results(config: Config, tasks: list[Task], results: Results) -> None:
    """Log each method's metrics, once its results are written: a service that fails takes none of them."""
    for task in tasks:
        metrics = flat_metrics(results.methods[task.method.name].summary)
        runner = replace(config.runner, experiment_name=f"{config.runner.experiment_name}-{task.method.name}")
        makers = (
            partial(file_loggers, task.folder, runner.logger.logger_backends, first_step=0),
            partial(hosted_loggers, task.folder, runner, {}, first_step=0),
        )
        for make in makers:
            try:
                loggers = start_loggers(make)
            except UserError as error:
                print(f"warning: {error}; the results are written, but not logged there", file=sys.stderr)
                continue
            for logger in map(GuardedLogger, loggers):
                logger.log(0, metrics)
                logger.close()


def _settings(config: Config, tasks: list[Task], questions: Questions) -> dict[str, str]:
    """Return what a reader of the tables needs, by name."""
    search, agent = config.tools.search, config.agentloop
    settings = {
        "model": config.rollout.model.model_path,
        "precision": config.rollout.model.precision,
        "questions": f"{questions.described} of {', '.join(config.data.val_data_paths)}",
        "attempts": sampling_note(tasks[-1].settings, config.algorithm.group_size),
        "prompt of the search loop": config.data.prompt_template or "the rows' own",
        "chat template": "yes" if questions.chat else "no",
        "limits": f"{config.runner.seq_length} tokens, {agent.max_turns} turns with tools, {agent.max_tool_response_length} "
        "tokens of a tool's text",
        "passages": "none (dummy_mode)" if search.dummy_mode else f"top {search.topk} of {search.server_addr}",
    }
    if config.evaluation.untagged == "text":
        settings["answers without a tag"] = "the text of the last turn (evaluation.untagged: text)"
    if "judge" in config.reward.weights:
        settings["judge"] = f"{config.reward.judge.model} at {config.reward.judge.base_url}"
    return settings
