"""Suggestions for unknown keys: by spelling, by name in another section, or by another system's name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from searchr1.config.rlinf_keys import KEYS, Ignored, Only, Renamed, Section

MEANINGS_TABLE = """
actor.optim.lr: learning_rate lr_max peak_lr base_lr actor_learning_rate policy_lr actor_lr
critic.optim.lr: critic_learning_rate critic_lr value_lr
actor.lr_sched.min_lr: lr_min min_learning_rate lr_end min_lr_ratio eta_min
actor.optim.adam_beta1, actor.optim.adam_beta2: betas adam_betas adamw_betas
actor.optim.adam_beta1: beta1 adam_beta_1 beta_1
actor.optim.adam_beta2: beta2 adam_beta_2 beta_2
actor.optim.adam_eps: eps epsilon adam_epsilon optimizer_eps
actor.optim.weight_decay: wd l2 decay
actor.optim.clip_grad: grad_clip max_grad_norm gradient_clipping clip_grad_norm max_norm clip_norm grad_norm
actor.lr_sched.lr_warmup_iters: warmup num_warmup_steps lr_warmup_steps warmup_iters lr_warmup
actor.lr_sched.lr_warmup_iters, critic.warmup_steps: warmup_steps
critic.warmup_steps: critic_warmup
actor.lr_sched.lr_warmup_fraction: warmup_ratio lr_warmup_ratio lr_warmup_steps_ratio warmup_steps_ratio warmup_fraction
actor.lr_sched.lr_decay_style: lr_scheduler lr_scheduler_type warmup_style scheduler lr_schedule decay_style
runner.max_steps, actor.lr_sched.lr_decay_iters: total_training_steps num_training_steps decay_steps lr_decay_steps
actor.model.precision, rollout.model.precision: dtype torch_dtype param_dtype model_dtype mixed_precision compute_dtype
rollout.model.model_path, actor.model.path: model_name_or_path pretrain hf_checkpoint model_dir model_name checkpoint
    base_model
rollout.model.model_path, actor.model.path, critic.model_path: path
rollout.model.model_path, actor.model.path, inference.model_path: model_path
inference.model_path: ref_model ref_load ref_path ref_model_path reference_model
actor.model.tensor_model_parallel_size, rollout.tensor_parallel_size: tp tp_size tensor_model_parallel tensor_parallel
    tensor_parallel_size tensor_model_parallel_size rollout_num_gpus_per_engine
actor.model.pipeline_model_parallel_size, rollout.pipeline_parallel_size: pp pp_size pipeline_parallel
    pipeline_parallel_size pipeline_model_parallel_size
actor.model.gradient_checkpointing, actor.model.recompute_granularity: enable_gradient_checkpointing
    activation_checkpointing grad_checkpointing recompute use_gradient_checkpointing
actor.offload_optimizer, actor.fsdp.cpu_offload: optimizer_offload offload optimizer_cpu_offload offload_policy
    adam_offload
actor.offload_weight, actor.fsdp.cpu_offload: param_offload offload_params weight_offload
actor.offload_grad: grad_offload
actor.training_backend: strategy backend train_backend trainer_backend
actor.lora.rank: lora_rank lora_r r
actor.lora.alpha: lora_alpha
actor.lora.target_modules: lora_target_modules target_module
algorithm.ratio_clip_eps, critic.cliprange_value: cliprange
critic.cliprange_value: value_clip cliprange_critic vf_clip value_clip_eps
algorithm.group_size: n num_generations n_samples_per_prompt rollout_n num_samples n_samples group_n num_rollouts
    samples_per_prompt
data.rollout_batch_size: train_batch_size batch_size prompts_per_step gen_batch_size n_prompts
data.rollout_batch_size, algorithm.n_minibatches: global_batch_size
algorithm.n_minibatches: ppo_mini_batch_size mini_batch_size num_minibatches minibatches ppo_epochs num_iterations
    num_steps_per_rollout
runner.max_tokens_per_mbs: micro_batch_size ppo_micro_batch_size ppo_micro_batch_size_per_gpu micro_batch_size_per_gpu
    micro_train_batch_size per_device_train_batch_size gradient_accumulation_steps ppo_max_token_len_per_gpu
    max_tokens_per_gpu max_token_len use_dynamic_bsz log_prob_micro_batch_size
data.val_rollout_batch_size: val_batch_size eval_batch_size per_device_eval_batch_size
algorithm.sampling_params.max_new_tokens, agentloop.max_new_tokens_per_turn: max_completion_length max_response_length
    response_length generate_max_len rollout_max_response_len max_response_len max_tokens max_gen_length
data.max_prompt_length: prompt_length prompt_max_len rollout_max_prompt_len max_prompt_len max_start_length
runner.seq_length: max_model_len max_length max_len max_seq_length context_length max_seq_len max_position_embeddings
data.filter_prompt_by_length: truncation filter_overlong_prompts
rollout.max_running_requests: max_num_seqs max_concurrency max_batch_size concurrency_limit
rollout.gpu_memory_utilization: vllm_gpu_memory_utilization mem_fraction_static gpu_mem_util gpu_memory
    memory_utilization
rollout.enforce_eager: use_cuda_graph cuda_graph
actor.offload_weight, actor.offload_optimizer: free_cache_engine
rollout.vllm.max_num_batched_tokens: max_batched_tokens max_num_batch_tokens
rollout.vllm.enable_prefix_caching: prefix_caching use_prefix_caching
algorithm.sampling_params.temperature: temp sampling_temperature rollout_temperature
algorithm.sampling_params.top_p: top-p rollout_top_p nucleus
algorithm.sampling_params.do_sample: greedy
algorithm.sampling_params.stop: stop_strings stop_words rollout_stop stop_sequences stop_token_ids
algorithm.eval_sampling_params: val_kwargs
algorithm.kl_beta: kl_loss_coef kl_coef beta init_kl_coef kl_coefficient kl_weight use_kl_loss
algorithm.kl_penalty_type: kl_loss_type kl_penalty kl_estimator kl_type
algorithm.kl_in, algorithm.kl_beta: use_kl_in_reward kl_ctrl
algorithm.ratio_clip_eps: epsilon clip_ratio clip_eps eps_clip epsilon_clip clip_range cliprange_policy clip
algorithm.clip_ratio_high: eps_clip_high epsilon_high clip_eps_high
algorithm.clip_ratio_low: eps_clip_low epsilon_low clip_eps_low
algorithm.clip_ratio_c: dual_clip eps_clip_c delta
algorithm.entropy_bonus: entropy_coeff entropy_coef entropy_loss_coef ent_coef entropy_weight
algorithm.gae_lambda: lam lambd gae_lam lmbda
algorithm.adv_type: adv_estimator advantage_estimator advantage estimator
algorithm.loss_type: loss_mode policy_loss loss_fn loss
algorithm.loss_agg_func: loss_agg_mode loss_aggregation agg_func calculate_per_token_loss
algorithm.normalize_advantages: whiten_advantages norm_adv normalize_advantage advantage_normalization
algorithm.max_refills: filter_groups dynamic_sampling dynamic_sampling_filter_path max_num_gen_batches
algorithm.mismatch_correction.level: use_tis rollout_is tis rollout_correction importance_sampling_fix
algorithm.mismatch_correction.upper: tis_clip rollout_is_threshold tis_imp_ratio_cap importance_sampling_clip
agentloop.max_turns: max_steps_per_episode num_turns max_search_turns max_assistant_turns max_user_turns turns
    max_search
agentloop.max_tool_response_length: max_obs_length max_observation_length tool_response_length max_tool_length
tools.search.server_addr, reward.judge.base_url: search_url retriever_url url server address server_address
    retrieval_service_url base_url
tools.search.topk: top_n num_docs retrieval_topk k
tools.search.timeout_s, reward.judge.timeout_s: timeout
reward.reward_type: rm_type reward_fn reward_function custom_reward_function reward_funcs reward_name
reward.weights: reward_weights
reward.reward_scale: scale reward_scaling
reward.format.structure_score: format_score structure_format_score
reward.length_penalty.overlong_buffer: overlong_buffer_len overlong_buffer
runner.max_epochs: total_epochs num_epochs epochs num_train_epochs num_epoch
runner.max_steps: total_steps max_train_steps num_rollout steps num_steps train_iters
runner.save_interval: save_freq save_steps save_every ckpt_interval checkpoint_interval
runner.val_check_interval: test_freq eval_steps eval_interval eval_freq val_freq eval_every val_interval
runner.val_before_train: eval_before_train val_at_start skip_eval_before_train
runner.keep_checkpoints: save_total_limit max_ckpt_to_keep max_actor_ckpt_to_keep keep_last max_checkpoints
runner.resume_dir: resume resume_from resume_from_checkpoint resume_mode resume_path resume_from_path load
runner.output_dir: default_local_dir save_path ckpt_path checkpoint_dir save log_dir
runner.experiment_name: run_name exp_name name
runner.logger.project_name: project wandb_project
runner.logger.logger_backends: logger report_to use_wandb loggers
runner.seed, data.seed, actor.seed: random_seed rng_seed
cluster.num_nodes: nnodes n_nodes num_node nodes
cluster.slots, cluster.component_placement: n_gpus_per_node num_gpus gpus ngpus n_gpus num_gpus_per_node
data.train_data_paths: train_files train_file dataset prompt_data train_path data_path dataset_name
data.val_data_paths: val_files val_file test_files eval_dataset eval_prompt_data val_path test_data_paths
    eval_data_paths
data.prompt_key: input_key question_key prompt_column
data.answer_key: label_key target_key solution_key ground_truth_key answers_key
data.data_size: max_samples limit num_examples train_max_samples
data.prompt_template: template prompt_type system_prompt
data.apply_chat_template: use_chat_template chat_template
"""
"""Each row: our keys, and after the colon their names in verl, TRL, slime, OpenRLHF, Hugging Face or Megatron (the last part
of a key). An indented line continues the row above."""


def _read_table(table: str) -> dict[str, tuple[str, ...]]:
    meanings: dict[str, tuple[str, ...]] = {}
    for row in table.strip().replace("\n    ", " ").splitlines():
        ours, _, theirs = row.partition(":")
        for name in theirs.split():
            meanings[name] = (*meanings.get(name, ()), *(key.strip() for key in ours.split(",")))
    return meanings


MEANINGS = _read_table(MEANINGS_TABLE)
MAX_SUGGESTIONS = 3
"""Number of keys that a message suggests, at most."""


def suggest(key: str, known: Sequence[str]) -> list[str]:
    """Return known keys that `key` may stand for, the likeliest first.

    Args:
        key: the unknown dotted key.
        known: every key of the schema.
    """
    known = [other for other in known if other != key]
    section, _, name = key.rpartition(".")
    siblings = [other for other in known if other.rpartition(".")[0] == section]
    names = difflib.get_close_matches(name, [other.rpartition(".")[2] for other in siblings], 1, 0.8)
    near = [f"{section}.{other}" if section else other for other in names]
    renamed = KEYS.get(key)
    meant = [*([renamed.to] if isinstance(renamed, Renamed) else []), *near]
    meant += _closest(key, [other for other in _as_written(key, MEANINGS.get(name, ())) if other in known])
    if not meant or name not in MEANINGS:
        meant += _closest(key, [other for other in known if other.rpartition(".")[2] == name])
    meant = list(dict.fromkeys(meant))[:MAX_SUGGESTIONS]
    return meant or difflib.get_close_matches(key, siblings, 1, 0.75) or difflib.get_close_matches(key, known, 1, 0.7)


def explain_unknown(key: str, known: Sequence[str]) -> str:
    """Return the message about an unknown key."""
    entry = KEYS.get(key)
    if isinstance(entry, Ignored | Section | Only):
        return f"is RLinf's and has no effect here ({entry.reason}); leave it out"
    suggested = suggest(key, known)
    return "unknown key" + (f"; did you mean {' or '.join(suggested)}?" if suggested else "; leave it out")


def _as_written(key: str, meanings: Iterable[str]) -> list[str]:
    """Return the meanings; for a key of the critic, those in its own section first."""
    keys = list(meanings)
    if key.startswith("critic."):
        keys = [meaning.replace("actor.", "critic.", 1) for meaning in keys] + keys
    return list(dict.fromkeys(keys))


def _closest(key: str, candidates: list[str]) -> list[str]:
    """Return the candidates that share most of the key's sections."""

    def shared(other: str) -> int:
        pairs = zip(key.split("."), other.split("."), strict=False)
        return next((at for at, (a, b) in enumerate(pairs) if a != b), 0)

    most = max(map(shared, candidates), default=0)
    return [other for other in candidates if shared(other) == most]
