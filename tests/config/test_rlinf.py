"""RLinf's YAMLs mean here what they mean in RLinf; what is ignored has a line, what would change the run is an error."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.rlinf_trees import NAMES, PUBLIC, tree

from searchr1.algorithms.correction import CorrectionSettings, correction_weights
from searchr1.cli import main
from searchr1.config.choices import value_of
from searchr1.config.layout import is_evaluation
from searchr1.config.load import ConfigError, known_keys, load_config, save_config
from searchr1.config.rlinf import is_rlinf
from searchr1.preflight.check import check_config
from tests.config.test_config_core import CONFIGS, ROOT, files  # noqa: F401

RLINF_AGENT = {
    "agentloop.max_turns": 1,  # RLinf's 2 are generations: one turn with a tool, and a last one
    "agentloop.force_final_turn": True,
    "agentloop.toolcall_parser": "searchr1-qwen",
    "agentloop.information_style": "rlinf",
    "agentloop.tool_text_tokens": "whole",
    "agentloop.no_call_ends": True,
    "agentloop.end_token_ends": True,
    "agentloop.no_results_message": None,
    "agentloop.max_tool_response_length": 7096,
    "algorithm.sampling_params.max_new_tokens": 3000,
    "algorithm.eval_sampling_params.do_sample": True,
    "algorithm.eval_sampling_params.temperature": 1.0,
    "algorithm.eval_sampling_params.max_new_tokens": 3000,
}
"""The settings that tests/agent compares with RLinf's own loop, token for token."""
NO_VALIDATION = {"runner.val_check_interval": -1, "runner.val_before_train": False}
FSDP = {
    "actor.training_backend": "fsdp",
    "actor.model.precision": "fp16",
    "actor.model.gradient_checkpointing": True,
    "actor.fsdp.cpu_offload": False,
    "actor.fsdp.reshard_after_forward": True,
    "actor.offload_optimizer": True,
    "actor.offload_weight": True,
    "actor.offload_grad": True,
    "actor.lr_sched.lr_warmup_iters": 188,  # int(.285 x 662)
    "actor.lr_sched.lr_decay_iters": 662,
    "actor.lr_sched.lr_decay_style": "constant",
    "actor.optim.clip_grad": 0.8,
}
MEANT: dict[str, dict[str, Any]] = {
    "megatron": RLINF_AGENT | {"actor.optim.initial_loss_scale": 65536, "actor.lr_sched.lr_warmup_fraction": 0.285},
    "dynamic": RLINF_AGENT | {"algorithm.adv_type": "grpo_dynamic"},
    "loss-scale": RLINF_AGENT
    | {
        "actor.optim.initial_loss_scale": 65536,
        "actor.optim.min_loss_scale": 65536,
        "actor.optim.loss_scale_window": 2**31 - 1,
    },
    "fsdp-amp": RLINF_AGENT | FSDP | NO_VALIDATION,
    "fsdp-grad-scaler": RLINF_AGENT | FSDP,
    "fsdp2": RLINF_AGENT | FSDP | {"algorithm.adv_type": "grpo_dynamic", "runner.save_interval": -1},
    "fsdp-oldest": RLINF_AGENT | FSDP | {"actor.model.gradient_checkpointing": False},
    "eval": RLINF_AGENT
    | {
        "agentloop.max_turns": 4,
        "algorithm.eval_sampling_params.do_sample": False,
        "algorithm.eval_sampling_params.temperature": 0.6,
        "runner.task_type": "reasoning_eval",
    },
    "eval-oldest": RLINF_AGENT | {"runner.task_type": "reasoning_eval", "rollout.model.precision": "fp16"},
}


def written(values: dict[str, Any], folder: Path) -> Path:
    path = folder / "tree.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def edit(path: Path, overrides: list[str]) -> list[str]:
    """Only the paths that stand in the file, edited."""
    text = path.read_text(encoding="utf-8")
    return [word for word in overrides if word.partition("=")[0].rpartition(".")[2].replace("model_path", "model_") in text
            or word.startswith("cluster.")]  # fmt: skip


def leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in values.items():
        found += leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [f"{prefix}{name}"]
    return found


def messages(*arguments: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load_config(*arguments)
    return {problem.key: problem.message for problem in caught.value.problems}


@pytest.mark.parametrize("name", NAMES)
def test_an_rlinf_tree_means_what_it_means_in_rlinf(name, tmp_path, files):  # noqa: F811
    path = written(tree(name), tmp_path)
    config = load_config(path, edit(path, files))
    assert {key: value_of(config, key) for key in MEANT[name]} == MEANT[name]
    assert is_evaluation(config) is name.startswith("eval")
    assert check_config(config, for_training=not is_evaluation(config)) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_ours_or_has_a_line(name, tmp_path):
    values = tree(name)
    values.pop("defaults"), values.pop("hydra")
    config = load_config(written(values, tmp_path))
    told = {note.partition(":")[0].split()[1] for note in config.notes}
    known = set(known_keys())
    free = "cluster.component_placement"

    def has_line(key: str) -> bool:
        return any(f"{key}.".startswith(f"{line}.") or line.startswith(f"{key}.") for line in told)

    assert [key for key in leaves(values) if not (key in known or key.startswith(free) or has_line(key))] == []
    ignored = [note for note in config.notes if note.startswith("ignored")]
    assert ignored == sorted(set(ignored))
    assert all(note.partition(": ")[2] for note in config.notes)


def test_what_is_saved_loads_to_the_same(tmp_path, files):  # noqa: F811
    config = load_config(written(tree("fsdp2"), tmp_path), files)
    save_config(config, tmp_path / "saved.yaml")
    again = load_config(tmp_path / "saved.yaml")
    assert again == config
    assert again.notes == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("agentloop.toolcall_parser=qwen2.5", "is of an agent that is not in here"),
        ("agentloop.toolcall_parser=deepseek-r1", "is of an agent that is not in here"),
        ("agentloop.use_native_tool_messages=True", "appended as plain text"),
        ("agentloop.workflow=mas", "WideSeek-R1"),
        ("agentloop.use_llm_judge=True", "reward.reward_type: judge"),
        ("runner.task_type=embodied", "is not one of reasoning, reasoning_eval"),
        ("algorithm.use_valid_token_scale=True", "would change the run"),
        ("algorithm.clip_log_ratio_max=5", "the log ratio is bounded by 20"),
        ("algorithm.max_num_gen_batches=3", "algorithm.max_refills"),
        ("algorithm.importance_sampling_fix=True", "needs algorithm.importance_sampling_clip"),
        ("algorithm.sampling_params.stop_token_ids=[1]", "algorithm.sampling_params.stop"),
        ("actor.model.expert_model_parallel_size=2", "models are dense"),
        ("actor.tokenizer.tokenizer_model=/other", "is not the model's folder"),
        ("actor.checkpoint_load_path=/somewhere", "runner.resume_dir"),
        ("data.type=code", "would change the run"),
        ("rollout.use_fixed_worker=True", "one engine group"),
        ("rollout_judge.group_name=x", "WideSeek-R1"),
        ("tools.online=True", "online engine"),
        ("inference.load_from_actor=False", "inference.model_path"),
        # Misspelt: nothing in RLinf's sections is a wildcard.
        ("actor.megatron.ckpt_formt=torch", "did you mean actor.megatron.ckpt_format?"),
        ("actor.model.bias_dropuot_fusion=True", "did you mean actor.model.bias_dropout_fusion?"),
        ("rollout.sglang.atention_backend=triton", "did you mean rollout.sglang.attention_backend?"),
        ("algorithm.training_batchsize_per_gpu=1", "did you mean algorithm.training_batch_size_per_gpu?"),
        ("actor.optim.learning_rate=1", "did you mean actor.optim.lr?"),
        ("actor.fsdp_config.cpu_ofload=True", "did you mean actor.fsdp_config.cpu_offload?"),
    ],
)
def test_what_would_change_the_run_and_what_is_misspelt_is_an_error(override, message, tmp_path):
    found = messages(written(tree("megatron"), tmp_path), [override])
    assert [text for key, text in found.items() if override.startswith(key) and message in text]


def test_what_the_command_line_says_in_our_words_stands(tmp_path, files):  # noqa: F811
    said = {
        "agentloop.max_tool_response_length": 300, "agentloop.information_style": "searchr1", "reward.reward_scale": 2.0,
        "algorithm.sampling_params.max_new_tokens": 100, "actor.model.precision": "bf16", "algorithm.shuffle_rollout": True,
    }  # fmt: skip
    path = written(tree("fsdp-amp"), tmp_path)
    config = load_config(path, [*files, *(f"{key}={value}" for key, value in said.items()), "agentloop.max_turns=5"])
    assert {key: value_of(config, key) for key in said} == said
    assert config.agentloop.max_turns == 4  # RLinf's 5 generations
    ours = load_config(path, [*files, "agentloop.max_turns=5", "agentloop.force_final_turn=False"])
    assert ours.agentloop.max_turns == 5


def test_the_actor_starts_from_the_weights_that_rlinf_would_convert(tmp_path, files):  # noqa: F811
    path = written(tree("megatron"), tmp_path)
    assert load_config(path, files).actor.model.path is None
    words = ["actor.megatron.ckpt_convertor.hf_model_path=/other", "actor.megatron.use_hf_ckpt=True"]
    other = load_config(path, [*files, *words])
    assert other.actor.model.path == "/other"


def test_the_agent_loop_is_no_group_of_its_own(tmp_path, files):  # noqa: F811
    for placement in ({"actor,rollout,reward": "all", "agentloop": 0}, {"actor,rollout,agentloop": "all", "reward": "all"}):
        values = tree("megatron")
        values["cluster"]["component_placement"] = placement
        config = load_config(written(values, tmp_path), files)
        assert check_config(config, for_training=True) == []
        assert any("runs inside the rollout group" in note for note in config.notes)


def test_a_megatron_yaml_that_is_taken_to_fsdp_keeps_its_schedule(tmp_path, files):  # noqa: F811
    config = load_config(written(tree("megatron"), tmp_path), [*files, "actor.training_backend=fsdp"])
    assert (config.actor.lr_sched.lr_warmup_fraction, config.actor.lr_sched.lr_decay_iters) == (0.285, 662)


def test_the_importance_sampling_fix_is_our_token_correction(tmp_path):
    values = tree("megatron")
    values["algorithm"] |= {"importance_sampling_fix": True, "importance_sampling_clip": 2.5}
    found = load_config(written(values, tmp_path)).algorithm.mismatch_correction
    settings = CorrectionSettings(found.level, found.bound, found.lower, found.upper, found.veto)
    recomputed, rollout = torch.randn(50).double() * 2, torch.randn(50).double()
    # RLinf: advantages * clamp(exp(recomputed - rollout), max=clip); the clipped loss is linear in the advantage's size.
    weights = correction_weights(recomputed - rollout, torch.zeros(50, dtype=torch.long), settings).weights_P
    torch.testing.assert_close(weights, (recomputed - rollout).exp().clamp(max=2.5))


def test_without_val_data_there_is_a_line_and_no_evaluation(tmp_path, files, capsys):  # noqa: F811
    values = tree("megatron")
    values["data"].pop("val_data_paths", None)
    path = written(values, tmp_path)
    only_paths = [word for word in files if not word.startswith("data.val_data_paths")]
    assert main(["check-config", str(path), *only_paths]) == 0
    assert (
        "set       runner.val_check_interval: -1: no evaluation, because data.val_data_paths is empty"
        in capsys.readouterr().out
    )


def test_a_key_or_two_of_rlinf_make_no_rlinf_tree(tmp_path):
    own = {"runner": {"task_type": "reasoning"}, "agentloop": {"max_turns": 4, "print_outputs": False}}
    assert not is_rlinf(own)
    assert "agentloop.print_outputs" in messages(written(own, tmp_path))
    own["agentloop"].pop("print_outputs")
    config = load_config(written(own, tmp_path))
    assert (config.agentloop.max_turns, config.agentloop.information_style, config.notes) == (4, "searchr1", [])
    marks = ["rollout.eos=1", "rollout.padding=1", "data.type=math", "data.num_workers=2"]
    assert set(messages(CONFIGS / "tiny-cpu.yaml", marks)) == {word.partition("=")[0] for word in marks}


def test_train_says_that_a_yaml_is_for_an_evaluation(tmp_path, files, capsys):  # noqa: F811
    path = written(tree("eval"), tmp_path)
    assert main(["train", str(path), *files]) == 2
    assert "this YAML is for an evaluation; use searchr1 eval" in capsys.readouterr().err
    assert main(["check-config", str(path), *files]) == 0
    assert "\nevaluation  search" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tiny-cpu", "tiny-cpu-eval"])
def test_an_evaluation_is_known_by_its_content(name, tmp_path, files, capsys):  # noqa: F811
    for file in CONFIGS.glob("tiny-cpu*.yaml"):
        (tmp_path / file.name.replace("-eval", "-asked")).write_text(file.read_text())
    path = tmp_path / f"{name.replace('-eval', '-asked')}.yaml"
    assert main(["check-config", str(path), *files]) == 0
    assert ("\nevaluation  search" in capsys.readouterr().out) is name.endswith("-eval")


@pytest.mark.parametrize("path", sorted(PUBLIC.glob("*.yaml")) or [None], ids=lambda path: path.stem if path else "none")
def test_rlinf_s_own_files_pass_with_only_their_paths_edited(path, files, capsys):  # noqa: F811
    if path is None:
        pytest.skip("RLinf's own files are not beside this checkout")
    paths = edit(path, files)
    assert main(["check-config", str(path), *paths]) == 0
    assert "\nignored   rollout.sglang.attention_backend: " in capsys.readouterr().out
    assert main(["plan-memory", str(path), *paths]) in (0, 1)  # whether it fits 80 GiB
    printed = capsys.readouterr()
    assert "Computed, not measured" in printed.out
    assert "ignored   rollout.sglang.attention_backend: " in printed.err
    config = load_config(path, paths)
    assert {key: value_of(config, key) for key in RLINF_AGENT} == RLINF_AGENT


@pytest.mark.parametrize(
    ("script", "command", "recipe"),
    [
        ("run_train", "train", "qwen2.5-3b-tool-1node"),
        ("run_eval", "eval", "qwen2.5-3b-tool-1node-eval"),
        ("run_main_searchr1_single", "train", "qwen2.5-3b-tool-1node"),
        ("run_main_searchr1_single_eval", "eval", "qwen2.5-3b-tool-1node-eval"),
    ],
)
def test_the_scripts_take_rlinf_s_arguments(script, command, recipe, tmp_path):
    stub = tmp_path / "searchr1"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    env = os.environ | {"VIRTUAL_ENV": "set", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for words, config in ((["runner.max_steps=3"], recipe), (["tiny-cpu", "runner.max_steps=3"], "tiny-cpu")):
        run = [ROOT / f"examples/searchr1/{script}.sh", *words]
        printed = subprocess.run(run, env=env, capture_output=True, text=True, timeout=60, check=True).stdout.split()
        assert printed[0] == command
        assert Path(printed[1]).samefile(CONFIGS / f"{config}.yaml")
        assert printed[2:] == ["runner.max_steps=3"]
