"""Exact parameter counts of known models, whole and per rank. No torch."""

from __future__ import annotations

from math import ceil, prod

from searchr1.checkpoints.model_shape import ModelShape
from searchr1.errors import UserError


def _qwen25(h: int, f: int, layers: int, heads: int, kv: int, vocab: int, tied: bool, head_dim: int = 128) -> ModelShape:
    return ModelShape("qwen2", h, f, layers, heads, kv, vocab, tied, head_dim)


SHAPES = {
    "qwen2.5-0.5b": _qwen25(896, 4864, 24, 14, 2, 151936, True, 64),
    "qwen2.5-1.5b": _qwen25(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-3b": _qwen25(2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-7b": _qwen25(3584, 18944, 28, 28, 4, 152064, False),
    "qwen2.5-14b": _qwen25(5120, 13824, 48, 40, 8, 152064, False),
    "qwen2.5-32b": _qwen25(5120, 27648, 64, 40, 8, 152064, False),
    "qwen2.5-72b": _qwen25(8192, 29568, 80, 64, 8, 152064, False),
    "qwen3-0.6b": ModelShape("qwen3", 1024, 3072, 28, 16, 8, 151936, True),
    "qwen3-8b": ModelShape("qwen3", 4096, 12288, 36, 32, 8, 151936, False),
    "llama-3.2-3b": ModelShape("llama", 3072, 8192, 28, 24, 8, 128256, True, rms_norm_eps=1e-5),
}
"""Known models, by the name that `--shape` takes."""


def shape_named(name: str) -> ModelShape:
    """Return one of `SHAPES`.

    Raises:
        UserError: there is none of that name.
    """
    if name.lower() not in SHAPES:
        raise UserError(f"--shape {name}: not known; there are {', '.join(SHAPES)}, or give --model-config config.json")
    return SHAPES[name.lower()]


def guess_shape(path: str) -> str | None:
    """Return the known shape that a model's path or hub name contains: `Qwen/Qwen2.5-3B-Instruct` is qwen2.5-3b."""
    name = path.rstrip("/").rpartition("/")[2].lower()
    return next((known for known in SHAPES if name == known or name.startswith(known + "-")), None)


def stage_parameters(model: ModelShape, tp: int, pp: int, stage: int) -> int:
    """Return the parameters of one Megatron rank.

    A tied output layer is held by the first and the last stage, a critic's embedding by the first alone.
    """
    layer = sum(prod(shape) // (tp if cut else 1) for shape, cut in model.layer_tensors)
    count = model.num_hidden_layers // pp * layer
    first, last = stage == 0, stage == pp - 1
    embeddings = first if model.value_head else first + last - (first and last and model.tied)
    ends = last * model.hidden_size * (2 if model.value_head else 1)
    return count + embeddings * (model.padded_vocab // tp) * model.hidden_size + ends


def shard_parameters(model: ModelShape, ranks: int) -> int:
    """Return the parameters of one FSDP2 rank: each tensor is cut by rows, rounded up (the first rank has the most)."""
    layer = sum(_shard(shape, ranks) for shape, _ in model.layer_tensors)
    return model.num_hidden_layers * layer + sum(_shard(shape, ranks) for shape in model.root_tensors)


def shard_adapters(model: ModelShape, rank: int, targets: tuple[str, ...], ranks: int) -> int:
    """Return the parameters of LoRA's matrices of one FSDP2 rank."""
    layer = sum(_shard(shape, ranks) for shape in model.adapters(rank, targets))
    with_output = "lm_head" in targets and not model.tied
    root = [(rank, model.hidden_size), (model.vocab_size, rank)] if with_output else []
    return model.num_hidden_layers * layer + sum(_shard(shape, ranks) for shape in root)


def _shard(shape: tuple[int, ...], ranks: int) -> int:
    return ceil(shape[0] / ranks) * prod(shape[1:])
