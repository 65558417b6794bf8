"""GPU memory of a run by arithmetic: what each rank holds, line by line. No torch, no GPU; all sizes in bytes.

Three phases are told apart: `rollout` (the engine generates), `update` (new weights go to the engine), `train` (forward,
backward, optimizer). The worst pipeline stage is shown. What the formulas leave out is in docs/layouts.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, prod

from searchr1.config.memory_layout import Layout
from searchr1.config.memory_shapes import (
    SHAPES,
    ModelShape,
    padded_vocab,
    shard_adapters,
    shard_parameters,
    stage_parameters,
)
from searchr1.errors import UserError

__all__ = ["SHAPES", "Layout", "Line", "MemoryPlan", "kept_activations", "knobs", "layer_activation", "plan_memory"]

GIB = 1 << 30
PHASES = ("rollout", "update", "train")
LOSS_BYTES = 64 << 20
"""The loss works on the logits in fp32, 16 MiB at a time, four copies of it at most (algorithms/entropy.py)."""
CONTEXT_BYTES = GIB
"""Assumed for each process on a GPU: CUDA context, NCCL's and cuBLAS's buffers."""
FRAGMENTATION = 0.05
"""Assumed share of the training phase that the allocator cannot use."""


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


def layer_activation(model: ModelShape, layout: Layout) -> float:
    """Bytes a token that one layer keeps for its backward pass, without recomputation.

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


def _actor_lines(model: ModelShape, layout: Layout, stage: int) -> list[Line]:
    """Weights, optimizer state and gradients of the actor."""
    c, always, training = layout.compute_bytes, PHASES, PHASES[2:]
    if layout.backend == "fsdp":
        shard, root, layer = shard_parameters(model, layout.gpus), sum(map(prod, model.root_tensors)), model.layer_parameters
        held = 0 if layout.cpu_offload else shard
        where = "in host memory (actor.fsdp.cpu_offload)" if layout.cpu_offload else f"of {layout.gpus} ranks"
        resident = PHASES[1:] if layout.offload_weight else always
        state = training if layout.offload_optimizer else always
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
            _fsdp_weights(held, trained, shard, layout, where, resident),
            Line("Adam moments", 0 if layout.cpu_offload else 8 * trained, f"8 B x {trained:,} {of}", state),
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
    resident = PHASES[1:] if layout.offload_weight else always
    state = training if layout.offload_optimizer else always
    return [
        Line("weights", c * own, f"{c} B x {own:,} parameters (TP {layout.tp}, stage {stage + 1} of {layout.pp})", resident),
        Line("fp32 master weights", master, f"4 B x {own:,}{share}" if master else "the weights are fp32", state),
        Line("Adam moments", 8 * optimizer, f"8 B x {own:,}{share}", state),
        Line("gradients (fp32 buffer)", 4 * own, f"4 B x {own:,}", training if layout.offload_grad else always),
    ]


def _fsdp_weights(held: int, trained: int, shard: int, layout: Layout, where: str, resident: tuple[str, ...]) -> Line:
    if not layout.lora_rank:
        return Line(
            "weights (fp32, also the master copy)", 4 * held, f"4 B x {shard:,} parameters, 1 share {where}", resident
        )
    adapters = 0 if layout.cpu_offload else trained
    text = f"frozen, {layout.base_bytes} B x {shard:,} parameters, 1 share {where}; adapters 4 B x {trained:,}"
    return Line("weights", layout.base_bytes * held + 4 * adapters, text, resident)


def _train_lines(model: ModelShape, layout: Layout, stage: int) -> list[Line]:
    """What one micro-batch needs."""
    c, tokens, last = layout.compute_bytes, layout.max_tokens, stage == layout.pp - 1
    kept, again = kept_activations(model, layout, stage)
    vocab, policy = model.vocab_size, ceil(tokens * layout.policy_share)
    if layout.backend == "megatron":
        vocab = padded_vocab(model) // layout.tp
    logits = 2 * c * policy * vocab + LOSS_BYTES if last and not model.value_head else 0
    norm = 4 + c if layout.backend == "fsdp" else c
    end = (tokens * norm + policy * c) * model.hidden_size if last else 0
    flight = f" x {layout.pp - stage} micro-batches in flight" if layout.pp - stage > 1 else ""
    if layout.recompute == "full":
        what = f"layer inputs only (full recomputation) of {tokens:,} tokens"
    else:
        what = f"{layer_activation(model, layout):,.0f} B x {tokens:,} tokens a layer"
    at_once = ", not at the same time as the logits" if last else ""
    return [
        Line("activations", kept + end, f"{what} x {model.num_hidden_layers // layout.pp} layers{flight}", PHASES[2:]),
        Line(
            "logits",
            logits,
            f"{c} B x {policy:,} policy tokens x {vocab:,} words, and their gradient; 64 MiB for the loss",
            PHASES[2:],
        ),
        Line(
            "recomputed activations",
            max(0, again - logits),
            f"{again / GIB:.2f} GiB{at_once}; the larger counts" if again else "nothing is recomputed",
            PHASES[2:],
        ),
    ]


def _other_lines(model: ModelShape, layout: Layout, gpu_bytes: int) -> list[Line]:
    """Reference model, engine, weight update and assumed overheads."""
    lines, root = [], sum(map(prod, model.root_tensors))
    if layout.reference:
        size = 4 * shard_parameters(model, layout.reference_gpus) + layout.compute_bytes * root
        text = (
            f"fp32, 1 share of {layout.reference_gpus}; embedding and output layer stay gathered in {layout.compute_bytes} B"
        )
        lines.append(Line("reference model", size, text))
    engine = round(layout.engine_share * gpu_bytes)
    text = f"gpu_memory_utilization {layout.engine_share:g} x {gpu_bytes / GIB:g} GiB"
    weights = layout.engine_bytes * model.parameters / layout.engine_tp / GIB
    text += f", of which weights {weights:.1f} GiB; " + ("asleep in training" if layout.shared else "on GPUs of its own")
    lines.append(Line("rollout engine", engine if layout.shared else 0, text, PHASES[:2]))
    # FSDP gathers in fp32 and casts; Megatron gathers the parts of a layer, then joins them.
    full = 4 + layout.engine_bytes if layout.backend == "fsdp" else layout.compute_bytes * (2 if layout.tp > 1 else 1)
    size, text = (
        full * model.embedding,
        f"the embedding whole, {full} B x {model.embedding:,}; the buckets lie in host memory",
    )
    if layout.adapter_updates:
        whole = shard_adapters(model, layout.lora_rank, layout.lora_targets, 1)
        size, text = full * whole, f"all adapters whole, {full} B x {whole:,}"
    lines.append(Line("weight update", size, text, PHASES[1:2]))
    processes = 1 + layout.reference + (layout.critic is not None)
    lines.append(Line("contexts", CONTEXT_BYTES * processes, f"assumed: 1 GiB x {processes} process(es) beside the engine"))
    if layout.shared:
        lines.append(Line("sleeping engine", CONTEXT_BYTES, "assumed: 1 GiB", PHASES[2:]))
    return lines


def _critic_lines(model: ModelShape, layout: Layout, actor: list[Line]) -> list[Line]:
    """The critic trains before the actor: what it holds always, and what it needs then beyond what the actor will.

    Which of the critic's stages shares a GPU with which of the actor's depends on both layouts; the worst one counts.
    """
    if layout.critic is None:
        return []
    value_model, critic = replace(model, value_head=True), layout.critic

    def held(lines: list[Line], phase: str) -> int:
        return sum(line.size for line in lines if phase in line.phases)

    stages = [
        [*_actor_lines(value_model, critic, stage), *_train_lines(value_model, critic, stage)] for stage in range(critic.pp)
    ]
    lines = max(stages, key=lambda found: held(found, "train"))
    always, training = held(lines, "rollout"), held(lines, "train")
    # The actor's offloaded state is away then, and the critic's while the actor trains.
    more = training + held(actor, "rollout") - held(actor, "train") - always
    cut = f", TP {critic.tp} x PP {critic.pp} x DP {critic.dp}" if critic.backend == "megatron" else ""
    what = ", ".join(f"{line.name} {line.size / GIB:.2f}" for line in lines if "rollout" in line.phases and line.size)
    text = f"{training / GIB:.2f} GiB while it trains, before the actor; counted is what is more than the actor needs"
    return [
        Line("critic", always, f"{critic.backend}{cut}: {what or 'all of it leaves the GPU'}"),
        Line("critic in training", max(0, more), text, PHASES[2:]),
    ]


def _stage_plan(model: ModelShape, layout: Layout, gpu_bytes: int, stage: int) -> MemoryPlan:
    lines = [*_actor_lines(model, layout, stage), *_train_lines(model, layout, stage)]
    own = stage_parameters(model, layout.tp, layout.pp, stage) if layout.backend == "megatron" else model.parameters
    lines += _critic_lines(model, layout, lines)
    lines += _other_lines(model, layout, gpu_bytes)
    spare = round(FRAGMENTATION * sum(line.size for line in lines if "train" in line.phases))
    lines.append(Line("margin", spare, f"assumed: {FRAGMENTATION:.0%} of training, for fragmentation", PHASES[2:]))
    weights, room = layout.engine_bytes * model.parameters / layout.engine_tp, layout.engine_share * gpu_bytes
    return MemoryPlan(stage, own, tuple(lines), engine_problem(weights, room))


def engine_problem(weights: float, room: float) -> str:
    """Why an engine cannot start with so many bytes of weights in so much room; empty if it can."""
    if weights + 2 * GIB <= room:
        return ""
    return (
        f"the engine's weights ({weights / GIB:.1f} GiB a GPU) leave less than 2 GiB of the {room / GIB:.1f} GiB of "
        "rollout.gpu_memory_utilization for its cache; raise that or rollout.tensor_parallel_size"
    )


def plan_memory(model: ModelShape, layout: Layout, gpu_bytes: int = 80 * GIB) -> MemoryPlan:
    """The plan of the pipeline stage that needs most: in its worst phase if that is too much, else in training.

    Raises:
        UserError: the layout does not fit the model's sizes.
    """
    layout.check(model)
    plans = [_stage_plan(model, layout, gpu_bytes, stage) for stage in range(layout.pp)]
    return max(plans, key=lambda plan: (plan.peak if plan.peak > gpu_bytes else 0, plan.total("train")))


def knobs(model: ModelShape, layout: Layout, gpu_bytes: int) -> list[tuple[str, Layout, MemoryPlan]]:
    """Single changes that lower the peak, the best first: the key and its value, and what comes of it."""
    now, found = plan_memory(model, layout, gpu_bytes), []
    for text, changed in layout.variants():
        try:
            plan = plan_memory(model, changed, gpu_bytes)
        except UserError:
            continue  # the model cannot be cut that way
        if plan.peak < now.peak or (now.problem and not plan.problem):
            found.append((text, changed, plan))
    return sorted(found, key=lambda item: (bool(item[2].problem), item[2].peak))


def remedy(model: ModelShape, layout: Layout, gpu_bytes: int) -> tuple[list[str], MemoryPlan]:
    """Changes that together make the run fit on the GPUs it has, found by taking the best one at a time.

    The plan returned does not fit if none do.
    """
    taken: list[str] = []
    plan = plan_memory(model, layout, gpu_bytes)
    while not plan.fits(gpu_bytes) and len(taken) < 8:
        options = [item for item in knobs(model, layout, gpu_bytes) if "component_placement" not in item[0]]
        if not options:
            break
        text, layout, plan = options[0]
        taken.append(text)
    return taken, plan
