"""Checkpoint folders as Megatron-LM, slime, RLinf and verl save them, built from a Hugging Face folder's tensors.

The slicing is written out from Megatron-LM's documentation, with loops over heads, and shares no code with the converter.
"""

from __future__ import annotations

import argparse
import enum
import random
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from support.models import tensors_of

HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB, PADDED = 4, 2, 16, 4, 300, 384
"""Sizes of `models.make_model`."""


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    engine_names: bool = True
    """Transformer Engine's names, or Megatron's own modules'."""


def rows(whole: torch.Tensor, rank: int, size: int, dim: int = 0) -> torch.Tensor:
    return whole.chunk(size, dim)[rank].clone()


def interleaved(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """The queries of one key-value head, its key, its value; then the next head's."""
    found = []
    shared = HEADS // KV_HEADS
    for group in range(rank * KV_HEADS // size, (rank + 1) * KV_HEADS // size):
        for head in range(group * shared, (group + 1) * shared):
            found.append(query[head * HEAD_DIM : (head + 1) * HEAD_DIM])
        found += [part[group * HEAD_DIM : (group + 1) * HEAD_DIM] for part in (key, value)]
    return torch.cat(found)


def padded(embedding: torch.Tensor) -> torch.Tensor:
    return torch.cat([embedding, torch.full((PADDED - VOCAB, embedding.shape[1]), 7.0).to(embedding)])


def chunk_of(hf: dict[str, torch.Tensor], layout: Layout, rank: int, stage: int, virtual: int) -> dict[str, object]:
    """One model chunk of one rank."""
    per_chunk = LAYERS // layout.pipeline // layout.virtual
    first = virtual * LAYERS // layout.virtual + stage * per_chunk
    starts = stage == 0 and virtual == 0
    ends = stage == layout.pipeline - 1 and virtual == layout.virtual - 1
    found: dict[str, object] = {}
    if starts:
        found["embedding.word_embeddings.weight"] = rows(padded(hf["model.embed_tokens.weight"]), rank, layout.tensor)
    for local in range(per_chunk):
        source, target = f"model.layers.{first + local}.", f"decoder.layers.{local}."
        before, after = "input_layernorm.weight", "pre_mlp_layernorm.weight"
        if layout.engine_names:
            before, after = "self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"
            found[target + "self_attention.linear_qkv._extra_state"] = None
        found[target + before] = hf[source + "input_layernorm.weight"].clone()
        found[target + after] = hf[source + "post_attention_layernorm.weight"].clone()
        for kind in ("weight", "bias"):
            if source + f"self_attn.q_proj.{kind}" in hf:
                parts = [hf[source + f"self_attn.{which}_proj.{kind}"] for which in "qkv"]
                found[target + f"self_attention.linear_qkv.{kind}"] = interleaved(*parts, rank, layout.tensor)
        for which in "qk":
            if source + f"self_attn.{which}_norm.weight" in hf:
                found[target + f"self_attention.{which}_layernorm.weight"] = hf[
                    source + f"self_attn.{which}_norm.weight"
                ].clone()
        found[target + "self_attention.linear_proj.weight"] = rows(
            hf[source + "self_attn.o_proj.weight"], rank, layout.tensor, 1
        )
        halves = [rows(hf[source + f"mlp.{name}_proj.weight"], rank, layout.tensor) for name in ("gate", "up")]
        found[target + "mlp.linear_fc1.weight"] = torch.cat(halves)
        found[target + "mlp.linear_fc2.weight"] = rows(hf[source + "mlp.down_proj.weight"], rank, layout.tensor, 1)
    if ends:
        found["decoder.final_layernorm.weight"] = hf["model.norm.weight"].clone()
        tied = "lm_head.weight" not in hf
        if not (tied and starts):  # a tied last stage that has not the embedding holds a copy
            output = hf["model.embed_tokens.weight" if tied else "lm_head.weight"]
            found["output_layer.weight"] = rows(padded(output), rank, layout.tensor)
    return found


class ModelType(enum.Enum):
    encoder_or_decoder = 1


def arguments() -> argparse.Namespace:
    """As Megatron stores them: with an enumeration of its own, a function and a precision."""
    return argparse.Namespace(
        model_type=ModelType.encoder_or_decoder,
        params_dtype=torch.bfloat16,
        activation_func=torch.nn.functional.silu,
        save=Path("/results"),
        world_size=4,
    )


def save_rank(state: object, path: Path) -> None:
    """Pickle our enumeration under Megatron's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    module = types.ModuleType("megatron.core.enums_of_a_test")
    module.ModelType = ModelType
    sys.modules[module.__name__] = module
    was = ModelType.__module__
    ModelType.__module__ = module.__name__
    try:
        torch.save(state, path)
    finally:
        ModelType.__module__ = was
        del sys.modules[module.__name__]


def save_torch_format(hf: Path, folder: Path, layout: Layout, **more: object) -> Path:
    """`iter_0000007/mp_rank_XX[_YYY]/model_optim_rng.pt` and the file that names the iteration."""
    weights = tensors_of(hf)
    for rank in range(layout.tensor):
        for stage in range(layout.pipeline):
            suffix = f"_{stage:03d}" if layout.pipeline > 1 else ""
            chunks = [chunk_of(weights, layout, rank, stage, virtual) for virtual in range(layout.virtual)]
            models = {f"model{n}": chunk for n, chunk in enumerate(chunks)} if len(chunks) > 1 else {"model": chunks[0]}
            state = {
                "args": arguments(),
                "checkpoint_version": 3.0,
                "iteration": 7,
                **models,
                "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
                "rng_state": [
                    {
                        "random_rng_state": random.getstate(),
                        "np_rng_state": np.random.get_state(),
                        "torch": torch.get_rng_state(),
                    }
                ],
            }
            save_rank(state | more, folder / f"iter_0000007/mp_rank_{rank:02d}{suffix}/model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("7\n")
    return folder
