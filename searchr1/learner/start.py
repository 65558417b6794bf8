"""Start a model in training on the backend that its settings name."""

from __future__ import annotations

from searchr1.device import Device
from searchr1.learner.backend import AnyPolicyBackend, AnyValueBackend
from searchr1.learner.trainer_config import TrainerConfig


def start_policy_backend(trainer: TrainerConfig, device: Device) -> AnyPolicyBackend:
    """Join the process group and load a policy on the backend that is asked for; a collective.

    Raises:
        UserError: there is no such model, or its backend or layout does not fit it.
    """
    if trainer.backend == "megatron":
        from searchr1.learner.megatron.backend import MegatronBackend

        return MegatronBackend.start(trainer, device)
    from searchr1.learner.fsdp import FsdpBackend

    return FsdpBackend.start(trainer, device)


def start_value_backend(trainer: TrainerConfig, device: Device) -> AnyValueBackend:
    """Join the process group and load a critic on the backend that is asked for; a collective.

    Raises:
        UserError: there is no such model, or its backend or layout does not fit it.
    """
    if trainer.backend == "megatron":
        from searchr1.learner.megatron.backend import MegatronValueBackend

        return MegatronValueBackend.start(trainer, device)
    from searchr1.learner.fsdp import FsdpValueBackend

    return FsdpValueBackend.start(trainer, device)
