"""Megatron-Core's tensors <-> Hugging Face's: one table, used by loading, weight updates and conversion alike.

Why a table of our own: megatron-bridge imports Transformer Engine unconditionally and pins transformers < 5, so it cannot
run on a CPU; mbridge calls itself a prototype and was last released in 2025-09. Three families need thirteen lines.

Names are those of Megatron's distributed checkpoints, in which the layer norms belong to the linear layer behind them, as
in Transformer Engine's modules. Layers are numbered over the whole model. Nothing here imports Megatron.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from searchr1.checkpoints.model_shape import ModelShape

Kind = Literal["copy", "vocab", "columns", "qkv", "gate_up"]
"""How a tensor is cut over T tensor-parallel ranks.

    copy      not at all
    vocab     by rows, after padding to `ModelShape.padded_vocab`
    columns   by columns
    qkv       rows in groups: the queries of one key-value head, its key, its value; a rank has whole groups
    gate_up   by rows of either source; a rank has its gate rows, then its up rows
"""

SliceReader = Callable[[str, int, int, int], Tensor]
"""(Hugging Face name, dimension, start, stop) -> that part of the tensor; only what is needed is read."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a family's table; `{}` stands for the layer."""

    megatron: str
    sources: tuple[str, ...]
    kind: Kind


_LAYER = "decoder.layers.{}."
_HF = "model.layers.{}."
_DENSE = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab"),
    Rule(_LAYER + "self_attention.linear_qkv.layer_norm_weight", (_HF + "input_layernorm.weight",), "copy"),
    Rule(
        _LAYER + "self_attention.linear_qkv.weight",
        (_HF + "self_attn.q_proj.weight", _HF + "self_attn.k_proj.weight", _HF + "self_attn.v_proj.weight"),
        "qkv",
    ),
    Rule(_LAYER + "self_attention.linear_proj.weight", (_HF + "self_attn.o_proj.weight",), "columns"),
    Rule(_LAYER + "mlp.linear_fc1.layer_norm_weight", (_HF + "post_attention_layernorm.weight",), "copy"),
    Rule(_LAYER + "mlp.linear_fc1.weight", (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"), "gate_up"),
    Rule(_LAYER + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), "columns"),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), "copy"),
    Rule("output_layer.weight", ("lm_head.weight",), "vocab"),
)
_QKV_BIAS = Rule(
    _LAYER + "self_attention.linear_qkv.bias",
    (_HF + "self_attn.q_proj.bias", _HF + "self_attn.k_proj.bias", _HF + "self_attn.v_proj.bias"),
    "qkv",
)
_QK_NORMS = (
    Rule(_LAYER + "self_attention.q_layernorm.weight", (_HF + "self_attn.q_norm.weight",), "copy"),
    Rule(_LAYER + "self_attention.k_layernorm.weight", (_HF + "self_attn.k_norm.weight",), "copy"),
)
TABLES: dict[str, tuple[Rule, ...]] = {
    "llama": _DENSE,
    "qwen2": (*_DENSE, _QKV_BIAS),
    "qwen3": (*_DENSE, *_QK_NORMS),
}

VALUE_HEAD = "value_head.weight"
"""A critic's head, under the same name on either backend; no published model has it."""

_LOCAL_NAMES = (
    (".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"),
    (".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"),
)
"""Megatron's own modules keep the layer norms apart."""


def checkpoint_name(parameter: str) -> str:
    """Return the name in this table of a module's parameter, with Transformer Engine or without."""
    for local, stored in _LOCAL_NAMES:
        if parameter.endswith(local):
            return parameter.removesuffix(local) + stored
    return parameter


@dataclass(frozen=True, slots=True)
class Entry:
    """One Megatron tensor of a model and where it comes from."""

    name: str
    """The name in Megatron, with the layer counted over the whole model."""
    sources: tuple[str, ...]
    """The names in Hugging Face's folder."""
    kind: Kind
    shapes: tuple[tuple[int, ...], ...]
    """The shapes of the sources."""
    arch: ModelShape

    @property
    def global_shape(self) -> tuple[int, ...]:
        """The shape of all ranks' parts together, with the vocabulary padded."""
        return self.local_shape(1)

    def local_shape(self, tensor_parallel: int) -> tuple[int, ...]:
        """Return the shape of one rank's part."""
        rows = sum(shape[0] for shape in self.shapes)
        rest = self.shapes[0][1:]
        if self.kind == "vocab":
            rows = self.arch.padded_vocab
        if self.kind == "copy":
            return (rows, *rest)
        if self.kind == "columns":
            return (rows, rest[0] // tensor_parallel)
        return (rows // tensor_parallel, *rest)

    def read(self, read: SliceReader, rank: int, tensor_parallel: int) -> Tensor:
        """Return one rank's part, reading no more of the sources than that."""
        if self.kind == "copy":
            return read(self.sources[0], 0, 0, self.shapes[0][0])
        if self.kind == "columns":
            part = self.shapes[0][1] // tensor_parallel
            return read(self.sources[0], 1, rank * part, (rank + 1) * part)
        if self.kind == "vocab":
            part = self.arch.padded_vocab // tensor_parallel
            start, stop = (min(n * part, self.arch.vocab_size) for n in (rank, rank + 1))
            found = read(self.sources[0], 0, start, stop)
            if len(found) == part:
                return found
            return torch.cat([found, found.new_zeros(part - len(found), *found.shape[1:])])
        parts = []
        for source, shape in zip(self.sources, self.shapes, strict=True):
            part = shape[0] // tensor_parallel
            parts.append(read(source, 0, rank * part, (rank + 1) * part))
        if self.kind == "qkv":
            groups = self.arch.num_key_value_heads // tensor_parallel
            grouped = [part.unflatten(0, (groups, -1)) for part in parts]
            return torch.cat(grouped, 1).flatten(0, 1)
        return torch.cat(parts)

    def to_hugging_face(self, parts: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the sources again, from the parts of all T ranks in order (or from the whole tensor: one part)."""
        if self.kind in ("copy", "columns"):
            yield self.sources[0], parts[0] if self.kind == "copy" or len(parts) == 1 else torch.cat(list(parts), 1)
        elif self.kind == "vocab":
            whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
            yield self.sources[0], whole[: self.arch.vocab_size]
        elif self.kind == "qkv":
            d = self.arch.head_dim
            queries = self.arch.num_attention_heads // self.arch.num_key_value_heads * d
            grouped = [part.unflatten(0, (-1, queries + 2 * d)) for part in parts]
            borders = ((0, queries), (queries, queries + d), (queries + d, queries + 2 * d))
            for source, (start, stop) in zip(self.sources, borders, strict=True):
                yield source, torch.cat([part[:, start:stop].flatten(0, 1) for part in grouped])
        else:
            halves = [part.chunk(2) for part in parts]
            for number, source in enumerate(self.sources):
                yield source, torch.cat([half[number] for half in halves])


def entries(arch: ModelShape) -> list[Entry]:
    """Return every Megatron tensor of a model, layer by layer, in the order of the model."""
    no_output = arch.tied or arch.value_head
    table = [rule for rule in TABLES[arch.family] if not (no_output and rule.megatron == "output_layer.weight")]
    table += [Rule(VALUE_HEAD, (VALUE_HEAD,), "copy")] if arch.value_head else []
    first = [rule for rule in table if rule.megatron.startswith("embedding.")]
    inner = [rule for rule in table if "{}" in rule.megatron]
    last = [rule for rule in table if rule not in first and rule not in inner]
    found = [_entry(rule, None, arch) for rule in first]
    found += [_entry(rule, layer, arch) for layer in range(arch.num_hidden_layers) for rule in inner]
    return found + [_entry(rule, None, arch) for rule in last]


def hugging_face_shapes(arch: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that a Hugging Face folder of this model has, a tied output layer left out."""
    return {name: shape for entry in entries(arch) for name, shape in zip(entry.sources, entry.shapes, strict=True)}


def _entry(rule: Rule, layer: int | None, arch: ModelShape) -> Entry:
    sources = tuple(source.format(layer) for source in rule.sources)
    shapes = tuple(_source_shape(source, arch) for source in sources)
    return Entry(rule.megatron.format(layer), sources, rule.kind, shapes, arch)


def _source_shape(source: str, arch: ModelShape) -> tuple[int, ...]:
    module, _, parameter = source.rpartition(".")
    embedding = (arch.vocab_size, arch.hidden_size)
    rows, columns = {
        **arch.projections,
        "embed_tokens": embedding,
        "lm_head": embedding,
        "value_head": (1, arch.hidden_size),
        "q_norm": (arch.head_dim, 0),
        "k_norm": (arch.head_dim, 0),
    }.get(module.rpartition(".")[2], (arch.hidden_size, 0))
    return (rows, columns) if columns and parameter == "weight" else (rows,)
