"""RLinf's keys that the schema lacks, each with its treatment: renamed, ignored with a reason, or rejected with a reason.

The keys are listed one by one, so that a misspelt key is reported. Only sections that RLinf passes on unread may hold any
key.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Renamed:
    """A key of the schema by another name."""

    to: str


@dataclass(frozen=True)
class Ignored:
    """A key that changes no result here."""

    reason: str


@dataclass(frozen=True)
class Section:
    """A whole section without effect, whatever its keys."""

    reason: str


@dataclass(frozen=True)
class Only:
    """A key without effect at these values; any other value is rejected."""

    values: tuple[object, ...]
    reason: str


@dataclass(frozen=True)
class Rejected:
    """A key that would change the run."""

    reason: str


Entry = Renamed | Ignored | Section | Only | Rejected


def _all(section: str, names: str, entry: Entry) -> dict[str, Entry]:
    return {f"{section}.{name}": entry for name in names.split()}


OFF = (None, False)
PACKED = Ignored("micro-batches are packed up to runner.max_tokens_per_mbs, which changes no gradient")
BY_ROOM = Ignored("an engine takes questions as it has room (rollout.max_running_requests), which changes no result")
ENGINE = Ignored("a setting of SGLang or of vLLM's kernels; the engine is vLLM with its own choice")
SHAPE = Ignored("the model's config.json says it")
FUSED = Ignored("chosen by what is installed; the arithmetic is the same")
MEMORY = Ignored("about memory and traffic only; the trainer is FSDP2")
LIGER = Ignored("they are taken on a GPU where liger_kernel is installed; actor.fsdp.liger: False leaves them out")
CONVERTED = Ignored(
    "weights are read from the Hugging Face folder, nothing is converted; after training: searchr1 convert mg2hf"
)
TOKENIZER = Ignored("the tokenizer is the model's own, and no code of a model's folder is run")
UNREAD = Ignored("RLinf's Search-R1 agent does not read it")
WIDESEEK = Rejected("is WideSeek-R1's, whose agents are not in here; remove it to run the Search-R1 agent")
REFERENCE = Ignored("the reference model is held as the actor is")

FSDP_MEMORY = """
    strategy sharding_strategy offload_pin_memory enable_gradient_accumulation forward_prefetch limit_all_gathers
    backward_prefetch use_orig_params fsdp_size gradient_checkpointing_use_reentrant
    init_model_with_meta_device save_full_model_weights
"""
FSDP_PRECISION = """
    mixed_precision.param_dtype mixed_precision.reduce_dtype mixed_precision.buffer_dtype amp.enabled amp.precision
    amp.use_grad_scaler amp_autocast.enabled amp_autocast.precision grad_scaler.enabled grad_scaler.init_scale
    grad_scaler.growth_interval amp_grad_scaler.enabled amp_grad_scaler.init_scale amp_grad_scaler.growth_interval
"""
MEGATRON_SHAPE = """
    padded_vocab_size max_position_embeddings rotary_base share_embeddings_and_output_weights num_layers hidden_size
    num_attention_heads num_query_groups ffn_hidden_size attention_dropout hidden_dropout add_qkv_bias qk_layernorm
    layernorm_epsilon head_dim kv_channels make_vocab_size_divisible_by add_position_embedding
"""
MEGATRON_FUSED = """
    bias_dropout_fusion persist_layer_norm bias_activation_fusion gradient_accumulation_fusion masked_softmax_fusion
    batch_p2p_comm variable_seq_lengths use_cpu_initialization moe_token_dispatcher_type
"""

KEYS: dict[str, Entry] = {
    "cluster.component_placement.agentloop": Ignored("the agent loop runs inside the rollout group"),
    "cluster.node_groups": Rejected("is for RLinf's scheduler; use cluster.component_placement"),
    "cluster.profiling": Section("there is no profiler in here"),
    # runner
    "runner.enable_dynamic_batch_size": PACKED,
    "runner.max_tokens_per_mbs_inference": PACKED,
    "runner.logger.log_path": Ignored("metrics are written into runner.output_dir/runner.experiment_name"),
    "runner.logger.experiment_name": Ignored("runner.experiment_name counts"),
    "runner.per_worker_log": Ignored("each process writes its own log anyway"),
    # algorithm
    **_all("algorithm", "training_batch_size_per_gpu logprob_forward_micro_batch_size", PACKED),
    **_all("algorithm", "rollout_batch_size_per_gpu val_rollout_batch_size_per_gpu", BY_ROOM),
    "algorithm.use_valid_token_scale": Only(OFF, "losses are not scaled by their count of valid tokens"),
    "algorithm.entropy_op_type": Ignored("which kernel computes the entropy, not what it is"),
    "algorithm.clip_log_ratio_min": Only((None, -20, -20.0), "the log ratio is bounded by -20"),
    "algorithm.clip_log_ratio_max": Only((None, 20, 20.0), "the log ratio is bounded by 20"),
    "algorithm.max_num_gen_batches": Only(
        (None, 1), "a step takes data.rollout_batch_size questions; see algorithm.max_refills"
    ),
    "algorithm.reinpp_kl_beta": Only((None, 0, 0.0), "use algorithm.kl_beta with algorithm.kl_in: reward"),
    "algorithm.use_reinpp_baseline": Only(OFF, "use algorithm.adv_type: reinforce++_baseline"),
    "algorithm.critic_warmup_steps": Only((None, 0), "use critic.warmup_steps"),
    "algorithm.down_sampling": Only((None, False, {}), "rollouts are not thinned out"),
    "algorithm.filter_rewards": Only(OFF, "use algorithm.max_refills"),
    "algorithm.sampling_params.stop_token_ids": Only((None, []), "give strings in algorithm.sampling_params.stop"),
    # agent loop and tools
    "agentloop.print_outputs": Ignored("every trajectory is written into the run's folder"),
    "agentloop.is_dynamic_rollout_batch": Ignored("a trajectory is one sequence, which is trained as a whole"),
    **_all("agentloop", "max_user_turns max_assistant_turns max_parallel_calls", UNREAD),
    "agentloop.toolresp_encoder": Only((None, "qwen", "searchr1-qwen"), "tool texts are appended as plain text"),
    "agentloop.use_native_tool_messages": Only(OFF, "tool texts are appended as plain text"),
    **_all(
        "agentloop",
        "workflow max_planner_turns max_worker_turns max_sa_turns max_workers_per_planner max_toolcall_per_worker "
        "format_reward call_search_reward length_limit max_length_limit length_penalty over_context_penalty fixed_role",
        WIDESEEK,
    ),
    **_all(
        "agentloop", "use_llm_judge use_local_judge", Only(OFF, "use reward.reward_type: judge; see docs/guides/rewards.md")
    ),
    **_all(
        "agentloop", "llm_ip llm_port llm_type", Ignored("there is no judge here; with one, reward.judge says where it is")
    ),
    "agentloop.extra_config": Section("RLinf's Search-R1 agent does not read it"),
    "tools.mcp_file_system": Only((None,), "the tools are search and access"),
    "tools.codejudge": Section("is the tool of another agent"),
    "tools.online": Only(OFF, "start searchr1's server with an online engine; see docs/guides/retrieval.md"),
    "tools.use_access_summary": Only(OFF, "pages are shown as they are"),
    "tools.use_jina": Only(OFF, "pages come from the retrieval server"),
    **_all(
        "tools", "enable_cache cache_size cache_file", Ignored("is about online search only; the server keeps its own cache")
    ),
    # rollout
    "rollout.model_dir": Renamed("rollout.model.model_path"),
    "rollout.precision": Renamed("rollout.model.precision"),
    **_all("rollout", "model_arch model.model_type", SHAPE),
    **_all("rollout", "padding eos", Ignored("the tokenizer says it")),
    "rollout.return_logprobs": Ignored("the sampled log-probabilities are always kept"),
    "rollout.disable_log_stats": Ignored("the engine's own log is off; its numbers are metrics"),
    "rollout.print_outputs": Ignored("every trajectory is written into the run's folder"),
    "rollout.cuda_graph_max_bs": ENGINE,
    "rollout.max_running_requests_per_gpu": Ignored("rollout.max_running_requests counts, for each engine"),
    "rollout.validate_weight": Ignored("rollout.validate_weight_first_sync compares engine and actor"),
    "rollout.validate_save_dir": Ignored("rollout.validate_weight_first_sync writes no weights"),
    "rollout.enable_offload": Ignored("an engine that shares its GPUs always sleeps while the actor trains"),
    "rollout.use_fixed_worker": Only(OFF, "there is one engine group, the policy's"),
    "rollout_judge": WIDESEEK,
    **_all(
        "rollout.sglang",
        "attention_backend decode_log_interval use_torch_compile torch_compile_max_bs sampling_backend serving_mode",
        ENGINE,
    ),
    **_all("rollout.vllm", "attention_backend enable_flash_infer_sampler", ENGINE),
    "rollout.vllm.torch_profiler_dir": Only((None,), "there is no profiler in here"),
    # data
    "data.type": Only(("math",), "rows are questions with gold answers; another kind of data set needs RLinf's loader"),
    **_all("data", "num_workers process_workers process_batch_size", Ignored("reading rows takes no process of its own")),
    "data.validation_shuffle": Ignored("every question is evaluated, in whatever order"),
    "data.seq_length": Ignored("runner.seq_length counts"),
    "data.val_rollout_batch_size_per_gpu": BY_ROOM,
    **_all("data", "is_markdown is_hybrid", Only(OFF, "answers are compared as text")),
    "data.unique_columns": Only((None, []), "answers are compared as text"),
    # reward
    "reward.random_print_percent": Ignored("every trajectory is written into the run's folder"),
    "reward.reward_scale": Only(
        (None, 1, 1.0), "RLinf's Search-R1 reward is never scaled; set it on the command line to scale it"
    ),
    **_all("reward.tokenizer", "tokenizer_model use_fast trust_remote_code padding_side", TOKENIZER),
    # actor
    "actor.enable_dp_load_balance": Ignored("shares are always balanced by tokens"),
    "actor.pack_traj": Ignored("trajectories are always packed"),
    "actor.sync_precision": Ignored("weights are sent in the engine's precision, rollout.model.precision"),
    "actor.sync_bucket_capacity": Ignored("weights go through shared memory, not in buckets"),
    "actor.combine_reference_model": Ignored(
        "the reference model's group takes the actor's GPUs unless it is placed itself"
    ),
    **_all("actor", "global_batch_size micro_batch_size", Ignored("RLinf overwrites it from algorithm's and data's sizes")),
    **_all(
        "actor", "checkpoint_load_path checkpoint_save_path", Only((None,), "use runner.resume_dir and runner.output_dir")
    ),
    "actor.model.model_path": Renamed("actor.model.path"),
    "actor.model.model_type": SHAPE,
    "actor.model.encoder_seq_length": PACKED,
    "actor.model.attn_implementation": FUSED,
    "actor.model.is_lora": Only(OFF, "set actor.lora.rank; see docs/guides/lora.md"),
    **_all("actor.model", MEGATRON_SHAPE, SHAPE),
    **_all("actor.model", MEGATRON_FUSED, FUSED),
    "actor.model.attention_softmax_in_fp32": Only((None, True), "attention is computed in fp32 inside its kernel"),
    **_all(
        "actor.model",
        "virtual_pipeline_model_parallel_size pipeline_model_parallel_split_rank moe_grouped_gemm "
        "seq_len_interpolation_factor",
        Only((None,), "is not supported"),
    ),
    **_all("actor.model", "expert_model_parallel_size expert_tensor_parallel_size", Only((None, 1), "models are dense")),
    "actor.model.rotary_percentage": Only((None, 1, 1.0), "is not supported"),
    **_all("actor.tokenizer", "use_fast trust_remote_code padding_side", TOKENIZER),
    **_all(
        "actor.optim",
        "optimizer_enable_pin overlap_param_gather_with_optimizer_step optimizer_cpu_offload optimizer_offload_fraction",
        Ignored("about memory and traffic only; see actor.offload_optimizer"),
    ),
    "actor.optim.use_precision_aware_optimizer": Only(OFF, "the optimizer keeps fp32 weights"),
    **_all(
        "actor.lr_sched", "start_weight_decay end_weight_decay", Only((None,), "actor.optim.weight_decay stays as it is")
    ),
    "actor.lr_sched.weight_decay_incr_style": Only((None, "constant"), "actor.optim.weight_decay stays as it is"),
    **_all("actor.lr_sched", "lr_wsd_decay_style lr_wsd_decay_iters", Ignored("is for lr_decay_style: WSD only")),
    **_all(
        "actor.lr_sched",
        "use_checkpoint_opt_param_scheduler override_opt_param_scheduler",
        Ignored("a resumed run goes on at the rates of its YAML"),
    ),
    "actor.lr_sched.max_lr": Ignored("RLinf takes the peak from actor.optim.lr"),
    "actor.fsdp_config.cpu_offload": Renamed("actor.fsdp.cpu_offload"),
    "actor.fsdp_config.reshard_after_forward": Renamed("actor.fsdp.reshard_after_forward"),
    "actor.fsdp_config.gradient_checkpointing": Renamed("actor.model.gradient_checkpointing"),
    **_all("actor.fsdp_config", FSDP_MEMORY, MEMORY),
    "actor.fsdp_config.use_liger_kernel": LIGER,
    "actor.fsdp_config.wrap_policy": Section("each layer is a unit of its own"),
    **_all("actor.megatron", "ckpt_format use_dist_ckpt", Ignored("checkpoints are torch_dist, which any layout can load")),
    "actor.megatron.use_hf_ckpt": Ignored(
        "the weights are the Hugging Face folder's unless actor.model.megatron_checkpoint is set"
    ),
    "actor.megatron.distributed_backend": Ignored("nccl on GPUs, gloo on a CPU"),
    "actor.megatron.tp_comm_bootstrap_backend": Ignored("nccl on GPUs, gloo on a CPU"),
    "actor.megatron.tp_comm_overlap_cfg": Only((None,), "is not supported"),
    "actor.megatron.mbridge": Ignored("weights are read without it"),
    "actor.megatron.accumulate_allreduce_grads_in_fp32": Only((None, True), "gradients are summed in fp32"),
    "actor.megatron.profiler": Section("there is no profiler in here"),
    **_all(
        "actor.megatron.ckpt_convertor",
        "model model_type save_path use_gpu_num use_gpu_index process_num "
        "tensor_model_parallel_size pipeline_model_parallel_size",
        CONVERTED,
    ),
    # inference
    **_all("inference", "model_type model_arch", SHAPE),
    "inference.load_from_actor": Only(
        (None, True), "the reference model starts as the policy; inference.model_path names another"
    ),
    **_all("inference.model", "tensor_model_parallel_size pipeline_model_parallel_size sequence_parallel", REFERENCE),
    **_all("inference.fsdp_config", f"{FSDP_MEMORY} {FSDP_PRECISION} use_liger_kernel", REFERENCE),
    **_all("inference.fsdp_config", "cpu_offload reshard_after_forward gradient_checkpointing", REFERENCE),
    "inference.fsdp_config.wrap_policy": Section("the reference model is held as the actor is"),
}

READ = (
    "agentloop.maxturn", "tools.maxturn", "algorithm.importance_sampling_fix", "algorithm.importance_sampling_clip",
    "algorithm.sampling_params.use_greedy", "rollout.is_eval", "actor.enable_offload",
    "actor.tokenizer.tokenizer_model", "actor.megatron.ckpt_convertor.hf_model_path", "actor.optim.loss_scale",
    "actor.optim.min_lr", "actor.optim.lr_scheduler", "actor.optim.total_training_steps",
    "actor.optim.lr_warmup_steps", "actor.optim.lr_warmup_steps_ratio",
    *(f"actor.fsdp_config.{name}" for name in FSDP_PRECISION.split()),
)  # fmt: skip
"""Keys of RLinf that need more than a new name; `searchr1/config/rlinf.py` translates them."""

MARKS = (
    "runner.task_type", "runner.enable_dynamic_batch_size", "runner.logger.log_path",
    "algorithm.training_batch_size_per_gpu", "algorithm.rollout_batch_size_per_gpu",
    "algorithm.logprob_forward_micro_batch_size", "algorithm.val_rollout_batch_size_per_gpu",
    "agentloop.print_outputs", "agentloop.is_dynamic_rollout_batch", "data.type", "data.num_workers",
    "data.validation_shuffle", "rollout.sglang", "rollout.disable_log_stats", "rollout.padding", "rollout.eos",
    "rollout.return_logprobs", "rollout.cuda_graph_max_bs", "rollout.print_outputs", "rollout.model_dir",
    "rollout.model_arch", "reward.tokenizer", "actor.tokenizer", "actor.enable_dp_load_balance", "actor.fsdp_config",
    "actor.megatron.ckpt_convertor", "actor.model.encoder_seq_length", "inference.load_from_actor",
)  # fmt: skip
"""Keys that occur in RLinf's YAMLs and that no YAML of this project needs."""
ENOUGH_MARKS = 3
"""Number of marks from which a tree is RLinf's; one or two copied keys are not enough."""
