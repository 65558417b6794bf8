"""How much arithmetic a model is, for model FLOPs utilisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def training_flops(config: Any, lengths: Sequence[int], policy_tokens: int) -> float:
    """Floating-point operations of a forward and a backward pass.

    Matrix products only, without what is recomputed: causal attention counts the half that is needed, the output layer
    counts where logits are needed. A multiplication and an addition are two operations; the backward pass is two forwards.

    Args:
        config: the transformers configuration of a dense decoder with gated MLPs.
        lengths: tokens of each sequence.
        policy_tokens: how many of them have logits.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    queries, keys = heads * head_dim, config.num_key_value_heads * head_dim
    per_token = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * config.intermediate_size
    linear = 2 * per_token * sum(lengths)
    attention = sum(2 * 2 * queries * length * (length + 1) / 2 for length in lengths)
    logits = 2 * hidden * config.vocab_size * policy_tokens
    return 3.0 * (config.num_hidden_layers * (linear + attention) + logits)
