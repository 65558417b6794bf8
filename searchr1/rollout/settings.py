"""How the rollout engine is set up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from searchr1.config.schema_model import MAX_NUM_BATCHED_TOKENS

if TYPE_CHECKING:
    from searchr1.config.schema import Config

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

LoadFormat = Literal["auto", "dummy"]


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Settings of one vLLM engine (one rollout worker)."""

    max_model_len: int
    """Prompt and response tokens of one sequence, at most."""
    dtype: str = "float32"
    seed: int = 1234
    gpu_memory_utilization: float = 0.75
    """Share of a GPU's memory that the engine may use; a CPU goes by `kv_cache_memory_gb`."""
    kv_cache_memory_gb: float | None = None
    """Size of the KV cache; None: 1 GiB on a CPU, what is left on a GPU."""
    block_size: int | None = None
    """Tokens per KV block; None takes the device's own (32 on a CPU)."""
    enforce_eager: bool = False
    """No CUDA graphs; a CPU is always eager."""
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    """GPU only, see `Device.chunked_prefill`."""
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS
    """Tokens per engine step; raised to `max_model_len` where prompts must not be split."""
    max_num_seqs: int = 256
    """Sequences generated at once."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    executor_backend: str | None = None
    """"mp" or "ray" for more than one process; None lets vLLM choose."""
    adapter_rank: int = 0
    """Above 0 the weight updates are LoRA adapters of this rank for the model as it was loaded."""
    load_format: LoadFormat = "auto"
    """"dummy" starts with random weights (the first update brings the real ones)."""
    sleep_mode: bool = False
    """GPU only: the engine can hand its memory to other processes (`Engine.sleep`); vLLM then allocates in its own way."""
    detokenize: bool = True
    """Off: no tokenizer is loaded, generations have no text and stop strings are refused."""
    startup_timeout_s: float = 600.0
    request_timeout_s: float = 600.0
    """How long one generation may take before it is given up."""
    update_timeout_s: float = 300.0
    """How long a weight update, a cache reset or a sleep may take."""

    @classmethod
    def from_config(cls, config: Config, sleep_mode: bool = False) -> EngineSettings:
        """Take the settings that a run's YAML asks for; `sleep_mode` is for engines that others share GPUs with."""
        rollout, lora = config.rollout, config.actor.lora
        return cls(
            max_model_len=config.runner.seq_length,
            dtype=_DTYPES[rollout.model.precision],
            seed=config.runner.seed,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            kv_cache_memory_gb=rollout.vllm.kv_cache_memory_gb,
            block_size=rollout.vllm.block_size,
            enforce_eager=rollout.enforce_eager,
            enable_prefix_caching=rollout.vllm.enable_prefix_caching,
            enable_chunked_prefill=rollout.vllm.enable_chunked_prefill,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS
            if rollout.vllm.max_num_batched_tokens is None
            else rollout.vllm.max_num_batched_tokens,
            max_num_seqs=rollout.max_running_requests,
            tensor_parallel_size=rollout.tensor_parallel_size,
            pipeline_parallel_size=rollout.pipeline_parallel_size,
            executor_backend=rollout.distributed_executor_backend,
            adapter_rank=lora.rank if lora.weight_update == "adapter" else 0,
            sleep_mode=sleep_mode,
            detokenize=rollout.detokenize,
            # A request may wait for most of a step until the engine has room for it.
            request_timeout_s=config.runner.step_timeout_s,
        )

    @property
    def kv_cache_bytes(self) -> int | None:
        """`kv_cache_memory_gb` in bytes."""
        return None if self.kv_cache_memory_gb is None else int(self.kv_cache_memory_gb * (1 << 30))
