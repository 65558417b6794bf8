"""Retired keys: their values in older YAMLs and in RLinf's are ignored with a line, or rejected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from searchr1.config.rlinf_keys import Ignored, Only
from searchr1.config.schema import Config


@dataclass(frozen=True)
class Restates:
    """A key that repeats another key's setting and must agree with it."""

    reason: str
    contradiction: Callable[[Config, Any], str]
    """Function of the configuration and the value: the contradiction, or an empty text."""


def _precision(name: str) -> Restates:
    def contradiction(config: Config, value: Any) -> str:
        precision = config.actor.model.precision
        agrees = bool(value) == (precision == name)
        return "" if agrees else f"{value} contradicts actor.model.precision: {precision}; leave it out"

    return Restates("actor.model.precision counts", contradiction)


def _peak(section: str) -> Restates:
    def contradiction(config: Config, value: Any) -> str:
        rate = config.critic.optim.lr if section == "critic" else config.actor.optim.lr
        return "" if value == rate else f"{value} contradicts {section}.optim.lr: {rate:g}; leave it out"

    return Restates(f"{section}.optim.lr counts", contradiction)


def _trajectory_fits(config: Config, value: Any) -> str:
    fits = isinstance(value, int) and value >= config.runner.seq_length
    return "" if fits else f"{value} is less than runner.seq_length; leave it out"


MEGATRON = "Megatron-Core's model is built from the model's config.json"
RETIRED: dict[str, Ignored | Only | Restates] = {
    "agentloop.group_name": Ignored("the agent loop runs inside the rollout group"),
    "rollout.model.model_type": Ignored("the family is read from the model's config.json"),
    "rollout.rollout_backend": Only(("vllm", "sglang"), "the engine is vLLM; sglang is read as vllm"),
    "reward.use_reward_model": Only((False,), "reward models are not supported; use reward.reward_type"),
    "actor.mcore_gpt": Only((True,), MEGATRON),
    "actor.spec_name": Only(("decoder_gpt",), MEGATRON),
    "actor.model.apply_rope_fusion": Ignored("not fused, because Transformer Engine is not supported yet"),
    "actor.model.context_parallel_size": Only((1,), "a sequence stays on one rank"),
    "actor.model.seq_length": Restates("runner.seq_length counts", _trajectory_fits),
    "actor.model.activation": Only(("swiglu",), MEGATRON),
    "actor.model.normalization": Only(("rmsnorm",), MEGATRON),
    "actor.model.position_embedding_type": Only(("rope",), MEGATRON),
    "actor.model.add_bias_linear": Only((False,), MEGATRON),
    "actor.optim.optimizer": Only(("adam",), "the optimizer is AdamW"),
    "actor.optim.bf16": _precision("bf16"),
    "actor.optim.fp16": _precision("fp16"),
    "actor.lr_sched.max_lr": _peak("actor"),
    "actor.lora.dropout": Only((0,), "the engine that samples drops nothing, so the probabilities would differ"),
    "actor.megatron.use_profiler": Only((False,), "there is no profiler in here; attach one to a process named ActorGroup"),
    "critic.optim.optimizer": Only(("adam",), "the optimizer is AdamW"),
    "critic.optim.bf16": _precision("bf16"),
    "critic.optim.fp16": _precision("fp16"),
    "critic.lr_sched.max_lr": _peak("critic"),
}
"""Entries by dotted key. A `null` value is ignored without a line."""


def take_retired(values: dict[str, Any]) -> dict[str, Any]:
    """Take the retired keys out of nested values; return them with their values."""
    taken: dict[str, Any] = {}
    for key in RETIRED:
        holder: Any = values
        *sections, name = key.split(".")
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and name in holder:
            taken[key] = holder.pop(name)
    return {key: value for key, value in taken.items() if value is not None}


def explain_retired(taken: dict[str, Any], config: Config) -> Iterator[tuple[str, str, bool]]:
    """Yield key, text, and whether it is a problem, for each retired key that was set.

    Args:
        taken: retired keys and their values.
        config: the configuration without them.
    """
    for key, value in taken.items():
        entry = RETIRED[key]
        problem = ""
        if isinstance(entry, Only):
            # True == 1, but only one of them is meant.
            if not any(value == good and isinstance(value, bool) == isinstance(good, bool) for good in entry.values):
                problem = f"only {entry.values[0]} is supported, found {value}: {entry.reason}"
        elif isinstance(entry, Restates):
            problem = entry.contradiction(config, value)
        yield key, problem or entry.reason, bool(problem)
