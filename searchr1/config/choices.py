"""The values that a key with a fixed set of them may have."""

from __future__ import annotations

from searchr1.config.schema import Config

PRECISIONS = ("fp32", "bf16", "fp16")
CHOICES: dict[str, tuple[str | None, ...]] = {
    "actor.model.precision": PRECISIONS,
    "rollout.model.precision": PRECISIONS,
    "algorithm.loss_type": ("actor", "gspo", "cispo", "sapo"),
    "algorithm.loss_agg_func": ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"),
    "algorithm.kl_penalty_type": ("low_var_kl", "k3", "kl", "k1", "mse", "k2", "abs"),
    "algorithm.adv_type": ("grpo", "grpo_dynamic", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "gae"),
    "algorithm.llds_gate": ("action", "response"),
    "algorithm.kl_in": ("loss", "reward"),
    "algorithm.mismatch_correction.level": (None, "token", "sequence", "geometric"),
    "algorithm.mismatch_correction.bound": ("truncate", "clip", "mask", "reject"),
    "algorithm.advantage_mode": ("trajectory", "turn"),
    "agentloop.tool_response_truncate_side": ("right", "left", "middle"),
    "agentloop.information_style": ("searchr1", "rlinf"),
    "agentloop.toolcall_parser": ("tags", "searchr1", "searchr1-qwen"),
    "agentloop.tool_text_tokens": ("parts", "whole"),
    "evaluation.untagged": ("reject", "text"),
    "actor.training_backend": ("fsdp", "megatron"),
    "actor.model.recompute_granularity": (None, "full", "selective"),
    "actor.model.recompute_method": (None, "uniform", "block"),
    "actor.optim.optimizer": ("adam",),
    "actor.lora.base_precision": ("fp32", "compute"),
    "actor.lora.weight_update": ("merged", "adapter"),
    "actor.lr_sched.lr_decay_style": ("constant", "linear", "cosine"),
    "critic.training_backend": (None, "fsdp", "megatron"),
    "critic.optim.optimizer": ("adam",),
    "critic.lr_sched.lr_decay_style": ("constant", "linear", "cosine"),
    "runner.task_type": (None, "reasoning", "reasoning_eval"),
    "rollout.rollout_backend": ("vllm", "sglang"),
    "rollout.distributed_executor_backend": ("mp", "ray"),
    "cluster.device": ("auto", "cpu", "cuda"),
}


def value_of(config: Config, key: str) -> object:
    """The value at a dotted key."""
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value
