"""What the machine cannot do as a configuration asks: several nodes, and precisions that it does not compute in."""

from __future__ import annotations

from collections.abc import Iterator

from searchr1.config.critic import critic_backend
from searchr1.config.load import Problem
from searchr1.config.schema import Config
from searchr1.config.schema_model import FsdpConfig
from searchr1.device import Device, have_liger
from searchr1.errors import UserError


def check_nodes(config: Config) -> Iterator[Problem]:
    """Refuse a run of several machines."""
    nodes = config.cluster.num_nodes
    if nodes > 1:
        yield Problem(
            "cluster.num_nodes",
            f"{nodes} machines are not supported yet: groups, weights and checkpoints stay on one; set it to 1, with all "
            "groups on that one's GPUs",
        )


def require_one_node(config: Config) -> None:
    """Refuse a run of several machines in a command that checks little else.

    Raises:
        UserError: it asks for more than one.
    """
    for problem in check_nodes(config):
        raise UserError(problem.key, problem.message)


def check_precisions(config: Config, device: Device) -> Iterator[Problem]:
    """Refuse a precision that vLLM does not run in on this GPU."""
    if config.rollout.model.precision == "bf16" and not device.has_bf16:
        yield Problem(
            "rollout.model.precision", "bf16 needs a GPU of compute capability 8.0 (Ampere) or newer; use fp16 or fp32"
        )


def precision_warnings(config: Config, for_training: bool) -> Iterator[str]:
    """Name each model that computes in another precision than the YAML says, or slowly in the one that it says."""
    rollout, asked = config.rollout.model.precision, config.actor.model.precision
    backends: dict[str, str] = {"actor": config.actor.training_backend}
    if config.critic.use_critic_model:
        backends["critic"] = critic_backend(config)
    in_bf16 = [name for name, backend in backends.items() if backend == "fsdp"]
    in_bf16 += ["reference model"] if config.algorithm.kl_beta > 0 else []
    if for_training and asked == "fp16" and in_bf16:
        yield (
            f"actor.model.precision: fp16 is computed in bf16 by the {_joined(in_bf16)} on fsdp, which needs no scaling of "
            "the loss; say bf16" + ("" if "actor" in in_bf16 else ", or leave it")
        )
    try:
        device = Device.detect(config.cluster.device)
    except UserError:
        return  # a problem of its own
    used = {"rollout.model.precision": rollout}
    if for_training:
        yield from kernel_warnings(config, device)
        used["actor.model.precision"] = "bf16" if asked == "fp16" and "actor" in in_bf16 else asked
    for key, precision in used.items():
        if device.is_cuda:
            slow = precision == "bf16" and not device.has_bf16 and key.startswith("actor")
        else:
            slow = not device.computes_in(precision)
        if slow:
            yield f"{key}: {precision} has no instructions on this {device.kind.upper()} and is emulated, slowly; use fp32"


def require_precision(config: Config, device: Device) -> Iterator[str]:
    """Give the warnings for an engine alone, in a command that checks little else.

    Raises:
        UserError: vLLM does not run in that precision here.
    """
    for problem in check_precisions(config, device):
        raise UserError(problem.key, problem.message)
    yield from precision_warnings(config, for_training=False)


def check_kernels(fsdp: FsdpConfig, device: Device) -> Iterator[Problem]:
    """Refuse kernels that this machine cannot run."""
    for name, asked in (("liger", fsdp.liger), ("compile", fsdp.compile)):
        if asked and not device.is_cuda:
            yield Problem(f"actor.fsdp.{name}", "needs a GPU; leave the key out")
    if fsdp.liger and device.is_cuda and not have_liger():
        yield Problem("actor.fsdp.liger", "liger_kernel is not installed; pip install liger-kernel, or leave the key out")


def kernel_warnings(config: Config, device: Device) -> Iterator[str]:
    """Say that the FSDP actor's small operations will not be fused."""
    asked = config.actor.fsdp.liger is None and not config.actor.fsdp.compile
    if config.actor.training_backend == "fsdp" and asked and device.is_cuda and not have_liger():
        yield (
            "actor.fsdp.liger: norms, rotations and SwiGLU are not fused, because liger_kernel is not installed; "
            "pip install liger-kernel, or set it to False"
        )


def _joined(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
