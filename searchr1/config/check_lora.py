"""What cannot be true of `actor.lora`."""

from __future__ import annotations

from collections.abc import Iterator

from searchr1.config.load import Problem
from searchr1.config.schema_model import ActorConfig


def check_lora(actor: ActorConfig) -> Iterator[Problem]:
    """Adapters that cannot be, and a backend that has none."""
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
    if actor.lora.dropout != 0:
        yield Problem(
            "actor.lora.dropout", "must be 0: the engine that samples drops nothing, so the probabilities would differ"
        )
    if not actor.lora.target_modules:
        yield Problem("actor.lora.target_modules", "is empty; name linear layers, for example [q_proj, v_proj]")
    if len(set(actor.lora.target_modules)) < len(actor.lora.target_modules):
        yield Problem("actor.lora.target_modules", "names a layer twice")
