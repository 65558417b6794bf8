"""How the ranks of the actor or the critic share one model: pure arithmetic, known to the runner and to the ranks alike."""

from __future__ import annotations

from dataclasses import dataclass

from searchr1.config.critic import critic_run
from searchr1.config.schema import Config
from searchr1.errors import UserError


@dataclass(frozen=True, slots=True)
class Layout:
    """Consecutive ranks are tensor-parallel; the pipeline's stages come last, as Megatron-Core orders them."""

    world: int
    tensor_parallel: int
    pipeline_parallel: int

    @classmethod
    def of(cls, world: int, tensor_parallel: int, pipeline_parallel: int, section: str = "actor") -> Layout:
        """The layout of the group that a section of the YAML is about.

        Raises:
            UserError: the sizes do not divide the ranks.
        """
        if min(tensor_parallel, pipeline_parallel) < 1 or world % (tensor_parallel * pipeline_parallel):
            raise UserError(
                f"{section}.model.tensor_model_parallel_size: {tensor_parallel} x pipeline_model_parallel_size "
                f"{pipeline_parallel} does not divide the {section}'s {world} ranks (cluster.component_placement)"
            )
        return cls(world, tensor_parallel, pipeline_parallel)

    @property
    def data_parallel(self) -> int:
        """Replicas, each of which trains on a share of the data."""
        return self.world // (self.tensor_parallel * self.pipeline_parallel)

    def data_rank(self, rank: int) -> int:
        """Which replica a rank belongs to."""
        return rank // self.tensor_parallel % self.data_parallel

    def leads(self, rank: int) -> bool:
        """Whether a rank is its replica's first: the one that takes its share of the data from the channel."""
        return rank % self.tensor_parallel == 0 and rank < self.tensor_parallel * self.data_parallel


def actor_layout(config: Config, world: int, section: str = "actor") -> Layout:
    """The layout of a run's actor group of `world` ranks; on FSDP2 every rank is a replica.

    Args:
        config: of the run, or `critic_run` of it.
        world: ranks.
        section: of the YAML, for messages.

    Raises:
        UserError: the sizes do not divide the ranks.
    """
    if config.actor.training_backend != "megatron":
        return Layout(world, 1, 1)
    model = config.actor.model
    return Layout.of(world, model.tensor_model_parallel_size, model.pipeline_model_parallel_size, section)


def critic_layout(config: Config, world: int) -> Layout:
    """The same of the critic group.

    Raises:
        UserError: likewise.
    """
    return actor_layout(critic_run(config), world, "critic")
