"""Shapes of dense decoders and exact parameter counts, whole and per rank. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

from searchr1.errors import UserError

VOCAB_MULTIPLE = 128
"""Megatron's embedding is padded to a multiple of this."""


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
    value_head: bool = False
    """A critic: one row instead of the output layer."""

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
        """Parameters outside the layers: embedding, final norm, output layer or value head."""
        head: list[tuple[int, ...]] = [(1, self.hidden_size)] if self.value_head else []
        embeddings = 1 if self.tied or self.value_head else 2
        return [*[(self.vocab_size, self.hidden_size)] * embeddings, (self.hidden_size,), *head]

    @property
    def layer_parameters(self) -> int:
        """Of one layer."""
        return sum(prod(shape) for shape, _ in self.layer_tensors)

    @property
    def parameters(self) -> int:
        """Of the whole model, as transformers counts them."""
        return self.num_hidden_layers * self.layer_parameters + sum(prod(shape) for shape in self.root_tensors)

    def adapters(self, rank: int, targets: tuple[str, ...]) -> list[tuple[int, ...]]:
        """Shapes of one layer's LoRA matrices, A then B of each target; names that are no projection have none here."""
        h, f, q, k = self.hidden_size, self.intermediate_size, self.query_size, self.key_size
        sizes = {"q_proj": (q, h), "k_proj": (k, h), "v_proj": (k, h), "o_proj": (h, q), "down_proj": (h, f)}
        sizes |= {"gate_proj": (f, h), "up_proj": (f, h)}
        found = [sizes[target] for target in targets if target in sizes]
        return [shape for rows, columns in found for shape in ((rank, columns), (rows, rank))]


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


def shape_named(name: str) -> ModelShape:
    """One of `SHAPES`.

    Raises:
        UserError: there is none of that name.
    """
    if name.lower() not in SHAPES:
        raise UserError(f"--shape {name}: not known; there are {', '.join(SHAPES)}, or give --model-config config.json")
    return SHAPES[name.lower()]


def guess_shape(path: str) -> str | None:
    """The known shape that a model's path or hub name speaks of: `Qwen/Qwen2.5-3B-Instruct` is qwen2.5-3b."""
    name = path.rstrip("/").rpartition("/")[2].lower()
    return next((known for known in SHAPES if name == known or name.startswith(known + "-")), None)


def read_shape(path: Path) -> ModelShape:
    """From a Hugging Face config.json, or a folder with one.

    Raises:
        UserError: no such file, or a model that these formulas do not describe.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give --model-config config.json or --shape") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is no JSON: {error}") from error
    family = values.get("model_type") if isinstance(values, dict) else None
    if family not in ("qwen2", "qwen3", "llama"):
        raise UserError(f"{file}: model_type {family!r} is not one of qwen2, qwen3, llama, which the formulas describe")
    refused = [key for key in ("attention_bias", "mlp_bias") if values.get(key)]
    if refused:
        raise UserError(f"{file}: {', '.join(refused)}: true is not covered by the formulas")
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    wrong = [key for key in needed if not isinstance(values.get(key), int) or values[key] < 1]
    if wrong:
        raise UserError(f"{file}: {', '.join(wrong)}: missing, or no whole number above 0")
    heads = values["num_attention_heads"]
    head_dim = values.get("head_dim") or (128 if family == "qwen3" else values["hidden_size"] // heads)
    return ModelShape(
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=values.get("num_key_value_heads") or heads,
        vocab_size=values["vocab_size"],
        tied=bool(values.get("tie_word_embeddings", False)),
        head_dim=head_dim,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


def padded_vocab(model: ModelShape) -> int:
    """Rows of Megatron's embedding."""
    return ceil(model.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def stage_parameters(model: ModelShape, tp: int, pp: int, stage: int) -> int:
    """Parameters of one Megatron rank. A tied output layer is held by the first and the last stage, a critic's embedding by
    the first alone."""
    layer = sum(prod(shape) // (tp if cut else 1) for shape, cut in model.layer_tensors)
    count = model.num_hidden_layers // pp * layer
    first, last = stage == 0, stage == pp - 1
    embeddings = first if model.value_head else first + last - (first and last and model.tied)
    ends = last * model.hidden_size * (2 if model.value_head else 1)
    return count + embeddings * (padded_vocab(model) // tp) * model.hidden_size + ends


def shard_parameters(model: ModelShape, ranks: int) -> int:
    """Parameters of one FSDP2 rank: each tensor is cut by rows, rounded up (the first rank has the most)."""
    layer = sum(_shard(shape, ranks) for shape, _ in model.layer_tensors)
    return model.num_hidden_layers * layer + sum(_shard(shape, ranks) for shape in model.root_tensors)


def shard_adapters(model: ModelShape, rank: int, targets: tuple[str, ...], ranks: int) -> int:
    """The same of LoRA's matrices."""
    layer = sum(_shard(shape, ranks) for shape in model.adapters(rank, targets))
    with_output = "lm_head" in targets and not model.tied
    root = [(rank, model.hidden_size), (model.vocab_size, rank)] if with_output else []
    return model.num_hidden_layers * layer + sum(_shard(shape, ranks) for shape in root)


def _shard(shape: tuple[int, ...], ranks: int) -> int:
    return ceil(shape[0] / ranks) * prod(shape[1:])
