"""Layers that Megatron-Core lacks without Transformer Engine, and a model for packed rows: rotations looked up by position,
output for policy tokens only.

Imports Megatron: import it after `parallel.start_megatron` has prepared the process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor, nn

from searchr1.learner.attention import Borders, packed_attention


class RMSNorm(nn.Module):
    """RMSNorm with the mark that sequence parallelism needs; Megatron's own wrapper of torch's rejects that."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps
        # Read by Megatron: this rank sees a part of the tokens only, so gradients are summed over the ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class PackedAttention(nn.Module):
    """Causal attention within each sequence of a packed row, as the FSDP backend computes it."""

    def __init__(self, config: Any, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self._scale = softmax_scale
        self.config = config

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        packed_seq_params: PackedRow,
        **_: Any,
    ) -> Tensor:
        """Return [T, H * D] from [T, H, D] queries and [T, K, D] keys and values."""
        assert attention_mask is None
        output, _weights = packed_attention(
            self,
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            None,
            scaling=self._scale,
            packed_borders=packed_seq_params.borders,
        )
        return output[0].flatten(1)


class PackedRow(PackedSeqParams):
    """Borders of the sequences in a packed row, for the attention above.

    Megatron's own fields for them stay empty: with them it would cut queries and keys at the borders to rotate each
    sequence by itself, and read the borders back from the GPU for that, twice a layer. `PolicyModel` looks the rotations
    up by position instead, so the row is rotated whole.
    """

    def __init__(self, lengths: tuple[int, ...], cu_seqlens: Tensor) -> None:
        super().__init__(qkv_format="thd", max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))
        self.borders = Borders(lengths, cu_seqlens)


def layer_spec(config: Any, layers_here: int) -> Any:
    """Return Megatron's own modules with the two layers above, whether or not Transformer Engine is installed."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    layer.self_attention.submodules.core_attention = PackedAttention
    if config.qk_layernorm:
        layer.self_attention.submodules.q_layernorm = layer.self_attention.submodules.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[spec] * layers_here, layer_norm=RMSNorm)


class PolicyModel(GPTModel):
    """A GPTModel of packed rows, whose output layer sees the policy tokens' positions only."""

    output_positions_P: Tensor
    """[P] where the output of the next forward is wanted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            # What reaches the output layer has been gathered already; each rank holds part of the input's gradient.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = self.pg_collection.tp.size() > 1

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Do as Megatron does, with rotary angles [T, 1, D] of each token of the row in place of those of each position."""
        decoder_input, angles_S11D, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        return decoder_input, angles_S11D.squeeze(1)[position_ids[0]], *rest

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `_output` on the last stage, hidden states on the others."""
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return self._output(hidden_states[self.output_positions_P])

    def _output(self, hidden_P1H: Tensor) -> Tensor:
        """Return logits [P, V / T]."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _bias = self.output_layer(hidden_P1H, weight=weight)
        squeezed: Tensor = logits.squeeze(1)
        return squeezed


class ValueModel(PolicyModel):
    """A policy model with a scalar head in the output layer's place; it starts at 0, and no rank has only a part of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"share_embeddings_and_output_weights": False})
        if self.post_process:
            del self.output_layer
            self.value_head = nn.Linear(self.config.hidden_size, 1, bias=False)
            nn.init.zeros_(self.value_head.weight)

    def _output(self, hidden_P1H: Tensor) -> Tensor:
        """Return values [P] in fp32."""
        values_P: Tensor = self.value_head(hidden_P1H).flatten().float()
        return values_P

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None) -> Any:
        """Return the parts as they are: GPTModel would look for the output layer."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
