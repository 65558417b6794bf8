"""GPU memory of a run by arithmetic: what each rank holds, line by line. No torch, no GPU; all sizes in bytes.

Three phases are told apart: `rollout` (the engine generates), `update` (new weights go to the engine), `train` (forward,
backward, optimizer). The worst pipeline stage is shown. What the formulas leave out is in docs/layouts.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, prod

from searchr1.errors import UserError

GIB = 1 << 30
PHASES = ("rollout", "update", "train")
VOCAB_MULTIPLE = 128
"""Megatron's embedding is padded to a multiple of this."""
BUCKET_BYTES = 256 << 20
"""Weights travel to the engine in parts of this size."""
CONTEXT_BYTES = GIB
"""Assumed for each process on a GPU: CUDA context, NCCL's and cuBLAS's buffers."""
FRAGMENTATION = 0.05
"""Assumed share of the training phase that the allocator cannot use."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense decoder with grouped-query attention, SwiGLU and RMSNorm; names are those of config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tied: bool
    head_dim: int = 128
    qkv_bias: bool = False
    """Qwen2 and Qwen2.5."""
    qk_norm: bool = False
    """Qwen3: queries and keys are normalised, each head on its own."""

    @property
    def query_size(self) -> int:
        """Width of all queries of a token."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Width of all keys (or values) of a token."""
        return self.num_key_value_heads * self.head_dim

    @property
    def layer_tensors(self) -> list[tuple[tuple[int, ...], bool]]:
        """One layer's parameters: shape, and whether tensor parallelism cuts it."""
        h, f, q, k = self.hidden_size, self.intermediate_size, self.query_size, self.key_size
        biases = [((q,), True), ((k,), True), ((k,), True)] if self.qkv_bias else []
        norms = [((self.head_dim,), False)] * 2 if self.qk_norm else []
        linear = [((q, h), True), ((k, h), True), ((k, h), True), ((h, q), True), *[((f, h), True)] * 2, ((h, f), True)]
        return [*linear, *biases, *norms, ((h,), False), ((h,), False)]

    @property
    def embedding(self) -> int:
        """Parameters of the embedding; as many again in an output layer that is not tied."""
        return self.vocab_size * self.hidden_size

    @property
    def root_tensors(self) -> list[tuple[int, ...]]:
        """Parameters outside the layers: embedding, final norm, output layer."""
        return [(self.vocab_size, self.hidden_size)] * (1 if self.tied else 2) + [(self.hidden_size,)]

    @property
    def layer_parameters(self) -> int:
        """Of one layer."""
        return sum(prod(shape) for shape, _ in self.layer_tensors)

    @property
    def parameters(self) -> int:
        """Of the whole model, as transformers counts them."""
        return self.num_hidden_layers * self.layer_parameters + sum(prod(shape) for shape in self.root_tensors)


def _qwen25(h: int, f: int, layers: int, heads: int, kv: int, vocab: int, tied: bool, head_dim: int = 128) -> ModelShape:
    return ModelShape(h, f, layers, heads, kv, vocab, tied, head_dim, qkv_bias=True)


SHAPES = {
    "qwen2.5-0.5b": _qwen25(896, 4864, 24, 14, 2, 151936, True, 64),
    "qwen2.5-1.5b": _qwen25(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-3b": _qwen25(2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-7b": _qwen25(3584, 18944, 28, 28, 4, 152064, False),
    "qwen2.5-14b": _qwen25(5120, 13824, 48, 40, 8, 152064, False),
    "qwen2.5-32b": _qwen25(5120, 27648, 64, 40, 8, 152064, False),
    "qwen2.5-72b": _qwen25(8192, 29568, 80, 64, 8, 152064, False),
    "qwen3-0.6b": ModelShape(1024, 3072, 28, 16, 8, 151936, True, qk_norm=True),
    "qwen3-8b": ModelShape(4096, 12288, 36, 32, 8, 151936, False, qk_norm=True),
    "llama-3.2-3b": ModelShape(3072, 8192, 28, 24, 8, 128256, True),
}
"""Known models, by the name that `--shape` takes."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a run spreads a model over GPUs."""

    backend: str = "fsdp"
    gpus: int = 8
    """Ranks of the actor."""
    tp: int = 1
    pp: int = 1
    compute_bytes: int = 2
    """Of a number in the precision that the actor computes in."""
    distributed_optimizer: bool = True
    sequence_parallel: bool = False
    recompute: str = "none"
    """`none`, `selective` or `full`."""
    recompute_method: str = "uniform"
    recompute_layers: int = 1
    offload_weight: bool = False
    """In host memory while the engine generates; `offload_grad` and `offload_optimizer` likewise."""
    offload_grad: bool = False
    offload_optimizer: bool = False
    reshard: bool = True
    """FSDP: free a layer's gathered weights between forward and backward."""
    cpu_offload: bool = False
    """FSDP: shards and optimizer state always in host memory."""
    max_tokens: int = 11008
    """Of a micro-batch."""
    policy_share: float = 1.0
    """Of these tokens, at most so many reach the output layer."""
    reference: bool = True
    """A frozen model, sharded with FSDP2 over `reference_gpus` that are also the actor's."""
    reference_gpus: int = 8
    shared: bool = True
    """Actor and rollout share GPUs: the engine sleeps while the actor trains."""
    engine_share: float = 0.75
    engine_tp: int = 1
    """GPUs of one engine."""
    engine_bytes: int = 2
    """Of a number in the engine's precision."""

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.gpus // (self.tp * self.pp)

    def check(self, model: ModelShape) -> None:
        """Refuse a layout that the model or the GPUs cannot be cut into.

        Raises:
            UserError: names the key and the numbers.
        """
        tp_key, pp_key = "actor.model.tensor_model_parallel_size", "actor.model.pipeline_model_parallel_size"
        if min(self.tp, self.pp, self.max_tokens) < 1:
            raise UserError(f"{tp_key}, {pp_key} and runner.max_tokens_per_mbs: must be 1 or more")
        if self.gpus % (self.tp * self.pp):
            raise UserError(
                f"{tp_key} x {pp_key} = {self.tp} x {self.pp} does not divide the actor's {self.gpus} GPUs "
                "(cluster.component_placement, cluster.slots)"
            )
        for name, size in (
            ("num_attention_heads", model.num_attention_heads),
            ("num_key_value_heads", model.num_key_value_heads),
            ("intermediate_size", model.intermediate_size),
            ("the padded vocabulary", padded_vocab(model)),
        ):
            if size % self.tp:
                raise UserError(f"{tp_key}: {self.tp} does not divide {name} = {size} of the model")
        if model.num_hidden_layers % self.pp:
            raise UserError(
                f"{pp_key}: {self.pp} does not divide num_hidden_layers = {model.num_hidden_layers} of the model"
            )


@dataclass(frozen=True, slots=True)
class Line:
    """Bytes of one thing on one GPU."""

    name: str
    size: int
    formula: str
    phases: tuple[str, ...] = PHASES


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What the fullest GPU holds."""

    stage: int
    """Pipeline stage, from 0."""
    parameters: int
    """On this rank before sharding over data-parallel ranks."""
    lines: tuple[Line, ...]
    problem: str = ""
    """Why the engine cannot start, if so."""

    def total(self, phase: str) -> int:
        """Bytes in a phase."""
        return sum(line.size for line in self.lines if phase in line.phases)

    @property
    def peak(self) -> int:
        """Bytes in the worst phase."""
        return max(self.total(phase) for phase in PHASES)

    def fits(self, gpu_bytes: int) -> bool:
        """Whether every phase fits."""
        return not self.problem and self.peak <= gpu_bytes


def padded_vocab(model: ModelShape) -> int:
    """Rows of Megatron's embedding."""
    return ceil(model.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def stage_parameters(model: ModelShape, tp: int, pp: int, stage: int) -> int:
    """Parameters of one Megatron rank. A tied output layer is held by the first and the last stage."""
    layer = sum(prod(shape) // (tp if cut else 1) for shape, cut in model.layer_tensors)
    count = model.num_hidden_layers // pp * layer
    first, last = stage == 0, stage == pp - 1
    embeddings = first + last - (first and last and model.tied)
    return count + embeddings * (padded_vocab(model) // tp) * model.hidden_size + last * model.hidden_size


def shard_parameters(model: ModelShape, ranks: int) -> int:
    """Parameters of one FSDP2 rank: each tensor is cut by rows, rounded up (the first rank has the most)."""

    def shard(shape: tuple[int, ...]) -> int:
        return ceil(shape[0] / ranks) * prod(shape[1:])

    layer = sum(shard(shape) for shape, _ in model.layer_tensors)
    return model.num_hidden_layers * layer + sum(map(shard, model.root_tensors))


def layer_activation(model: ModelShape, layout: Layout) -> float:
    """Bytes a token that one layer keeps for its backward pass, without recomputation.

    After Korthikanti et al. (arXiv 2205.05198), for GQA, SwiGLU, no dropout and attention that keeps no scores:
    the inputs of both norms and of the linear layers behind them; queries, keys, values; attention's output (which is
    the output projection's input) and its log-sum-exp; gate, up, SiLU of gate, and their product. transformers' norms
    keep an fp32 copy and the normalised input; fused ones keep the input.
    """
    c, h = layout.compute_bytes, model.hidden_size
    norm = 4 + c if layout.backend == "fsdp" else c
    hidden = 2 * (norm + c) * h + (2 * 4)
    attention = c * (2 * model.query_size + 2 * model.key_size)
    if model.qk_norm:
        attention += norm * (model.query_size + model.key_size)
    log_sum_exp = 0 if layout.recompute == "selective" else 4 * model.num_attention_heads
    inner = attention + log_sum_exp + 4 * c * model.intermediate_size
    return hidden / (layout.tp if layout.sequence_parallel else 1) + inner / layout.tp


def kept_activations(model: ModelShape, layout: Layout, stage: int = 0) -> tuple[int, int]:
    """Bytes kept from forward to backward by one rank's layers, and bytes that recomputing makes again at a time.

    Stage s of a pipeline holds `pp - s` micro-batches at once.
    """
    layers, in_flight = model.num_hidden_layers // layout.pp, layout.pp - stage
    one = layer_activation(model, layout)
    given = layout.compute_bytes * model.hidden_size / (layout.tp if layout.sequence_parallel else 1)
    if layout.recompute != "full":
        return round(in_flight * layers * one * layout.max_tokens), 0
    if layout.backend == "megatron" and layout.recompute_method == "block":
        again = min(layout.recompute_layers, layers)
        kept, made = again * given + (layers - again) * one, one if again else 0.0
    else:
        group = min(layout.recompute_layers, layers) if layout.backend == "megatron" else 1
        kept, made = ceil(layers / group) * given, group * one
    return round(in_flight * kept * layout.max_tokens), round(made * layout.max_tokens)
