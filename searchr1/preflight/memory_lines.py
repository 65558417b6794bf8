"""What each model of a run needs of one GPU, line by line. No torch; all sizes in bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil, prod

from searchr1.checkpoints.model_shape import (
    ModelShape,
    shard_adapters,
    shard_parameters,
    stage_parameters,
)
from searchr1.preflight.memory_layout import Layout

GIB = 1 << 30
PHASES = ("start", "rollout", "train", "save", "sync", "wake")
"""In the order of time; what happens in each is in docs/guides/layouts.md."""
CONTEXT_BYTES = GIB
"""Assumed for each process on a GPU: CUDA context, NCCL's and cuBLAS's buffers."""
SLEEPING_BYTES = GIB // 2
"""Assumed of a sleeping engine beside its context: CUDA graphs."""
ENGINE_WORK = 2 * GIB
"""Assumed of an engine beside weights and cache: activations of a batch, logits, CUDA graphs."""
BUCKET_BYTES = 512 << 20
"""Of each of the two buffers that weights travel in (rollout/weights.py)."""


@dataclass(frozen=True, slots=True)
class Line:
    """Bytes of one thing on one GPU."""

    name: str
    size: int
    formula: str
    phases: tuple[str, ...] = PHASES


def in_phase(lines: Iterable[Line], phase: str) -> int:
    """Return bytes of all lines together in a phase."""
    return sum(line.size for line in lines if phase in line.phases)


def _where(resident: bool, *needed: str) -> tuple[str, ...]:
    """Return every phase, or, of what leaves the GPU when nobody needs it, those that need it."""
    return PHASES if resident else tuple(phase for phase in PHASES if phase in needed)


def layer_activation(model: ModelShape, layout: Layout) -> float:
    """Return bytes a token that one layer keeps for its backward pass, without recomputation.

    After Korthikanti et al. (arXiv 2205.05198), for GQA, SwiGLU, no dropout and attention that keeps no scores:
    what both norms keep, and the inputs of the linear layers behind them; queries, keys and values; attention's output
    (which is the output projection's input) and its log-sum-exp; gate, up, SiLU of gate, and their product.
    transformers' norms keep an fp32 copy and the normalised input; Megatron's keep the input. Megatron's fused SwiGLU
    does not keep the SiLU, but its values are a view that keeps queries and keys from before the rotation alive, and each
    layer has cosines and sines of its own.
    """
    c, h, q, k = layout.compute_bytes, model.hidden_size, model.query_size, model.key_size
    fsdp = layout.backend == "fsdp"
    norm = 4 + c if fsdp else c
    hidden = 2 * (norm + c) * h + 2 * 4
    inner = c * (2 * q + 2 * k) if fsdp else c * (3 * q + 3 * k)
    inner += c * model.intermediate_size * (4 if fsdp else 3)
    if model.qk_norm:
        inner += (norm if fsdp else 0) * (q + k) + 4 * (model.num_attention_heads + model.num_key_value_heads)
    if layout.recompute != "selective":
        inner += 4 * model.num_attention_heads
    rotation = 0 if fsdp else 4 * c * model.head_dim
    return hidden / (layout.tp if layout.sequence_parallel else 1) + inner / layout.tp + rotation


def kept_activations(model: ModelShape, layout: Layout, stage: int = 0) -> tuple[int, int]:
    """Return bytes kept from forward to backward by one rank's layers, and bytes that recomputing makes again at a time.

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


def state_lines(model: ModelShape, layout: Layout, stage: int) -> list[Line]:
    """Return weights, optimizer state and gradients of the actor, or of a critic, which sends its weights to nobody.

    At the start everything is there at once, the moments too if the run goes on from a checkpoint; then what
    `actor.offload_…` names leaves the GPU.
    """
    c, training = layout.compute_bytes, ("train",)
    sent = ("sync",) if layout.section == "actor" else ()
    weights = _where(not layout.offload_weight, "start", "train", "save", *sent)
    optimizer_state = _where(not layout.offload_optimizer, "start", "train", "save")
    if layout.backend == "fsdp":
        shard, root, layer = shard_parameters(model, layout.gpus), sum(map(prod, model.root_tensors)), model.layer_parameters
        held = 0 if layout.cpu_offload else shard
        where = "in host memory (actor.fsdp.cpu_offload)" if layout.cpu_offload else f"of {layout.gpus} ranks"
        gathered = 3 * layer if layout.reshard else model.num_hidden_layers * layer
        trained, layer_grads, root_grads, of = shard, layer, root, "parameters"
        if layout.lora_rank:
            trained = shard_adapters(model, layout.lora_rank, layout.lora_targets, layout.gpus)
            layer_grads, root_grads = sum(map(prod, model.adapters(layout.lora_rank, layout.lora_targets))), 0
            of = f"of adapters of rank {layout.lora_rank}"
        which = (
            "a layer, its gather buffer and the next one's"
            if layout.reshard
            else "all layers (reshard_after_forward: False)"
        )
        return [
            _fsdp_weights(held, trained, shard, layout, where, weights),
            Line("Adam moments", 0 if layout.cpu_offload else 8 * trained, f"8 B x {trained:,} {of}", optimizer_state),
            Line(
                "gradients (fp32)",
                0 if layout.cpu_offload else 4 * trained,
                f"4 B x {trained:,} {of}, freed after the optimizer's step",
                training,
            ),
            Line("gathered weights", c * (gathered + root), f"{c} B x ({which}, and embedding and output layer)", training),
            Line(
                "gradients before sharding",
                (c + 4) * layer_grads + c * root_grads,
                f"a layer's in {c} B and its fp32 copy for the reduction"
                + (f"; embedding and output layer in {c} B" if root_grads else ", of its adapters"),
                training,
            ),
        ]
    own = stage_parameters(model, layout.tp, layout.pp, stage)
    optimizer = ceil(own / layout.dp) if layout.distributed_optimizer else own
    share = f", 1 share of {layout.dp} (distributed optimizer)" if layout.distributed_optimizer else ""
    master = 0 if c == 4 else 4 * optimizer
    return [
        Line("weights", c * own, f"{c} B x {own:,} parameters (TP {layout.tp}, stage {stage + 1} of {layout.pp})", weights),
        Line("fp32 master weights", master, f"4 B x {own:,}{share}" if master else "the weights are fp32", optimizer_state),
        Line("Adam moments", 8 * optimizer, f"8 B x {own:,}{share}", optimizer_state),
        Line("gradients (fp32 buffer)", 4 * own, f"4 B x {own:,}", _where(not layout.offload_grad, "start", "train")),
    ]


def _fsdp_weights(held: int, trained: int, shard: int, layout: Layout, where: str, resident: tuple[str, ...]) -> Line:
    if not layout.lora_rank:
        return Line(
            "weights (fp32, also the master copy)", 4 * held, f"4 B x {shard:,} parameters, 1 share {where}", resident
        )
    adapters = 0 if layout.cpu_offload else trained
    text = f"frozen, {layout.base_bytes} B x {shard:,} parameters, 1 share {where}; adapters 4 B x {trained:,}"
    return Line("weights", layout.base_bytes * held + 4 * adapters, text, resident)


def train_lines(model: ModelShape, layout: Layout, stage: int) -> list[Line]:
    """Return what one micro-batch needs."""
    c, tokens, last = layout.compute_bytes, layout.max_tokens, stage == layout.pp - 1
    kept, again = kept_activations(model, layout, stage)
    vocab, policy = model.vocab_size, ceil(tokens * layout.policy_share)
    if layout.backend == "megatron":
        vocab = model.padded_vocab // layout.tp
    logits = 2 * c * policy * vocab + layout.loss_bytes if last and not model.value_head else 0
    norm = 4 + c if layout.backend == "fsdp" else c
    end = (tokens * norm + policy * c) * model.hidden_size if last else 0
    flight = f" x {layout.pp - stage} micro-batches in flight" if layout.pp - stage > 1 else ""
    if layout.recompute == "full":
        what = f"layer inputs only (full recomputation) of {tokens:,} tokens"
    else:
        what = f"{layer_activation(model, layout):,.0f} B x {tokens:,} tokens a layer"
    at_once = ", not at the same time as the logits" if last else ""
    return [
        Line("activations", kept + end, f"{what} x {model.num_hidden_layers // layout.pp} layers{flight}", ("train",)),
        Line(
            "logits",
            logits,
            f"{c} B x {policy:,} policy tokens x {vocab:,} words, and their gradient; "
            f"{layout.loss_bytes >> 20} MiB for the loss",
            ("train",),
        ),
        Line(
            "recomputed activations",
            max(0, again - logits),
            f"{again / GIB:.2f} GiB{at_once}; the larger counts" if again else "nothing is recomputed",
            ("train",),
        ),
    ]


def forward_bytes(model: ModelShape, layout: Layout, tokens: int, policy: int) -> int:
    """Return what a forward pass without gradients needs for a moment: one layer's tensors at a time, then the logits."""
    c, root = layout.compute_bytes, sum(map(prod, model.root_tensors))
    vocab = model.vocab_size if layout.backend == "fsdp" else model.padded_vocab // layout.tp
    gathered = c * (3 * model.layer_parameters + root) if layout.backend == "fsdp" else 0
    return gathered + max(round(layer_activation(model, layout) * tokens), c * policy * vocab + layout.loss_bytes)


def reference_lines(model: ModelShape, layout: Layout) -> list[Line]:
    """Return the frozen model, always on FSDP2: it scores finished rollouts while the engine generates others."""
    scoring = replace(layout, backend="fsdp", tp=1, sequence_parallel=False)
    shard, tokens = shard_parameters(model, layout.reference_gpus), layout.max_tokens
    policy = ceil(tokens * layout.policy_share)
    what = f"a layer's tensors or the logits of {tokens:,} tokens"
    text = f"{layout.compute_bytes} B x (3 layers, embedding and output layer); {what}"
    return [
        Line("reference model", 4 * shard, f"fp32, 4 B x {shard:,} parameters, 1 share of {layout.reference_gpus}"),
        Line("reference model's forward", forward_bytes(model, scoring, tokens, policy), text, ("rollout",)),
    ]


def engine_lines(model: ModelShape, layout: Layout, gpu_bytes: int) -> list[Line]:
    """Return an engine that takes turns with the models that train on its GPUs."""
    weights = round(layout.engine_bytes * model.parameters / layout.engine_tp)
    share = f"gpu_memory_utilization {layout.engine_share:g} x {gpu_bytes / GIB:g} GiB"
    if layout.engine_cache is not None:
        share = f"weights, {ENGINE_WORK / GIB:g} GiB to work in, and rollout.vllm.kv_cache_memory_gb"
    room, token = engine_room(model, layout, gpu_bytes), cache_token_bytes(model, layout)
    cache = max(0, room - weights - ENGINE_WORK)
    text = f"{share}, of which weights {weights / GIB:.1f} and cache about {cache / GIB:.1f} GiB ({cache // token:,} tokens)"
    asleep = ("start", "train", "save", "sync")
    kept = 0 if layout.engine_eager else SLEEPING_BYTES
    largest = layout.engine_bytes * model.embedding
    incoming = largest + largest // layout.engine_tp
    if layout.adapter_updates:
        incoming = layout.engine_bytes * shard_adapters(model, layout.lora_rank, layout.lora_targets, 1)
    return [
        Line("rollout engine", room, text, ("rollout", "wake")),
        Line("engine's weights", weights, f"{layout.engine_bytes} B x {model.parameters:,} / {layout.engine_tp}", ("sync",)),
        Line("engine's new weights", incoming, "the largest tensor on its way: whole, and the engine's share", ("sync",)),
        Line("sleeping engine", kept, "CUDA graphs stay; assumed: 0.5 GiB" if kept else "no CUDA graphs", asleep),
    ]


def engine_room(model: ModelShape, layout: Layout, gpu_bytes: int) -> int:
    """Return what vLLM takes of a GPU beside its context."""
    if layout.engine_cache is None:
        return round(layout.engine_share * gpu_bytes)
    return round(layout.engine_bytes * model.parameters / layout.engine_tp) + ENGINE_WORK + layout.engine_cache


def cache_token_bytes(model: ModelShape, layout: Layout) -> int:
    """Count the bytes of keys and values of one token on one of an engine's GPUs, which has one head at least."""
    width = max(model.head_dim, model.key_size // layout.engine_tp)
    return 2 * layout.engine_bytes * model.num_hidden_layers * width


def bucket_bytes(model: ModelShape, layout: Layout) -> int:
    """Return the bytes of one buffer that weights travel in."""
    return min(BUCKET_BYTES, layout.engine_bytes * model.parameters)


def update_lines(model: ModelShape, layout: Layout) -> list[Line]:
    """Return what the actor gathers to send its weights, and its side of the probe of the first update."""
    # FSDP casts its shards and gathers them; Megatron gathers the parts of a layer, then joins them.
    fsdp, bucket = layout.backend == "fsdp", bucket_bytes(model, layout)
    full = layout.engine_bytes if fsdp else layout.compute_bytes * (2 if layout.tp > 1 else 1)
    size = full * model.embedding + bucket
    text = f"the embedding whole, {full} B x {model.embedding:,}, and a bucket that is being copied"
    if layout.adapter_updates:
        full = 4 + layout.engine_bytes if fsdp else full
        whole = shard_adapters(model, layout.lora_rank, layout.lora_targets, 1)
        size, text = full * whole, f"all adapters whole, {full} B x {whole:,}"
    if layout.cpu_offload:
        size, text = 0, "gathered in host memory (actor.fsdp.cpu_offload)"
    lines = [Line("weight update", size, text, ("sync",))]
    if layout.probe_tokens:
        tokens = min(layout.probe_tokens, layout.max_tokens)
        text = f"rollout.validate_weight_first_sync: {tokens:,} tokens, once, while the engine sleeps"
        lines.append(Line("probe", forward_bytes(model, layout, tokens, tokens), text, ("start",)))
    return lines
