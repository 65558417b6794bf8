"""How one model is held and trained, whoever asks for it: the policy, the critic, or supervised fine-tuning. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from searchr1.config.critic import critic_backend, critic_model, critic_model_path
from searchr1.config.layout import Layout, model_layout
from searchr1.config.schema import Config
from searchr1.config.schema_model import (
    ActorConfig,
    ActorModelConfig,
    FsdpConfig,
    LoraConfig,
    LrSchedConfig,
    MegatronConfig,
    OptimConfig,
)

Resident = Literal["weight", "optimizer", "grad"]
"""Groups of tensors that can leave the GPU between phases: `actor.offload_*`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """Settings of one model in training, for either backend and any device."""

    section: Literal["actor", "critic"] = "actor"
    """Section of the YAML that error messages name."""
    backend: str = "fsdp"
    """`fsdp` or `megatron`."""
    model_path: str
    """Hugging Face folder or hub name of the weights to start from."""
    model: ActorModelConfig
    """Precision, parallel sizes and recomputation."""
    optim: OptimConfig
    schedule: LrSchedConfig
    """Learning rate over optimizer steps."""
    total_steps: int | None = None
    """Optimizer steps of the whole run, for schedules that decay over it."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    offloads: frozenset[Resident] = frozenset()
    """What leaves the GPU between phases."""
    seed: int
    max_tokens: int
    """Tokens of one micro-batch, at most."""

    @classmethod
    def for_actor(cls, config: Config, total_steps: int | None = None) -> TrainerConfig:
        """Return the policy's settings."""
        actor = config.actor
        return cls(
            backend=actor.training_backend,
            model_path=actor.model.path or config.rollout.model.model_path,
            model=actor.model,
            optim=actor.optim,
            schedule=actor.lr_sched,
            total_steps=total_steps,
            lora=actor.lora,
            fsdp=actor.fsdp,
            megatron=actor.megatron,
            offloads=_offloads(actor),
            seed=actor.seed,
            max_tokens=config.runner.max_tokens_per_mbs,
        )

    @classmethod
    def for_critic(cls, config: Config, total_steps: int | None = None) -> TrainerConfig:
        """Return the critic's settings; what its section leaves open is as the actor's."""
        actor, critic = config.actor, config.critic
        return cls(
            section="critic",
            backend=critic_backend(config),
            model_path=critic_model_path(config),
            model=critic_model(config),
            optim=critic.optim,
            schedule=critic.lr_sched,
            total_steps=total_steps,
            fsdp=actor.fsdp,
            megatron=actor.megatron,
            offloads=_offloads(actor),
            seed=actor.seed,
            max_tokens=config.runner.max_tokens_per_mbs,
        )

    def layout(self, world: int) -> Layout:
        """Return how `world` ranks share the model.

        Raises:
            UserError: the parallel sizes do not divide the ranks.
        """
        return model_layout(self.backend, self.model, world, self.section)


def _offloads(actor: ActorConfig) -> frozenset[Resident]:
    asked: dict[Resident, bool] = {
        "weight": actor.offload_weight,
        "optimizer": actor.offload_optimizer,
        "grad": actor.offload_grad,
    }
    return frozenset(kind for kind, is_asked in asked.items() if is_asked)
