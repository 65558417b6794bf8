"""The models that are trained: policy, critic and reference model, on FSDP2 or Megatron-Core."""

from typing import TYPE_CHECKING

from searchr1.exports import export

if TYPE_CHECKING:
    from searchr1.learner.critic import Critic
    from searchr1.learner.policy import Policy
    from searchr1.learner.trainer_config import TrainerConfig
else:
    __getattr__, __dir__ = export(
        __name__,
        {
            "critic": ["Critic"],
            "policy": ["Policy"],
            "trainer_config": ["TrainerConfig"],
        },
    )

__all__ = [
    "Critic",
    "Policy",
    "TrainerConfig",
]
