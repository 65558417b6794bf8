"""Reject what a training backend or LoRA cannot do, and wrong settings of the critic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from searchr1.config.layout import group_ranks
from searchr1.config.load import Problem
from searchr1.config.schema import Config
from searchr1.config.schema_model import LoraConfig
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.learner.trainer_config import TrainerConfig


def check_backends(config: Config) -> Iterator[Problem]:
    """Yield problems of the actor, and of the critic if there is one."""
    if config.actor.training_backend == "megatron":
        yield from _megatron_actor(config)
        yield from _layout(config, TrainerConfig.for_actor(config))
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


def _layout(config: Config, trainer: TrainerConfig) -> Iterator[Problem]:
    """Reject layouts and models that Megatron-Core cannot do. A model that is still to be downloaded is checked later."""
    section = trainer.section
    try:
        device = Device.detect(config.cluster.device)
        layout = trainer.layout(len(group_ranks(config, section, device)))
        if trainer.backend == "megatron" and (Path(trainer.model_path) / "config.json").is_file():
            from searchr1.checkpoints.model_shape import read_megatron_shape

            read_megatron_shape(trainer.model_path)[0].check_layout(
                layout.tensor_parallel, layout.pipeline_parallel, section
            )
    except UserError as error:
        known = error.key.startswith((f"{section}.", "cluster."))
        yield Problem.of(error) if known else Problem(f"{section}.training_backend", str(error))


def _critic(config: Config) -> Iterator[Problem]:
    critic, trainer = config.critic, TrainerConfig.for_critic(config)
    megatron = trainer.backend == "megatron"
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
    if critic.model.sequence_parallel and (not megatron or trainer.model.tensor_model_parallel_size == 1):
        yield Problem("critic.model.sequence_parallel", "needs tensor_model_parallel_size of 2 or more; set it to False")
    yield from _layout(config, trainer)


MAX_ENGINE_RANK = 512
"""Of an adapter that vLLM takes."""


def check_lora(config: Config) -> Iterator[Problem]:
    """Yield problems of adapters, and a backend that has none."""
    actor = config.actor
    if actor.lora.rank < 0:
        yield Problem("actor.lora.rank", f"must be 0 (off) or more, found {actor.lora.rank}")
    if actor.lora.rank <= 0:
        return
    if actor.training_backend != "fsdp":
        yield Problem(
            "actor.lora.rank",
            "LoRA needs actor.training_backend: fsdp; Megatron's layers, which fuse projections that adapters are made for, "
            "have none here. Set the backend to fsdp, or rank to 0",
        )
    if not actor.lora.alpha > 0:
        yield Problem("actor.lora.alpha", f"must be more than 0, found {actor.lora.alpha:g}")
    if not actor.lora.target_modules:
        yield Problem("actor.lora.target_modules", "is empty; name linear layers, for example [q_proj, v_proj]")
    if len(set(actor.lora.target_modules)) < len(actor.lora.target_modules):
        yield Problem("actor.lora.target_modules", "names a layer twice")
    if actor.lora.weight_update == "adapter":
        yield from _adapter_updates(config)


def _adapter_updates(config: Config) -> Iterator[Problem]:
    key, lora = "actor.lora.weight_update", config.actor.lora
    if lora.rank > MAX_ENGINE_RANK:
        yield Problem(key, f"the engine takes adapters of rank {MAX_ENGINE_RANK} at most, found {lora.rank}; use merged")
    if "lm_head" in lora.target_modules:
        yield Problem(key, "adapter is for projections of the layers; with lm_head in actor.lora.target_modules use merged")
    path = config.actor.model.path
    if path is not None and path != config.rollout.model.model_path:
        yield Problem(
            key,
            f"with adapter the engine keeps rollout.model.model_path as its base, but actor.model.path is {path}; "
            "make them the same, or use merged",
        )


def without_adapters(config: Config) -> Config:
    """Return the run without LoRA, for an engine that nobody trains: the model's folder has everything."""
    return replace(config, actor=replace(config.actor, lora=LoraConfig()))
