"""How worker groups share the cluster's slots, and how ranks share one model: pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from searchr1.config.critic import critic_backend, critic_model
from searchr1.config.schema import Config
from searchr1.config.schema_model import ActorModelConfig
from searchr1.device import Device
from searchr1.errors import UserError


@dataclass(frozen=True, slots=True)
class Layout:
    """Ranks of one model. Consecutive ranks are tensor-parallel; pipeline stages vary slowest, as in Megatron-Core."""

    world: int
    tensor_parallel: int
    pipeline_parallel: int

    @classmethod
    def of(cls, world: int, tensor_parallel: int, pipeline_parallel: int, section: str = "actor") -> Layout:
        """Return the layout of the worker group that a section of the YAML configures.

        Raises:
            UserError: the sizes do not divide the ranks.
        """
        if min(tensor_parallel, pipeline_parallel) < 1 or world % (tensor_parallel * pipeline_parallel):
            raise UserError(
                f"{section}.model.tensor_model_parallel_size",
                f"{tensor_parallel} x pipeline_model_parallel_size "
                f"{pipeline_parallel} does not divide the {section}'s {world} ranks (cluster.component_placement)",
            )
        return cls(world, tensor_parallel, pipeline_parallel)

    @property
    def data_parallel(self) -> int:
        """Data-parallel ranks: copies of the model, each of which trains on a share of the data."""
        return self.world // (self.tensor_parallel * self.pipeline_parallel)

    def dp_rank(self, rank: int) -> int:
        """Return the data-parallel rank of a process."""
        return rank // self.tensor_parallel % self.data_parallel

    def is_dp_leader(self, rank: int) -> bool:
        """Return whether a process is the first of its data-parallel rank: the one that takes its share of the data."""
        return rank % self.tensor_parallel == 0 and rank < self.tensor_parallel * self.data_parallel


def model_layout(backend: str, model: ActorModelConfig, world: int, section: str) -> Layout:
    """Return how `world` ranks share a model; on FSDP2 every rank is a data-parallel rank of its own.

    Args:
        backend: `fsdp` or `megatron`.
        model: settings with the parallel sizes.
        world: number of ranks of the group.
        section: section of the YAML, for messages.

    Raises:
        UserError: the sizes do not divide the ranks.
    """
    if backend != "megatron":
        return Layout(world, 1, 1)
    return Layout.of(world, model.tensor_model_parallel_size, model.pipeline_model_parallel_size, section)


def actor_layout(config: Config, world: int) -> Layout:
    """Return the layout of a run's actor group of `world` ranks.

    Raises:
        UserError: the sizes do not divide the ranks.
    """
    return model_layout(config.actor.training_backend, config.actor.model, world, "actor")


def critic_layout(config: Config, world: int) -> Layout:
    """Return the layout of a run's critic group of `world` ranks.

    Raises:
        UserError: the sizes do not divide the ranks.
    """
    return model_layout(critic_backend(config), critic_model(config), world, "critic")


def parse_slots(value: object, slots: int, key: str) -> list[int]:
    """Return the slot numbers of a placement: `all`, `3`, `0-3`, `0,2`, a mixture or a list of them.

    Raises:
        UserError: not such a value, or a slot that does not exist.
    """
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value).strip()
    if text == "all":
        return list(range(slots))
    if ":" in text and not isinstance(value, Mapping):
        raise UserError(
            key,
            f"{text!r} numbers processes, which follow from the slots and the parallel sizes here; leave out what is "
            "after each colon",
        )
    chosen: list[int] = []
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        if not _is_number(first) or (dash and not _is_number(last)):
            raise UserError(key, f"{text!r} is no placement; use all, a slot (0), a range (0-3) or a list (0,2)")
        start, end = int(first), int(last or first)
        if end >= slots:
            there = f"are {slots} slots (numbered 0 to {slots - 1})" if slots > 1 else "is 1 slot (number 0)"
            raise UserError(key, f"{text!r} asks for slot {end}, but there {there}; name only what is there, or all")
        if end < start:
            raise UserError(key, f"{text!r} has a range that runs backwards; write {end}-{start}")
        chosen += range(start, end + 1)
    twice = sorted({slot for slot in chosen if chosen.count(slot) > 1})
    if twice:
        raise UserError(key, f"{text!r} names slot {twice[0]} twice; name each once")
    return sorted(chosen)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


VISIBLE = "CUDA_VISIBLE_DEVICES"

GROUPS = ("actor", "rollout", "reward", "inference", "critic")
"""Worker groups that can be placed."""


def placed_groups(config: Config) -> set[str]:
    """Return the groups that `cluster.component_placement` names."""
    return {name.strip() for names in config.cluster.component_placement for name in str(names).split(",")}


def is_evaluation(config: Config) -> bool:
    """Return whether a YAML is for `searchr1 eval`: by `runner.task_type`, else because it places no actor."""
    if config.runner.task_type is not None:
        return config.runner.task_type == "reasoning_eval"
    return "actor" not in placed_groups(config)


def total_slots(config: Config, device: Device) -> int:
    """Return the number of slots that `all` stands for.

    Raises:
        UserError: `cluster.slots` is more than the GPUs there are, or no number of slots at all.
    """
    slots = config.cluster.slots
    if slots is None:
        return device.workers_for_all
    if slots < 1:
        raise UserError("cluster.slots", f"must be 1 or more, or null for all, but is {slots}")
    if device.is_cuda and slots > device.slots:
        raise UserError(
            "cluster.slots",
            f"{slots} is more than the {device.slots} GPU{'s' if device.slots > 1 else ''} that this process "
            "sees (CUDA_VISIBLE_DEVICES); lower it, or leave it out to take them all",
        )
    return slots


def visible_gpus(device: Device, environment: Mapping[str, str]) -> list[int]:
    """Return the physical GPU number of each slot: those in `CUDA_VISIBLE_DEVICES`, in its order, or all.

    Args:
        device: the CUDA device.
        environment: variables of the process that starts the workers.

    Raises:
        UserError: the variable names GPUs that workers cannot be given by number, or some that are not there.
    """
    value = environment.get(VISIBLE)
    if value is None:
        return list(range(device.slots))
    names = [name.strip() for name in value.split(",")]
    for name in names:
        if name.upper().startswith(("GPU-", "MIG-")):
            kind = "a part of a GPU (MIG)" if name.upper().startswith("MIG-") else "a GPU by its UUID"
            raise UserError(
                VISIBLE,
                f"{name!r} is {kind}, but worker processes are given whole GPUs by number; write numbers, "
                "for instance 0,1 (nvidia-smi -L lists both)",
            )
        if not _is_number(name):
            # CUDA ignores such a name and all that come after it.
            raise UserError(VISIBLE, f"{name!r} in {value!r} is no GPU's number; write numbers, for instance 0,1")
    numbers = [int(name) for name in names]
    for number in numbers:
        if numbers.count(number) > 1:
            raise UserError(VISIBLE, f"{value!r} names GPU {number} twice; name each once")
    if len(numbers) != device.slots:
        raise UserError(
            VISIBLE,
            f"{value!r} names {len(numbers)} GPU{'s' if len(numbers) > 1 else ''}, but torch sees "
            f"{device.slots}; name only GPUs that nvidia-smi lists, which are numbered from 0",
        )
    return numbers


def describe_device(device: Device, environment: Mapping[str, str]) -> str:
    """Return the device's name and, on CUDA, the GPU number of each slot, for people.

    Raises:
        UserError: as `visible_gpus` does.
    """
    if not device.is_cuda:
        return device.kind
    numbers = visible_gpus(device, environment)
    return f"cuda, GPU{'s' if len(numbers) > 1 else ''} {' '.join(map(str, numbers))}"


def group_slots(config: Config, component: str, device: Device) -> list[int]:
    """Return the slots of a worker group. Without a placement, inference group and critic share the actor's."""
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
    raise UserError("cluster.component_placement", f"nothing is said about {component!r}; add `{component}: all`")


def _model_parallel_size(config: Config, component: str) -> int:
    """Return the number of processes that one copy of a group's model needs."""
    models = {
        "actor": (config.actor.training_backend, config.actor.model),
        "critic": (critic_backend(config), critic_model(config)),
    }
    backend, model = models.get(component, ("", config.actor.model))
    if backend != "megatron":
        return 1
    return model.tensor_model_parallel_size * model.pipeline_model_parallel_size


def group_ranks(config: Config, component: str, device: Device) -> list[tuple[int, ...]]:
    """Return the processes of a group, each with its slots (several for an engine of several GPUs).

    Raises:
        UserError: the placement does not fit the parallel sizes.
    """
    slots = group_slots(config, component, device)
    size = 1
    if component == "rollout":
        size = config.rollout.tensor_parallel_size * config.rollout.pipeline_parallel_size
    if len(slots) % size:
        raise UserError(
            "rollout.tensor_parallel_size x rollout.pipeline_parallel_size",
            f"{size} does not divide the rollout's {len(slots)} slot{'s' if len(slots) > 1 else ''} "
            "(cluster.component_placement); change one of them",
        )
    return [tuple(slots[i : i + size]) for i in range(0, len(slots), size)]


def shares_gpus(config: Config, device: Device) -> bool:
    """Return whether the engines of a training run share GPUs with its actor, critic or reference model.

    If so, the engines sleep while these compute. Always False on a CPU.

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
