"""The critic's settings, with the actor's where the critic has none."""

from __future__ import annotations

from dataclasses import replace

from searchr1.config.schema import Config
from searchr1.config.schema_model import ActorModelConfig, Recomputation


def critic_backend(config: Config) -> str:
    """Return the critic's training backend."""
    return config.critic.training_backend or config.actor.training_backend


def critic_model_path(config: Config) -> str:
    """Return the folder or hub name of the decoder that the critic starts from."""
    return config.critic.model_path or config.actor.model.path or config.rollout.model.model_path


def critic_model(config: Config) -> ActorModelConfig:
    """Return the critic's model settings for its backend: precision, parallel sizes and recomputation."""
    if critic_backend(config) == "megatron":
        return _on_megatron(config)
    return ActorModelConfig(
        precision=config.actor.model.precision,
        path=critic_model_path(config),
        gradient_checkpointing=_recomputes_layers(config),
    )


def _recomputes_layers(config: Config) -> bool:
    """Return whether whole layers are recomputed in the critic's backward pass."""
    model, own = config.actor.model, config.critic.gradient_checkpointing
    if own is not None:
        return own
    if config.actor.training_backend == "megatron":
        return model.recompute_granularity == "full"
    return model.gradient_checkpointing


def _on_megatron(config: Config) -> ActorModelConfig:
    model, critic = config.actor.model, config.critic
    shared = model if config.actor.training_backend == "megatron" else ActorModelConfig()
    tensor, pipeline = critic.model.tensor_model_parallel_size, critic.model.pipeline_model_parallel_size
    sequence = critic.model.sequence_parallel
    granularity: Recomputation | None = "full" if _recomputes_layers(config) else None
    if critic.gradient_checkpointing is None and shared.recompute_granularity == "selective":
        granularity = "selective"
    return replace(
        shared,
        precision=model.precision,
        path=critic_model_path(config),
        tensor_model_parallel_size=shared.tensor_model_parallel_size if tensor is None else tensor,
        pipeline_model_parallel_size=shared.pipeline_model_parallel_size if pipeline is None else pipeline,
        sequence_parallel=shared.sequence_parallel if sequence is None else sequence,
        recompute_granularity=granularity,
        recompute_method=shared.recompute_method or "uniform",
        recompute_num_layers=shared.recompute_num_layers or 1,
        megatron_checkpoint=None if critic.model_path else model.megatron_checkpoint,
    )
