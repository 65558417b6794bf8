"""What cannot be true of `actor.lora`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from searchr1.config.load import Problem
from searchr1.config.schema import Config
from searchr1.config.schema_model import LoraConfig

MAX_ENGINE_RANK = 512
"""Of an adapter that vLLM takes."""


def check_lora(config: Config) -> Iterator[Problem]:
    """Adapters that cannot be, and a backend that has none."""
    actor = config.actor
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
    if actor.lora.weight_update == "adapter":
        yield from _adapter_updates(config)


def _adapter_updates(config: Config) -> Iterator[Problem]:
    key, lora = "actor.lora.weight_update", config.actor.lora
    if lora.rank > MAX_ENGINE_RANK:
        yield Problem(key, f"the engine takes adapters of rank {MAX_ENGINE_RANK} at most, found {lora.rank}; use merged")
    if "lm_head" in lora.target_modules:
        yield Problem(key, "adapter is for projections of the layers; with lm_head in actor.lora.target_modules use merged")
    path = config.actor.model.path
    if path is not None and path != config.rollout.model.model_path:
        yield Problem(
            key,
            f"with adapter the engine keeps rollout.model.model_path as its base, but actor.model.path is {path}; "
            "make them the same, or use merged",
        )


def without_adapters(config: Config) -> Config:
    """The run as an engine sees it that nobody trains: the model's folder has everything, no adapter will come."""
    return replace(config, actor=replace(config.actor, lora=LoraConfig()))
