"""What a training backend cannot do, and what is wrong with the critic's settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from searchr1.config.critic import critic_run
from searchr1.config.layout import actor_layout
from searchr1.config.load import Problem
from searchr1.config.placement import group_ranks
from searchr1.config.schema import Config
from searchr1.device import Device
from searchr1.errors import UserError


def check_backends(config: Config) -> Iterator[Problem]:
    """Of the actor, and of the critic if there is one."""
    if config.actor.training_backend == "megatron":
        yield from _megatron_actor(config)
        yield from _layout(config, config, "actor")
    if config.critic.use_critic_model:
        yield from _critic(config)


def _megatron_actor(config: Config) -> Iterator[Problem]:
    model = config.actor.model
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        yield Problem("actor.model.sequence_parallel", "needs tensor_model_parallel_size of 2 or more; set it to False")
    if model.gradient_checkpointing:
        yield Problem("actor.model.gradient_checkpointing", "is for fsdp; use actor.model.recompute_granularity: full")
    if model.recompute_granularity == "full" and not (model.recompute_method and model.recompute_num_layers):
        yield Problem("actor.model.recompute_granularity", "full needs recompute_method and recompute_num_layers")


def _layout(config: Config, run: Config, section: str) -> Iterator[Problem]:
    """Layouts and models that Megatron-Core cannot do. A model that is still to be downloaded is looked at later."""
    path = run.actor.model.path or run.rollout.model.model_path
    try:
        device = Device.detect(config.cluster.device)
        layout = actor_layout(run, len(group_ranks(config, section, device)), section)
        if run.actor.training_backend == "megatron" and (Path(path) / "config.json").is_file():
            from searchr1.actor.megatron.architecture import read_architecture

            read_architecture(path)[0].check_layout(layout.tensor_parallel, layout.pipeline_parallel, section)
    except UserError as error:
        key, _, message = str(error).partition(": ")
        known = key.startswith((f"{section}.", "cluster."))
        yield Problem(key, message) if known else Problem(f"{section}.training_backend", str(error))


def _critic(config: Config) -> Iterator[Problem]:
    critic, run = config.critic, critic_run(config)
    megatron = run.actor.training_backend == "megatron"
    positive = {
        "critic.optim.lr": critic.optim.lr,
        "critic.optim.clip_grad": critic.optim.clip_grad,
        "critic.cliprange_value": critic.cliprange_value,
    }
    for key, value in positive.items():
        if not value > 0:
            yield Problem(key, f"must be more than 0, found {value:g}")
    if critic.warmup_steps < 0:
        yield Problem("critic.warmup_steps", f"must be 0 or more, found {critic.warmup_steps}")
    tensor, pipeline = critic.model.tensor_model_parallel_size, critic.model.pipeline_model_parallel_size
    if not megatron:
        for name, size in (("tensor_model_parallel_size", tensor), ("pipeline_model_parallel_size", pipeline)):
            if (size or 1) != 1:
                yield Problem(f"critic.model.{name}", f"{size} needs critic.training_backend: megatron")
        if config.actor.model.megatron_checkpoint is not None and critic.model_path is None:
            yield Problem(
                "critic.model_path",
                "a critic on fsdp cannot start from actor.model.megatron_checkpoint; name a Hugging Face folder here, or "
                "set critic.training_backend: megatron",
            )
    if critic.model.sequence_parallel and (not megatron or run.actor.model.tensor_model_parallel_size == 1):
        yield Problem("critic.model.sequence_parallel", "needs tensor_model_parallel_size of 2 or more; set it to False")
    yield from _layout(config, run, "critic")
