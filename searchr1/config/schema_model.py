"""The sections about models: rollout, actor, inference, critic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]
TrainingBackend = Literal["fsdp", "megatron"]
Recomputation = Literal["full", "selective"]
LrDecay = Literal["constant", "linear", "cosine"]


@dataclass
class RolloutModelConfig:
    """The model to train or evaluate."""

    model_path: str = ""
    """A Hugging Face folder or hub name."""
    precision: Precision = "bf16"
    """`fp32`, `bf16` or `fp16`: what the engine computes in."""


MAX_NUM_BATCHED_TOKENS = 8192
"""Tokens of an engine's step if `rollout.vllm.max_num_batched_tokens` is null. vLLM's own choice for an engine that runs
in the worker's process is 2048: a search result that joins 256 running sequences would be read in many small pieces."""


@dataclass
class VllmConfig:
    """vLLM's own settings."""

    enable_chunked_prefill: bool = True
    """Prefill long prompts in parts (GPU only)."""
    enable_prefix_caching: bool = True
    """Keep the prompt's cache between turns and between rollouts of one question."""
    max_num_batched_tokens: int | None = None
    """Tokens per engine step; null: 8192."""
    kv_cache_memory_gb: float | None = None
    """Size of the cache; null: 1 GiB on a CPU, what `gpu_memory_utilization` leaves on a GPU."""
    block_size: int | None = None
    """Tokens per cache block; null is the device's own."""


@dataclass
class RolloutConfig:
    """The rollout group."""

    group_name: str = "RolloutGroup"
    """Name of the worker group."""
    gpu_memory_utilization: float = 0.75
    """Share of a GPU's memory for the engine."""
    model: RolloutModelConfig = field(default_factory=RolloutModelConfig)
    """See `RolloutModelConfig`."""
    enforce_eager: bool = False
    """No CUDA graphs."""
    distributed_executor_backend: Literal["mp", "ray"] = "mp"
    """`mp` or `ray`, for engines of more than one GPU."""
    detokenize: bool = True
    """Needed by stop strings."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """See `VllmConfig`."""
    tensor_parallel_size: int = 1
    """GPUs that share one layer."""
    pipeline_parallel_size: int = 1
    """GPUs that share the layers."""
    max_running_requests: int = 256
    """Sequences generated at once per engine."""
    validate_weight_first_sync: bool = False
    """Compare log-probabilities of engine and actor on a probe after the first weight update."""


@dataclass
class ActorModelConfig:
    """How the policy is held for training."""

    precision: Precision = "fp32"
    """`fp32`, `bf16` or `fp16`: what the actor computes in; the optimizer keeps fp32 weights."""
    path: str | None = None
    """Model folder; null is `rollout.model.model_path`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer (Megatron)."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers between them (Megatron)."""
    sequence_parallel: bool = False
    """With tensor parallelism, share the layer norms' activations as well (Megatron)."""
    recompute_granularity: Recomputation | None = None
    """Recompute activations in the backward pass: `full` layers, `selective` (attention only), or null (Megatron)."""
    recompute_method: Literal["uniform", "block"] | None = "uniform"
    """`full` recompute: `uniform` keeps every so many layers' inputs, `block` recomputes the first so many layers."""
    recompute_num_layers: int | None = 1
    """`full` recompute: how many, see `recompute_method`."""
    megatron_checkpoint: str | None = None
    """Folder of a Megatron distributed checkpoint (`torch_dist`) to take the weights from, instead of `path`'s."""


@dataclass
class OptimConfig:
    """AdamW."""

    lr: float = 1e-6
    """Peak learning rate."""
    adam_beta1: float = 0.9
    """Decay rate of the first moment."""
    adam_beta2: float = 0.95
    """Decay rate of the second moment."""
    adam_eps: float = 1e-5
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled; not on norms and biases."""
    clip_grad: float = 1.0
    """Largest norm of the gradient."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer's state over the data-parallel copies (Megatron)."""
    overlap_grad_reduce: bool = False
    """Sum gradients over the data-parallel copies while the backward pass still runs (Megatron, GPU)."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass runs (Megatron, GPU)."""
    initial_loss_scale: float = 65536.0
    """fp16: where the dynamic loss scale starts (Megatron)."""
    min_loss_scale: float = 1.0
    """fp16: where it ends."""
    loss_scale_window: int = 1000
    """fp16: updates without overflow before it is doubled."""
    hysteresis: int = 2
    """fp16: overflows before it is halved."""


@dataclass
class LrSchedConfig:
    """Learning rate over optimizer steps."""

    lr_warmup_fraction: float = 0.0
    """Share of `lr_decay_iters` that warms up, unless `lr_warmup_iters` is set."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    lr_warmup_init: float = 0.0
    """Rate at the start of the warm-up."""
    min_lr: float = 0.0
    """Rate at the end of the decay."""
    lr_decay_style: LrDecay = "constant"
    """`constant`, `linear` or `cosine`."""
    lr_decay_iters: int | None = None
    """Steps of warm-up and decay together; null is the whole run."""


@dataclass
class LoraConfig:
    """LoRA (fsdp): train small matrices beside frozen weights; see docs/guides/lora.md."""

    rank: int = 0
    """Rank of the update of each matrix; 0 trains all weights instead."""
    alpha: float = 32.0
    """The update is scaled by `alpha / rank`."""
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Names of the linear layers that get adapters."""
    base_precision: Literal["fp32", "compute"] = "fp32"
    """Precision of the frozen weights: `fp32`, or `compute` for that of `actor.model.precision`."""
    weight_update: Literal["merged", "adapter"] = "merged"
    """What the rollout engine gets: `merged` weights, or the `adapter` alone, beside the base model that it keeps."""


@dataclass
class FsdpConfig:
    """FSDP2."""

    reshard_after_forward: bool = True
    """Free gathered weights between forward and backward: less memory, more traffic."""
    cpu_offload: bool = False
    """Keep weights and optimizer state in host memory."""
    liger: bool | None = None
    """Liger's kernels for norms, rotations and SwiGLU; null takes them on a GPU where `liger_kernel` is installed."""
    compile: bool = False
    """Compile the decoder layers with torch.compile, on a GPU; the first steps take minutes longer."""


@dataclass
class MegatronConfig:
    """Megatron-Core."""

    ddp_bucket_size: int | None = None
    """Parameters whose gradients are summed over the data-parallel copies in one message; null is
    Megatron's choice."""
    distributed_timeout_minutes: float = 30.0
    """A collective that takes longer ends the run (either backend)."""


@dataclass
class ActorConfig:
    """The actor group."""

    group_name: str = "ActorGroup"
    """Name of the worker group."""
    training_backend: TrainingBackend = "fsdp"
    """`fsdp` (FSDP2: any causal language model) or `megatron` (Megatron-Core: Qwen2/2.5, Qwen3, Llama 3.x)."""
    calculate_flops: bool = False
    """Report `actor/tflops_per_rank`: the model's arithmetic, without recomputation, per second of training."""
    offload_optimizer: bool = False
    """Between training phases, keep the optimizer's state in host memory (GPU)."""
    offload_weight: bool = False
    """Between training phases, keep the actor's weights in host memory (GPU)."""
    offload_grad: bool = False
    """Between training phases, free the gradients' buffers (GPU)."""
    seed: int = 1234
    """Seed of the training processes."""
    model: ActorModelConfig = field(default_factory=ActorModelConfig)
    """See `ActorModelConfig`."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """See `OptimConfig`."""
    lr_sched: LrSchedConfig = field(default_factory=LrSchedConfig)
    """See `LrSchedConfig`."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """See `LoraConfig`."""
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    """See `FsdpConfig`."""
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    """See `MegatronConfig`."""


@dataclass
class InferenceConfig:
    """The reference model's group."""

    group_name: str = "InferenceGroup"
    """Name of the worker group."""
    model_path: str | None = None
    """The reference model; null is `rollout.model.model_path`."""


@dataclass
class CriticModelConfig:
    """How a critic on Megatron is cut; null is as the actor's, or not at all if that is on FSDP2."""

    tensor_model_parallel_size: int | None = None
    """Ranks that share each layer."""
    pipeline_model_parallel_size: int | None = None
    """Ranks that share the layers between them."""
    sequence_parallel: bool | None = None
    """With tensor parallelism, share the layer norms' activations as well."""


@dataclass
class CriticConfig:
    """PPO's value model (docs/algorithms/ppo.md); GPUs, precision, micro-batches and offloading are the actor's."""

    use_critic_model: bool = False
    """True for `algorithm.adv_type: gae`, else False."""
    group_name: str = "CriticGroup"
    """Name of the worker group."""
    training_backend: TrainingBackend | None = None
    """`fsdp` or `megatron`; null is the actor's."""
    model_path: str | None = None
    """The decoder to start from; null is the policy's."""
    model: CriticModelConfig = field(default_factory=CriticModelConfig)
    """See `CriticModelConfig`."""
    gradient_checkpointing: bool | None = None
    """Recompute whole layers in the backward pass to save memory; null does as the actor does."""
    cliprange_value: float = 0.5
    """A value further than this from the step's first one gets no gradient for moving on."""
    warmup_steps: int = 0
    """Steps at the start that train the critic only."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    """See `OptimConfig`."""
    lr_sched: LrSchedConfig = field(default_factory=LrSchedConfig)
    """See `LrSchedConfig`."""
