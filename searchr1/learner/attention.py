"""Attention over packed sequences for transformers models: no padding, and no sequence sees another.

`import searchr1.learner.attention` registers `attn_implementation="searchr1_packed"` with transformers. No mask is
built anywhere: the borders travel as keyword arguments through the model's forward (see `packed_model_inputs`).

Chosen by measurement (CPU, fp32, 2 threads on 2 free cores, 40 sequences of 100 to 300 tokens, 8 heads of 32, one
layer, forward and backward): scaled_dot_product_attention per sequence 59 ms; padded to buckets of 4 / 8 / 40 sequences
of like length, with gathers written by hand, 67 / 68 / 99 ms; one block-diagonal mask over the row 2.6 s (one thread);
jagged nested tensors have no causal CPU kernel. Padding buys nothing because one sequence already fills the kernel.
A whole model (4 layers of 256, 8 heads, 8,115 tokens in 40 sequences, 2,048 words): forward and backward 1.04 s packed
and 1.6 s padded to the longest; 0.90 s if only the policy's tokens (a third) reach the output layer. With more threads
than free cores everything gets several times slower, attention per sequence most of all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from searchr1.errors import UserError
from searchr1.learner.packing import PackedBatch

NAME = "searchr1_packed"
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments of some models that change the attention itself; ignoring one would be silently wrong."""


class Borders:
    """Where the sequences of a packed row begin and end.

    Not a tuple or a dataclass: torch.compile would look into those and compile a layer again for every number of sequences.
    """

    def __init__(self, lengths: tuple[int, ...], cu_seqlens: Tensor | None = None) -> None:
        """Take the tokens of each sequence, and [S + 1] int32 borders on the model's device, read on a GPU only."""
        self.lengths = lengths
        self.cu_seqlens = cu_seqlens


def packed_model_inputs(batch: PackedBatch) -> dict[str, Any]:
    """Return keyword arguments for a causal language model's forward: one row of T tokens."""
    return {
        "input_ids": batch.input_ids_T[None],
        "position_ids": batch.position_ids_T[None],
        "attention_mask": None,
        "use_cache": False,
        "packed_borders": Borders(batch.lengths, batch.cu_seqlens),
    }


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed_borders: Borders | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each sequence of a packed row, in the signature that transformers calls.

    Half precision on a GPU uses torch's variable-length flash attention; everything else runs
    scaled_dot_product_attention once per sequence, so a sequence's result does not even depend on the rounding of
    its neighbours.

    Args:
        module: the attention layer (not read).
        query: [1, H, T, D].
        key: [1, K, T, D] where K divides H (grouped-query attention).
        value: [1, K, T, D].
        attention_mask: must be None.
        dropout: must be 0.
        scaling: of the scores; None takes D^-0.5.
        sliding_window: must not be shorter than the longest sequence.
        packed_borders: of the sequences, whose lengths sum to T.
        kwargs: whatever else the model passes along.

    Returns:
        [1, T, H, D] and None.

    Raises:
        UserError: the model asks for something that this attention does not do.
    """
    if packed_borders is None:
        raise UserError(
            f"attention '{NAME}' got no sequence borders: the model was called without packed_model_inputs, or its "
            "forward does not pass keyword arguments on to its attention layers"
        )
    lengths = packed_borders.lengths
    unsupported = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if dropout:
        unsupported.append("attention_dropout")
    if attention_mask is not None:
        unsupported.append("attention_mask")
    if sliding_window is not None and sliding_window < max(lengths):
        unsupported.append(f"sliding_window={sliding_window} with a sequence of {max(lengths)} tokens")
    if unsupported:
        raise UserError(f"attention '{NAME}' does not support {', '.join(unsupported)}, which this model uses")
    if query.shape[0] != 1 or query.shape[2] != sum(lengths):
        raise ValueError(f"queries {tuple(query.shape)} are not one packed row of {sum(lengths)} tokens")
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        if packed_borders.cu_seqlens is None:
            raise ValueError("the borders have no cu_seqlens; call the model with packed_model_inputs")
        return _varlen(query, key, value, scaling, max(lengths), packed_borders.cu_seqlens), None
    return _per_sequence(query, key, value, scaling, lengths), None


def _per_sequence(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, lengths: tuple[int, ...]) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=groups > 1)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(outputs, 2).transpose(1, 2)


def _varlen(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, longest: int, borders: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        borders,
        borders,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]


AttentionInterface.register(NAME, packed_attention)
