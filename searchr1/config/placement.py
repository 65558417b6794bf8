"""Which slots each group's processes take. A slot is a GPU, or a process on a CPU."""

from __future__ import annotations

from searchr1.config.critic import critic_run
from searchr1.config.schema import Config
from searchr1.device import Device
from searchr1.errors import UserError


def parse_slots(value: object, slots: int, key: str) -> list[int]:
    """`all`, `3`, `0-3`, `0,2` or mixtures -> slot numbers.

    Raises:
        UserError: not such a value, or a slot that does not exist.
    """
    text = str(value).strip()
    if text == "all":
        return list(range(slots))
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise UserError(f"{key}: {text!r} is no placement; use all, a slot (0), a range (0-3) or a list (0,2)")
        found += range(int(first), int(last or first) + 1)
    if not found or max(found) >= slots or len(set(found)) != len(found):
        raise UserError(f"{key}: {text!r} does not fit {slots} slot{'s' if slots > 1 else ''} (numbered from 0)")
    return sorted(found)


GROUPS = ("actor", "rollout", "reward", "inference", "critic")
"""Worker groups that can be placed."""


def placed_groups(config: Config) -> set[str]:
    """The groups that `cluster.component_placement` names."""
    return {name.strip() for names in config.cluster.component_placement for name in str(names).split(",")}


def is_evaluation(config: Config) -> bool:
    """Whether a YAML is for `searchr1 eval`: it says so, or it places no actor."""
    if config.runner.task_type is not None:
        return config.runner.task_type == "reasoning_eval"
    return "actor" not in placed_groups(config)


def total_slots(config: Config, device: Device) -> int:
    """What `all` means."""
    return config.cluster.slots or device.workers_for_all


def group_slots(config: Config, component: str, device: Device) -> list[int]:
    """Slots of a group. Inference group and critic share the actor's unless they are placed themselves."""
    # A group's own entry goes before one that it shares, so that `component_placement.actor=0-3` overrides a recipe.
    placement = sorted(config.cluster.component_placement.items(), key=lambda item: str(item[0]).count(","))
    for names, value in placement:
        if component in [name.strip() for name in str(names).split(",")]:
            slots = total_slots(config, device)
            if not device.is_cuda and config.cluster.slots is None:
                slots = max(slots, _model_parallel_size(config, component))
            return parse_slots(value, slots, f"cluster.component_placement.{names}")
    if component in ("inference", "critic"):
        # On a CPU one copy of these is enough, however many the actor has.
        if device.is_cuda:
            return group_slots(config, "actor", device)
        return list(range(config.cluster.slots or _model_parallel_size(config, component)))
    raise UserError(f"cluster.component_placement: nothing is said about {component!r}; add `{component}: all`")


def _model_parallel_size(config: Config, component: str) -> int:
    """Processes that one copy of a group's model needs."""
    run = critic_run(config) if component == "critic" else config
    if component not in ("actor", "critic") or run.actor.training_backend != "megatron":
        return 1
    return run.actor.model.tensor_model_parallel_size * run.actor.model.pipeline_model_parallel_size


def group_ranks(config: Config, component: str, device: Device) -> list[tuple[int, ...]]:
    """The processes of a group, each with its slots (several for an engine of several GPUs).

    Raises:
        UserError: the placement does not fit the parallel sizes.
    """
    slots = group_slots(config, component, device)
    size = 1
    if component == "rollout":
        size = config.rollout.tensor_parallel_size * config.rollout.pipeline_parallel_size
    if len(slots) % size:
        raise UserError(
            f"rollout.tensor_parallel_size x rollout.pipeline_parallel_size = {size} does not divide the rollout's "
            f"{len(slots)} slot{'s' if len(slots) > 1 else ''} (cluster.component_placement)"
        )
    return [tuple(slots[i : i + size]) for i in range(0, len(slots), size)]


def shares_gpus(config: Config, device: Device) -> bool:
    """Whether the engines of a training run stand on GPUs that its actor, critic or reference model uses too.

    Then the engines sleep while these compute. Always False on a CPU.

    Raises:
        UserError: a placement that does not fit.
    """
    if not device.is_cuda:
        return False
    users = ["actor"]
    if config.critic.use_critic_model:
        users.append("critic")
    if config.algorithm.kl_beta > 0:
        users.append("inference")
    engines = set(group_slots(config, "rollout", device))
    return any(engines & set(group_slots(config, user, device)) for user in users)
