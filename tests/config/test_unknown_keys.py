"""Keys that the schema does not know: every command rejects them and names the key that was probably meant."""

from __future__ import annotations

import pytest

from searchr1.cli import main
from searchr1.config.load import ConfigError, known_keys, load_config
from searchr1.config.suggestions import MAX_SUGGESTIONS, MEANINGS, explain_unknown, suggest
from searchr1.preflight.check import check_config
from tests.config.test_config_core import CONFIGS

TINY = CONFIGS / "tiny-cpu.yaml"
SLIPS = {
    # Hugging Face Trainer and TRL
    "actor.optim.learning_rate": "actor.optim.lr",
    "actor.learning_rate": "actor.optim.lr",
    "actor.optim.betas": "actor.optim.adam_beta1",
    "actor.optim.beta2": "actor.optim.adam_beta2",
    "actor.optim.eps": "actor.optim.adam_eps",
    "actor.optim.adam_epsilon": "actor.optim.adam_eps",
    "actor.optim.max_grad_norm": "actor.optim.clip_grad",
    "actor.optim.wd": "actor.optim.weight_decay",
    "actor.lr_sched.warmup_steps": "actor.lr_sched.lr_warmup_iters",
    "actor.lr_sched.warmup_ratio": "actor.lr_sched.lr_warmup_fraction",
    "actor.lr_sched.lr_scheduler_type": "actor.lr_sched.lr_decay_style",
    "actor.model.torch_dtype": "actor.model.precision",
    "rollout.model.dtype": "rollout.model.precision",
    "rollout.model.model_name_or_path": "rollout.model.model_path",
    "algorithm.num_generations": "algorithm.group_size",
    "algorithm.max_completion_length": "algorithm.sampling_params.max_new_tokens",
    "algorithm.beta": "algorithm.kl_beta",
    "algorithm.epsilon_high": "algorithm.clip_ratio_high",
    "algorithm.epsilon": "algorithm.ratio_clip_eps",
    "algorithm.kl_coef": "algorithm.kl_beta",
    "runner.num_train_epochs": "runner.max_epochs",
    "runner.save_steps": "runner.save_interval",
    "runner.eval_steps": "runner.val_check_interval",
    "runner.report_to": "runner.logger.logger_backends",
    "runner.save_total_limit": "runner.keep_checkpoints",
    "runner.resume_from_checkpoint": "runner.resume_dir",
    "runner.run_name": "runner.experiment_name",
    # verl
    "algorithm.adv_estimator": "algorithm.adv_type",
    "algorithm.kl_loss_coef": "algorithm.kl_beta",
    "algorithm.kl_loss_type": "algorithm.kl_penalty_type",
    "algorithm.clip_ratio": "algorithm.ratio_clip_eps",
    "algorithm.entropy_coeff": "algorithm.entropy_bonus",
    "algorithm.loss_agg_mode": "algorithm.loss_agg_func",
    "algorithm.lam": "algorithm.gae_lambda",
    "actor.ppo_mini_batch_size": "algorithm.n_minibatches",
    "actor.ppo_micro_batch_size_per_gpu": "runner.max_tokens_per_mbs",
    "actor.optim.lr_warmup_steps_ratio": "actor.lr_sched.lr_warmup_fraction",
    "actor.grad_clip": "actor.optim.clip_grad",
    "actor.strategy": "actor.training_backend",
    "actor.fsdp.param_offload": "actor.fsdp.cpu_offload",
    "rollout.n": "algorithm.group_size",
    "rollout.name": "runner.experiment_name",
    "rollout.max_model_len": "runner.seq_length",
    "data.train_batch_size": "data.rollout_batch_size",
    "data.train_files": "data.train_data_paths",
    "data.val_files": "data.val_data_paths",
    "data.max_response_length": "algorithm.sampling_params.max_new_tokens",
    "trainer.total_epochs": "runner.max_epochs",
    "trainer.test_freq": "runner.val_check_interval",
    "trainer.save_freq": "runner.save_interval",
    "trainer.nnodes": "cluster.num_nodes",
    "trainer.n_gpus_per_node": "cluster.slots",
    # slime and Megatron
    "algorithm.eps_clip": "algorithm.ratio_clip_eps",
    "algorithm.eps_clip_high": "algorithm.clip_ratio_high",
    "algorithm.n_samples_per_prompt": "algorithm.group_size",
    "actor.model.tp_size": "actor.model.tensor_model_parallel_size",
    "actor.model.tensor_parallel_size": "actor.model.tensor_model_parallel_size",
    "actor.model.pp_size": "actor.model.pipeline_model_parallel_size",
    "runner.num_rollout": "runner.max_steps",
    "reward.rm_type": "reward.reward_type",
    "data.prompt_data": "data.train_data_paths",
    "data.input_key": "data.prompt_key",
    "data.label_key": "data.answer_key",
    # vLLM
    "rollout.vllm.max_num_seqs": "rollout.max_running_requests",
    "rollout.tensor_model_parallel_size": "rollout.tensor_parallel_size",
    "rollout.mem_fraction_static": "rollout.gpu_memory_utilization",
    "rollout.vllm.enforce_eager": "rollout.enforce_eager",
    # OpenRLHF, Search-R1
    "algorithm.init_kl_coef": "algorithm.kl_beta",
    "agentloop.max_obs_length": "agentloop.max_tool_response_length",
    "data.max_start_length": "data.max_prompt_length",
    "tools.search.url": "tools.search.server_addr",
    # the right name in the wrong section
    "critic.lr": "critic.optim.lr",
    "actor.lr": "actor.optim.lr",
    "critic.optim.betas": "critic.optim.adam_beta1",
    "algorithm.temperature": "algorithm.sampling_params.temperature",
    "runner.group_size": "algorithm.group_size",
    "runner.num_nodes": "cluster.num_nodes",
    "actor.weight_decay": "actor.optim.weight_decay",
    "rollout.topk": "tools.search.topk",
    "data.seq_length": "runner.seq_length",
    # misspelt
    "algorithm.group_siz": "algorithm.group_size",
    "actor.optim.weigth_decay": "actor.optim.weight_decay",
    "rollout.gpu_memory_utilisation": "rollout.gpu_memory_utilization",
    "tools.search.server_adr": "tools.search.server_addr",
    "runner.max_step": "runner.max_steps",
    # RLinf's, in a YAML that is not RLinf's
    "actor.fsdp_config.cpu_offload": "actor.fsdp.cpu_offload",
    "actor.model.model_path": "actor.model.path",
    "rollout.model_dir": "rollout.model.model_path",
}
"""Plausible slips and the key that was meant, written down by hand."""


def rejected(*overrides: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load_config(TINY, list(overrides))
    return {problem.key: problem.message for problem in caught.value.problems}


@pytest.mark.parametrize(("slip", "meant"), SLIPS.items())
def test_a_slip_is_rejected_and_the_right_key_is_named(slip, meant):
    known = list(known_keys())
    assert slip not in known
    assert meant in known
    assert meant in suggest(slip, known)
    assert meant in explain_unknown(slip, known)


def test_the_loader_reports_all_slips_at_once():
    # RLinf's data.seq_length has no effect there either: the message gives that reason.
    found = rejected(*(f"{slip}=1" for slip in SLIPS))
    assert set(found) == set(SLIPS)
    assert [slip for slip, meant in SLIPS.items() if meant not in found[slip]] == []


def test_every_name_of_another_system_means_keys_that_are_there():
    known = set(known_keys())
    assert {key for keys in MEANINGS.values() for key in keys} <= known
    assert all(len(suggest(f"algorithm.{name}", sorted(known))) <= MAX_SUGGESTIONS for name in MEANINGS)


@pytest.mark.parametrize("key", ["rollout.sglang.attention_backend", "actor.tokenizer.use_fast", "data.num_workers"])
def test_a_key_of_rlinf_that_means_nothing_here_is_rejected_with_the_reason(key):
    assert "is RLinf's and has no effect here" in rejected(f"{key}=1")[key]


def test_sections_nobody_knows_are_reported_key_by_key():
    assert set(rejected("trainer.total_epochs=1", "+trainer.logger=[console]", "nonsense=2")) == {
        "trainer.total_epochs", "trainer.logger", "nonsense",
    }  # fmt: skip


def test_vars_are_free():
    assert load_config(TINY, ["vars.learning_rate=1"]).vars["learning_rate"] == 1


def test_a_group_that_does_not_exist_is_no_placement():
    config = load_config(TINY, ["cluster.component_placement={actr:all,rollout:all,reward:all}"])
    found = {problem.key: problem.message for problem in check_config(config, for_training=False)}
    assert "did you mean actor?" in found["cluster.component_placement"]


COMMANDS = {
    "train": ["train", str(TINY)],
    "eval": ["eval", str(CONFIGS / "tiny-cpu-eval.yaml")],
    "check-config": ["check-config", str(TINY)],
    "plan-memory": ["plan-memory", str(TINY)],
    "infer": ["infer", "--config", str(TINY), "--prompt", "Who?"],
    "chat": ["chat", "--config", str(TINY)],
    "serve-chat": ["serve-chat", "--config", str(TINY)],
    "demo": ["demo"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_rejects_a_key_it_does_not_know(command, capsys):
    slips = {"actor.optim.learning_rate": "actor.optim.lr", "rollout.vllm.max_num_seqs": "rollout.max_running_requests"}
    assert main([*COMMANDS[command], *(f"{slip}=1" for slip in slips)]) == 2
    printed = capsys.readouterr().err
    for slip, meant in slips.items():
        assert f"{slip}: unknown key; did you mean {meant}" in printed


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "demo"])
def test_every_command_rejects_such_a_key_in_the_file(command, tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text("actor: {optim: {betas: [0.9, 0.95]}}\n")
    words = [str(path) if word.endswith(".yaml") else word for word in COMMANDS[command]]
    assert main(words) == 2
    assert "actor.optim.betas: unknown key; did you mean actor.optim.adam_beta1 or actor.optim.adam_beta2?" in (
        capsys.readouterr().err
    )
