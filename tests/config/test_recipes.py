"""The recipes: `searchr1 check-config` passes with the paths edited, and the published numbers are in them."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path

import pytest

import searchr1.device
from searchr1.commands.check_config import main as check_config_command
from searchr1.commands.plan_memory import main as plan_memory_command
from searchr1.config.choices import value_of
from searchr1.config.load import load_config
from searchr1.config.schema import Config
from searchr1.preflight.check import check_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples/searchr1"

QWEN25 = {
    "model_type": "qwen2", "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
    "hidden_size": 2048, "intermediate_size": 11008, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3 = QWEN25 | {
    "model_type": "qwen3", "num_hidden_layers": 28, "num_key_value_heads": 8, "hidden_size": 1024,
    "intermediate_size": 3072, "head_dim": 128,
}  # fmt: skip
LLAMA = QWEN25 | {
    "model_type": "llama", "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
    "hidden_size": 3072, "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip

RECIPES = {
    "qwen2.5-3b-searchr1-v0.2": QWEN25,
    "qwen2.5-3b-searchr1-v0.2-ppo": QWEN25,
    "qwen2.5-3b-searchr1-v0.3": QWEN25,
    "qwen2.5-3b-searchr1-v0.3-ppo": QWEN25,
    "qwen2.5-3b-slime": QWEN25,
    "qwen2.5-3b-dapo": QWEN25,
    "qwen2.5-3b-dr-grpo": QWEN25,
    "qwen2.5-3b-gspo": QWEN25,
    "qwen3-0.6b-1gpu": QWEN3,
    "llama3.2-3b-agent-lightning": LLAMA,
}

INVALID = (
    "\nMy previous action is invalid. If I want to search, I should put the query between <search> and </search>. If I want "
    "to give the final answer, I should put the answer between <answer> and </answer>. Let me try again.\n"
)
SEARCHR1_LOOP = {
    "agentloop.toolcall_parser": "searchr1",
    "agentloop.tool_text_tokens": "whole",
    "agentloop.no_results_message": "",
    "agentloop.end_token_ends": False,
    "agentloop.no_call_ends": False,
    "agentloop.invalid_action_message": INVALID,
}
"""Facts of Search-R1's search_r1/llm_agent/generation.py, which slime's and agent-lightning's examples copied."""
SEARCHR1 = SEARCHR1_LOOP | {
    "data.rollout_batch_size": 512,
    "algorithm.group_size": 5,
    "algorithm.n_minibatches": 8,
    "algorithm.adv_type": "grpo",
    "algorithm.loss_type": "actor",
    "algorithm.loss_agg_func": "token-mean",
    "algorithm.kl_beta": 0.001,
    "algorithm.kl_penalty_type": "low_var_kl",
    "algorithm.ratio_clip_eps": 0.2,
    "algorithm.clip_ratio_high": None,
    "algorithm.entropy_bonus": 0.001,
    "algorithm.sampling_params.temperature": 1.0,
    "algorithm.sampling_params.top_p": 0.95,
    "algorithm.sampling_params.max_new_tokens": 4500,
    "agentloop.max_turns": 4,
    "agentloop.max_new_tokens_per_turn": 500,
    "agentloop.max_tool_response_length": 500,
    "tools.search.topk": 3,
    "runner.max_steps": 1005,
    "data.max_prompt_length": 2048,
    "actor.optim.lr": 1e-6,
    "actor.optim.clip_grad": 1.0,
    "actor.lr_sched.lr_warmup_fraction": 0.285,
    "actor.lr_sched.lr_decay_iters": None,
    "actor.lr_sched.lr_decay_style": "constant",
    "rollout.gpu_memory_utilization": 0.6,
    "reward.reward_type": "searchr1",
}
PPO = {
    "algorithm.adv_type": "gae",
    "algorithm.group_size": 1,
    "algorithm.n_minibatches": 2,
    "algorithm.kl_in": "reward",
    "algorithm.kl_penalty_type": "kl",
    "algorithm.gamma": 1.0,
    "algorithm.gae_lambda": 1.0,
    "critic.use_critic_model": True,
    "critic.optim.lr": 1e-5,
    "critic.lr_sched.lr_warmup_fraction": 0.015,
    "critic.cliprange_value": 0.5,
}
FORMAT = {
    "reward.reward_type": "searchr1_format",
    "reward.format.structure_score": 0.2,
    "reward.format.final_format_score": 0.1,
    "reward.format.retrieval_score": 0.0,
}
PUBLISHED = {
    "qwen2.5-3b-searchr1-v0.2": SEARCHR1,
    "qwen2.5-3b-searchr1-v0.2-ppo": SEARCHR1 | PPO,
    "qwen2.5-3b-searchr1-v0.3": SEARCHR1 | FORMAT | {"actor.optim.lr": 5e-7},
    "qwen2.5-3b-searchr1-v0.3-ppo": SEARCHR1 | PPO | FORMAT,
    "qwen2.5-3b-slime": SEARCHR1_LOOP
    | {
        "algorithm.group_size": 8,
        "algorithm.n_minibatches": 1,
        "data.rollout_batch_size": 32,
        "algorithm.loss_agg_func": "seq-mean-token-mean",
        "algorithm.clip_ratio_low": 0.2,
        "algorithm.clip_ratio_high": 0.28,
        "algorithm.kl_beta": 0.001,
        "algorithm.kl_penalty_type": "low_var_kl",
        "algorithm.entropy_bonus": 0.0,
        "agentloop.max_turns": 2,
        "agentloop.force_final_turn": False,
        "agentloop.max_new_tokens_per_turn": 512,
        "runner.max_steps": 3000,
        "runner.max_tokens_per_mbs": 9216,
        "reward.reward_type": "searchr1",
        "agentloop.max_tool_response_length": 7096,
        "actor.training_backend": "megatron",
        "actor.model.tensor_model_parallel_size": 2,
        "actor.model.sequence_parallel": True,
        "rollout.tensor_parallel_size": 2,
        "actor.optim.lr": 1e-6,
        "actor.optim.adam_beta1": 0.9,
        "actor.optim.adam_beta2": 0.98,
        "actor.optim.weight_decay": 0.01,
    },
    "qwen3-0.6b-1gpu": {
        "data.rollout_batch_size": 32,
        "algorithm.n_minibatches": 2,
        "data.max_prompt_length": 2048,
        "agentloop.max_new_tokens_per_turn": 256,
        "actor.optim.lr": 5e-6,
        "rollout.gpu_memory_utilization": 0.4,  # 0.5 there, without a reference model's pass beside the engine
        "runner.max_steps": 100,
        "algorithm.adv_type": "grpo",
    },
    "llama3.2-3b-agent-lightning": SEARCHR1_LOOP
    | {
        "data.rollout_batch_size": 512,
        "algorithm.group_size": 5,
        "algorithm.n_minibatches": 8,
        "algorithm.clip_ratio_low": 0.2,
        "algorithm.clip_ratio_high": 0.3,
        "algorithm.kl_beta": 0.001,
        "algorithm.kl_penalty_type": "low_var_kl",
        "algorithm.entropy_bonus": 0.0,
        "data.max_prompt_length": 4096,
        "algorithm.sampling_params.max_new_tokens": 4096,
        "agentloop.max_turns": 4,
        "agentloop.max_new_tokens_per_turn": 500,
        "actor.optim.lr": 1e-6,
        "actor.lr_sched.lr_warmup_fraction": 0.95,
        "rollout.gpu_memory_utilization": 0.4,
        "runner.max_steps": 300,
        "runner.save_interval": 10,
        "runner.val_check_interval": 20,
    },
    "qwen2.5-3b-dapo": {
        "algorithm.adv_type": "grpo",
        "algorithm.group_size": 16,
        "algorithm.n_minibatches": 16,
        "data.rollout_batch_size": 512,
        "algorithm.loss_agg_func": "token-mean",
        "algorithm.clip_ratio_low": 0.2,
        "algorithm.clip_ratio_high": 0.28,
        "algorithm.clip_ratio_c": 10.0,
        "algorithm.max_refills": 9,
        "algorithm.kl_beta": 0.0,
        "actor.optim.lr": 1e-6,
        "actor.optim.weight_decay": 0.1,
        "actor.lr_sched.lr_warmup_iters": 320,
    },
    "qwen2.5-3b-dr-grpo": {
        "algorithm.adv_type": "dr_grpo",
        "algorithm.loss_agg_func": "seq-mean-token-sum-norm",
        "algorithm.kl_beta": 0.0,
    },
    "qwen2.5-3b-gspo": {
        "algorithm.loss_type": "gspo",
        "algorithm.loss_agg_func": "seq-mean-token-mean",
        "algorithm.n_minibatches": 4,
        "algorithm.clip_ratio_low": 3e-4,
        "algorithm.clip_ratio_high": 4e-4,
        "algorithm.kl_beta": 0.0,
    },
}


def edited(name: str, folder: Path) -> list[str]:
    """The overrides that stand for editing a recipe's paths; eight processes stand for eight GPUs."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model/config.json").write_text(json.dumps(RECIPES[name]))
    (folder / "rows.jsonl").write_text("{}\n")
    return [
        f"rollout.model.model_path={folder}/model",
        f"data.train_data_paths=[{folder}/rows.jsonl]",
        f"data.val_data_paths=[{folder}/rows.jsonl]",
        "cluster.device=cpu",
        "cluster.slots=8",
    ]


def test_every_recipe_is_in_these_tables():
    tested_elsewhere = {"qwen2.5-3b-tool-1node", "qwen2.5-3b-tool-1node-eval", "tiny-cpu", "tiny-cpu-eval"}
    tested_elsewhere |= {"tiny-gpu", "tiny-gpu-eval"}  # tests/demo/test_demo.py
    shipped = {path.name.removesuffix(".yaml") for path in (EXAMPLES / "config").glob("*.yaml")}
    assert shipped - tested_elsewhere == set(RECIPES) == set(PUBLISHED)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_check_config_passes_with_only_the_paths_edited(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(searchr1.device, "cpu_flags", set)  # whatever CPU tests run on
    assert check_config_command([f"{EXAMPLES}/config/{name}.yaml", *edited(name, tmp_path)]) == 0
    printed = capsys.readouterr().out
    # Nothing that a recipe here says may be without effect. Search-R1's own runs filter with top_p.
    told = ("warning", "ignored", "read", "set")
    assert [line for line in printed.splitlines() if line.startswith(told) and "top_p: 0.95 changes" not in line] == []


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_unedited_only_paths_are_missing(name):
    config = load_config(EXAMPLES / f"config/{name}.yaml", ["cluster.device=cpu", "cluster.slots=8"])
    found = {problem.key for problem in check_config(config, for_training=True)}
    assert {"data.train_data_paths", "data.val_data_paths"} <= found
    assert found <= {"rollout.model.model_path", "data.train_data_paths", "data.val_data_paths"}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, values in PUBLISHED.items() for key in values])
def test_published_number(name, key):
    assert value_of(recipe(name), key) == PUBLISHED[name][key]


@functools.cache
def recipe(name: str) -> Config:
    return load_config(EXAMPLES / f"config/{name}.yaml")


@pytest.mark.parametrize("name", ["qwen2.5-3b-searchr1-v0.2", "qwen3-0.6b-1gpu"])
def test_a_trajectory_has_room_for_every_turn_it_may_take(name):
    config = recipe(name)
    agent = config.agentloop
    turns = agent.max_turns * (agent.max_new_tokens_per_turn + agent.max_tool_response_length)
    assert config.runner.seq_length == config.data.max_prompt_length + turns + agent.max_new_tokens_per_turn


@pytest.mark.parametrize(
    ("name", "gib", "gpus"),
    [("qwen3-0.6b-1gpu", 12, 1), ("llama3.2-3b-agent-lightning", 40, 8), ("qwen2.5-3b-slime", 80, 4)]
    + [(name, 80, 8) for name in RECIPES if name.startswith("qwen2.5-3b-") and "slime" not in name],
)
def test_fits_the_gpus_it_was_written_for(name, gib, gpus, tmp_path, capsys):
    edited(name, tmp_path)
    words = ["--gpu-gib", str(gib), "--gpus", str(gpus), "--model-config", str(tmp_path / "model/config.json")]
    assert plan_memory_command([f"{EXAMPLES}/config/{name}.yaml", *words]) == 0
    assert "Fits" in capsys.readouterr().out


def test_the_12_gb_recipe_needs_its_offload(tmp_path, capsys):
    edited("qwen3-0.6b-1gpu", tmp_path)
    words = ["--gpu-gib", "12", "--gpus", "1", "--model-config", str(tmp_path / "model/config.json")]
    path = f"{EXAMPLES}/config/qwen3-0.6b-1gpu.yaml"
    assert plan_memory_command([path, "actor.fsdp.cpu_offload=False", *words]) == 1


def test_the_script_trains_its_recipe_on_the_model_it_is_given(tmp_path):
    stub = tmp_path / "searchr1"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    env = os.environ | {"BASE_MODEL": "/models/mine", "VIRTUAL_ENV": "set", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = EXAMPLES / "train_qwen3_0.6b.sh"
    result = subprocess.run([script, "runner.max_steps=3"], env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    words = result.stdout.split()
    assert words[0] == "train"
    assert Path(words[1]).samefile(EXAMPLES / "config/qwen3-0.6b-1gpu.yaml")
    assert words[2:] == ["rollout.model.model_path=/models/mine", "runner.max_steps=3"]
