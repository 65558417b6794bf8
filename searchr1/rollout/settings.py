"""How the rollout engine is set up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    max_num_batched_tokens: int | None = None
    """Tokens per engine step; None: vLLM's choice on a GPU, 8192 on a CPU; raised to `max_model_len` where prompts must
    not be split."""
    max_num_seqs: int = 128
    """Sequences generated at once."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    executor_backend: str | None = None
    """"mp" or "ray" for more than one process; None lets vLLM choose."""
    load_format: LoadFormat = "auto"
    """"dummy" starts with random weights (the first update brings the real ones)."""
    detokenize: bool = True
    """Off: no tokenizer is loaded, generations have no text and stop strings are refused."""
    startup_timeout_s: float = 600.0
    request_timeout_s: float = 600.0
    """How long one generation may take before it is given up."""
    update_timeout_s: float = 300.0
    """How long a weight update, a cache reset or a sleep may take."""

    @property
    def kv_cache_bytes(self) -> int | None:
        """`kv_cache_memory_gb` in bytes."""
        return None if self.kv_cache_memory_gb is None else int(self.kv_cache_memory_gb * (1 << 30))
