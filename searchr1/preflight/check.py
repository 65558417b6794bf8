"""What types cannot say: files, sizes that must fit, and choices that exclude each other."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from searchr1.config.choices import choice_problems, own_code_keys, value_of
from searchr1.config.layout import GROUPS, group_ranks, is_evaluation, placed_groups, visible_gpus
from searchr1.config.load import ConfigError, Problem
from searchr1.config.schema import Config
from searchr1.data.model_settings import template_text
from searchr1.data.model_source import require_source
from searchr1.data.paths import path_problem
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.importing import import_function, is_dotted_path
from searchr1.nvidia import vllm_mismatch
from searchr1.preflight.check_algorithm import algorithm_warnings, check_algorithm
from searchr1.preflight.check_backend import check_backends, check_lora
from searchr1.preflight.check_device import check_kernels, check_nodes, check_precisions, precision_warnings
from searchr1.preflight.check_models import check_models, check_positions
from searchr1.preflight.check_reward import check_evaluation, check_health, check_reward


def require_valid(config: Config, for_training: bool) -> None:
    """Raise a `ConfigError` with every problem, if there is one."""
    problems = [*check_config(config, for_training), *check_models(config, for_training)]
    if for_training and is_evaluation(config):
        problems = [
            Problem(
                "runner.task_type", "this YAML is for an evaluation; use searchr1 eval, or place an actor and say reasoning"
            )
        ]
    if problems:
        raise ConfigError("the configuration", problems)


def check_before_start(config: Config, for_training: bool) -> None:
    """Print warnings on stderr, and raise a `ConfigError` with every problem, if there is one."""
    require_valid(config, for_training)
    for text in warnings(config, for_training):
        print(f"warning: {text}", file=sys.stderr)


def check_config(config: Config, for_training: bool) -> list[Problem]:
    """Return all problems across keys and with files."""
    found = [
        *(Problem(key, message) for key, message in choice_problems(config)),
        *_sizes(config),
        *check_nodes(config),
        *check_positions(config, for_training),
        *check_health(config.runner.health),
        *check_algorithm(config.algorithm, config.critic.use_critic_model),
        *_placement(config, for_training),
        *_files(config, for_training),
        *(check_backends(config) if for_training else ()),
        *_unsupported(config, for_training),
        *(() if for_training else check_evaluation(config)),
        *check_agent(config),
        *check_reward(config.reward, _response_limit(config)),
        *_code(config),
    ]
    return list(dict.fromkeys(found))  # a placement is looked at by several


def warnings(config: Config, for_training: bool = True) -> list[str]:
    """Return warnings: what will run, but perhaps not as meant."""
    found = [*precision_warnings(config, for_training)]
    if for_training:
        found += _training_warnings(config)
    template = config.data.prompt_template
    if template == "asearcher" and not config.tools.access.enabled:
        found.append("tools.access.enabled: False, but data.prompt_template: asearcher tells the policy to read pages")
    if template == "asearcher" and config.agentloop.information_style != "rlinf":
        found.append(
            "agentloop.information_style: only rlinf shows the addresses that data.prompt_template: asearcher promises"
        )
    return found


def _training_warnings(config: Config) -> Iterator[str]:
    yield from algorithm_warnings(config.algorithm)
    if config.actor.lora.weight_update == "adapter" and config.actor.lora.rank == 0:
        yield "actor.lora.weight_update: adapter has no effect with actor.lora.rank: 0, which trains all weights"
    critic, steps = config.critic, config.runner.max_steps
    if critic.use_critic_model and 0 <= steps <= critic.warmup_steps:
        yield (
            f"critic.warmup_steps: {critic.warmup_steps} is all of runner.max_steps: {steps}, so the policy is never trained"
        )


def check_agent(config: Config) -> Iterator[Problem]:
    """Find a tool that the calls' parser cannot read."""
    parser = config.agentloop.toolcall_parser
    if config.tools.access.enabled and parser != "tags":
        yield Problem("agentloop.toolcall_parser", f"{parser} reads no <access>; take tags, or tools.access.enabled: False")


def _sizes(config: Config) -> Iterator[Problem]:
    positive = (
        "algorithm.group_size", "algorithm.n_minibatches", "data.rollout_batch_size", "data.max_prompt_length",
        "runner.seq_length", "runner.max_tokens_per_mbs", "agentloop.max_tool_response_length", "cluster.num_nodes",
        "tools.search.topk", "tools.search.timeout_s", "rollout.tensor_parallel_size", "rollout.pipeline_parallel_size",
        "rollout.max_running_requests", "actor.optim.lr", "actor.optim.clip_grad", "runner.step_timeout_s",
    )  # fmt: skip
    for key in positive:
        value = value_of(config, key)
        if not (isinstance(value, int | float) and value > 0):
            yield Problem(key, f"must be more than 0, found {value}")
    runner, algorithm, data = config.runner, config.algorithm, config.data
    if (runner.logger.trajectories_per_step or 0) < 0:
        yield Problem("runner.logger.trajectories_per_step", "must be 0 or more, or null for all")
    if config.agentloop.max_turns < 0:
        yield Problem("agentloop.max_turns", "must be 0 or more")
    if data.max_prompt_length >= runner.seq_length:
        yield Problem(
            "data.max_prompt_length",
            f"{data.max_prompt_length} leaves nothing of runner.seq_length = {runner.seq_length} for the response",
        )
    if runner.max_tokens_per_mbs < runner.seq_length:
        yield Problem(
            "runner.max_tokens_per_mbs",
            f"{runner.max_tokens_per_mbs} is less than runner.seq_length = {runner.seq_length}: the longest trajectory "
            "would fit in no micro-batch",
        )
    if algorithm.n_minibatches > 0 and data.rollout_batch_size % algorithm.n_minibatches:
        yield Problem(
            "algorithm.n_minibatches",
            f"{algorithm.n_minibatches} does not divide data.rollout_batch_size = {data.rollout_batch_size} "
            "(a mini-batch holds whole groups)",
        )
    if not 0 <= config.tools.search.max_failure_rate <= 1:
        yield Problem("tools.search.max_failure_rate", "must be between 0 and 1")
    for name in ("sampling_params", "eval_sampling_params"):
        sampling = getattr(algorithm, name)
        if sampling is None:
            continue
        if sampling.stop and not config.rollout.detokenize:
            yield Problem("rollout.detokenize", f"must be True: algorithm.{name}.stop has stop strings")
        if sampling.do_sample and sampling.temperature <= 0:
            yield Problem(f"algorithm.{name}.temperature", "must be more than 0 (do_sample: False is greedy)")
        if sampling.repetition_penalty <= 0:
            yield Problem(f"algorithm.{name}.repetition_penalty", "must be more than 0; 1 is off")
        if not 0 < sampling.top_p <= 1:
            yield Problem(f"algorithm.{name}.top_p", "must be in (0, 1]")


def _placement(config: Config, for_training: bool) -> Iterator[Problem]:
    for name in placed_groups(config) - set(GROUPS):
        near = difflib.get_close_matches(name, GROUPS, 1)
        yield Problem(
            "cluster.component_placement",
            f"{name!r} is no group; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(GROUPS)}"),
        )
    try:
        device = Device.detect(config.cluster.device)
        if config.cluster.device == "cpu" and (mismatch := vllm_mismatch("cpu")):
            yield Problem("cluster.device", mismatch)
        yield from check_precisions(config, device)
        if for_training:
            yield from check_kernels(config.actor.fsdp, device)
        if device.is_cuda:
            visible_gpus(device, os.environ)
        groups = ["rollout", "reward", *(["actor"] if for_training else [])]
        groups += ["inference"] if for_training and config.algorithm.kl_beta > 0 else []
        for component in groups:
            group_ranks(config, component, device)
        rollout = len(group_ranks(config, "rollout", device))
        if config.data.rollout_batch_size < rollout:
            yield Problem("data.rollout_batch_size", f"is less than the {rollout} rollout engines")
    except UserError as error:
        yield Problem.of(error)


def _files(config: Config, for_training: bool) -> Iterator[Problem]:
    models = [("rollout.model.model_path", config.rollout.model.model_path)]
    models += [
        (key, value)
        for key, value in (
            ("actor.model.path", config.actor.model.path),
            ("inference.model_path", config.inference.model_path),
            ("critic.model_path", config.critic.model_path),
        )
        if value is not None and for_training
    ]
    for key, path in models:
        try:
            require_source(path, key)
        except UserError as error:
            yield Problem.of(error, key)
    lists = ["data.val_data_paths", *(["data.train_data_paths"] if for_training else [])]
    for key in lists:
        paths = value_of(config, key)
        assert isinstance(paths, list)
        if not paths and (key.endswith("train_data_paths") or not for_training or config.runner.val_check_interval > 0):
            yield Problem(key, "is empty; give a list of files, or of data sets of the hub")
        for path in paths:
            problem = path_problem(path)
            if problem is not None:
                yield Problem(key, problem)
    try:
        template_text(config.data.prompt_template)
    except UserError as error:
        yield Problem.of(error)


def _actor(config: Config) -> Iterator[Problem]:
    actor, model = config.actor, config.actor.model
    if model.megatron_checkpoint is not None:
        if actor.training_backend != "megatron":
            yield Problem("actor.model.megatron_checkpoint", "needs actor.training_backend: megatron")
        elif not (Path(model.megatron_checkpoint) / "metadata.json").is_file():
            yield Problem(
                "actor.model.megatron_checkpoint",
                f"{model.megatron_checkpoint} is no torch_dist checkpoint (metadata.json is missing)",
            )


def _unsupported(config: Config, for_training: bool) -> Iterator[Problem]:
    if for_training:
        yield from _actor(config)
        yield from check_lora(config)


def _response_limit(config: Config) -> int:
    limit = config.algorithm.sampling_params.max_new_tokens
    return min(limit or config.runner.seq_length, config.runner.seq_length)


def _code(config: Config) -> Iterator[Problem]:
    for key in ("agentloop.generate_fn", *own_code_keys()):
        path = value_of(config, key)
        if isinstance(path, str) and is_dotted_path(path):
            try:
                import_function(path, key)
            except UserError as error:
                yield Problem.of(error, key)
