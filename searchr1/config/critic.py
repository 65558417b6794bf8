"""The critic's settings, filled up with the actor's."""

from __future__ import annotations

from dataclasses import replace

from searchr1.config.schema import Config
from searchr1.config.schema_model import ActorModelConfig, LoraConfig


def critic_run(config: Config) -> Config:
    """The run as the critic's processes see it: its settings stand where a training backend looks for the actor's."""
    actor, critic = config.actor, config.critic
    backend = critic.training_backend or actor.training_backend
    model = _on_megatron(config) if backend == "megatron" else _on_fsdp(config)
    return replace(
        config,
        actor=replace(
            actor,
            training_backend=backend,
            model=model,
            optim=critic.optim,
            lr_sched=critic.lr_sched,
            lora=LoraConfig(),
        ),
    )


def _path(config: Config) -> str:
    return config.critic.model_path or config.actor.model.path or config.rollout.model.model_path


def _recomputes(config: Config) -> bool:
    """Whether whole layers are computed again in the critic's backward pass."""
    model, own = config.actor.model, config.critic.gradient_checkpointing
    if own is not None:
        return own
    if config.actor.training_backend == "megatron":
        return model.recompute_granularity == "full"
    return model.gradient_checkpointing


def _on_fsdp(config: Config) -> ActorModelConfig:
    return ActorModelConfig(
        precision=config.actor.model.precision, path=_path(config), gradient_checkpointing=_recomputes(config)
    )


def _on_megatron(config: Config) -> ActorModelConfig:
    model, critic = config.actor.model, config.critic
    shared = model if config.actor.training_backend == "megatron" else ActorModelConfig()
    tensor, pipeline = critic.model.tensor_model_parallel_size, critic.model.pipeline_model_parallel_size
    sequence = critic.model.sequence_parallel
    granularity = "full" if _recomputes(config) else None
    if critic.gradient_checkpointing is None and shared.recompute_granularity == "selective":
        granularity = "selective"
    return replace(
        shared,
        precision=model.precision,
        path=_path(config),
        tensor_model_parallel_size=shared.tensor_model_parallel_size if tensor is None else tensor,
        pipeline_model_parallel_size=shared.pipeline_model_parallel_size if pipeline is None else pipeline,
        sequence_parallel=shared.sequence_parallel if sequence is None else sequence,
        recompute_granularity=granularity,
        recompute_method=shared.recompute_method or "uniform",
        recompute_num_layers=shared.recompute_num_layers or 1,
        megatron_checkpoint=None if critic.model_path else model.megatron_checkpoint,
    )
