"""Trees with the keys and values of RLinf's Search-R1 YAMLs, as its main branch had them over time (only paths are made up).

Three are fixtures; the others are those with some sections in place of theirs.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

FIXTURES = Path(__file__).parents[1] / "config/fixtures"
PUBLIC = Path(__file__).resolve().parents[3] / "shared/cases/rlinf"
"""RLinf's own files, where this checkout lies beside them."""

FSDP_MODEL = {
    "precision": "fp32", "seq_length": "${runner.seq_length}", "encoder_seq_length": "${runner.seq_length}",
    "model_type": "${rollout.model.model_type}", "model_path": "${rollout.model.model_path}", "is_lora": False,
}  # fmt: skip
FSDP_OPTIM = {
    "optimizer": "adam", "lr": 1e-6, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-5, "min_lr": 0.0,
    "weight_decay": 0.01, "clip_grad": 0.8, "total_training_steps": 662, "lr_warmup_steps_ratio": 0.285,
}  # fmt: skip
FSDP_CONFIG = {
    "strategy": "fsdp", "sharding_strategy": "full_shard", "gradient_checkpointing": True, "cpu_offload": False,
    "offload_pin_memory": True, "reshard_after_forward": True, "enable_gradient_accumulation": True,
    "forward_prefetch": False, "limit_all_gathers": False, "backward_prefetch": None, "use_orig_params": False,
    "use_liger_kernel": True, "fsdp_size": -1,
    "mixed_precision": {"param_dtype": "fp16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
}  # fmt: skip
AMP = {"amp": {"enabled": False, "precision": "fp16", "use_grad_scaler": True}}
AUTOCAST = {"amp_autocast": {"enabled": False, "precision": "fp16"}}
TOKENIZER = {
    "tokenizer_model": "${rollout.model.model_path}", "use_fast": False, "trust_remote_code": True, "padding_side": "right",
}  # fmt: skip


def fsdp_actor(config: dict[str, Any], optim: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """The actor section of RLinf's FSDP YAMLs."""
    return {
        "group_name": "ActorGroup", "training_backend": "fsdp", "enable_dp_load_balance": False, "calculate_flops": False,
        "seed": 1234, "enable_offload": True, "sync_precision": "${rollout.model.precision}", "model": FSDP_MODEL,
        "optim": FSDP_OPTIM | (optim or {}), "tokenizer": TOKENIZER, "fsdp_config": FSDP_CONFIG | config, **more,
    }  # fmt: skip


def read(name: str) -> dict[str, Any]:
    """A fixture's tree."""
    tree: dict[str, Any] = yaml.safe_load((FIXTURES / f"{name}.yaml").read_text())
    return tree


def tree(name: str) -> dict[str, Any]:
    """One of `NAMES`."""
    made = read({"dynamic": "rlinf-train-dynamic", "eval": "rlinf-eval"}.get(name, "rlinf-train"))
    match name:
        case "loss-scale":  # Megatron with a constant loss scale, before the parser had a name
            made["agentloop"].pop("toolcall_parser")
            made["actor"]["optim"].pop("initial_loss_scale", None)
            made["actor"]["optim"].pop("loss_scale_window", None)
            made["actor"]["optim"]["loss_scale"] = 65536
            made["actor"]["megatron"].setdefault("ckpt_convertor", {})["model_type"] = None
        case "fsdp-amp":
            made["actor"] = fsdp_actor(AMP)
            made["data"]["val_data_paths"] = made["data"]["train_data_paths"]
        case "fsdp-grad-scaler":
            made["actor"] = fsdp_actor(AUTOCAST | {"amp_grad_scaler": {"enabled": True}})
        case "fsdp2":
            made["actor"] = fsdp_actor(
                AUTOCAST | {"strategy": "fsdp2", "grad_scaler": {"enabled": True}},
                {"lr_scheduler": "constant"},
                pack_traj=True,
            )
            made["inference"]["fsdp_config"] = "${actor.fsdp_config}"
            made["runner"] |= {"experiment_name": "grpo-${now:%Y%m%d%H%M%S}", "max_steps": 201, "save_interval": -1}
            made["algorithm"] |= {"adv_type": "grpo_dynamic", "advantage_mode": "trajectory", "entropy_op_type": "torch",
                                  "loss_scales": ["group_level", "agent_level", "turn_level"],
                                  "clip_log_ratio_min": -20, "clip_log_ratio_max": 20}  # fmt: skip
            made["agentloop"] |= {"toolcall_parser": "qwen", "toolresp_encoder": "qwen", "is_dynamic_rollout_batch": True}
        case "fsdp-oldest":  # with Megatron's keys left in the optimizer's section
            made["actor"] = fsdp_actor(
                {"amp": {"enabled": True, "precision": "fp16", "use_grad_scaler": True}},
                {"use_distributed_optimizer": True, "optimizer_enable_pin": False, "loss_scale": 65536},
            )
            made["actor"].pop("enable_dp_load_balance")
            made["actor"]["fsdp_config"].pop("gradient_checkpointing")
            made["algorithm"]["entropy_op_type"] = "torch"
            made["agentloop"].pop("toolcall_parser")
        case "eval-oldest":  # task_type says reasoning, and an actor is placed
            made["runner"]["task_type"] = "reasoning"
            made["algorithm"] |= {"group_size": 1}
            made["algorithm"]["sampling_params"].pop("do_sample")
            made["algorithm"]["sampling_params"]["use_greedy"] = False
            made["agentloop"] = {"group_name": "AgentLoopGroup", "max_user_turns": 3, "max_assistant_turns": 2,
                                 "max_parallel_calls": 2, "max_tool_response_length": 500,
                                 "print_outputs": False}  # fmt: skip
            made["tools"] |= {"mcp_file_system": None, "maxturn": 2}
            model = made["rollout"].pop("model")
            made["rollout"] |= {"model_dir": model["model_path"], "model_arch": "qwen2.5", "is_eval": 1,
                                "validate_weight": True,
                                "precision": "${actor.model.precision}", "validate_save_dir": "/path/to/dir"}  # fmt: skip
            made["inference"] = {"model_arch": "${rollout.model_arch}", "group_name": "InferenceGroup"}
            made["actor"]["checkpoint_load_path"] = None
            made["actor"]["tokenizer"]["tokenizer_model"] = "${rollout.model_dir}"
            convertor = {"model": "qwen_2.5_3b", "hf_model_path": "${rollout.model_dir}"}
            made["actor"]["megatron"]["ckpt_convertor"] = convertor
    return copy.deepcopy(made)


NAMES = (
    "megatron", "dynamic", "loss-scale", "fsdp-amp", "fsdp-grad-scaler", "fsdp2", "fsdp-oldest", "eval", "eval-oldest",
)  # fmt: skip
