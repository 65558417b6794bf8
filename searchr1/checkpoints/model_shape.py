"""What a Hugging Face `config.json` says about a decoder, in the terms that Megatron-Core needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchr1.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

VOCAB_MULTIPLE = 128
"""The embedding is padded to a multiple of this, so that its size does not depend on the layout."""

FAMILIES = ("qwen2", "qwen3", "llama")
"""`model_type` of config.json: Qwen2 and Qwen2.5, Qwen3 (dense), Llama 3.x. Their tables are in mapping.py."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A dense decoder with grouped-query attention, SwiGLU and rotary positions."""

    family: str
    """One of `FAMILIES`."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    """As in config.json; Megatron's embedding has `padded_vocab` rows."""
    tied: bool
    """The output layer is the embedding."""
    norm_eps: float
    value_head: bool = False
    """A critic: one number a token instead of the output layer."""

    @property
    def padded_vocab(self) -> int:
        """`vocab` rounded up to a multiple of `VOCAB_MULTIPLE`."""
        return math.ceil(self.vocab / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def qkv_bias(self) -> bool:
        """Qwen2's query, key and value projections have biases; no other linear layer has one."""
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises queries and keys, each head on its own."""
        return self.family == "qwen3"

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """From a transformers configuration.

        Raises:
            UserError: a family, or a feature of one, that the Megatron backend does not have.
        """
        family = config.model_type
        if family not in FAMILIES:
            raise UserError(
                f"model_type {family!r} has no Megatron mapping (there are: {', '.join(FAMILIES)}); set "
                "training_backend: fsdp, which trains any causal language model of transformers"
            )
        refused = {
            "attention_bias": family != "qwen2" and getattr(config, "attention_bias", False),
            "mlp_bias": getattr(config, "mlp_bias", False),
            "use_sliding_window": getattr(config, "use_sliding_window", False),
            f"hidden_act={config.hidden_act}": config.hidden_act != "silu",
            "attention_dropout": bool(getattr(config, "attention_dropout", 0.0)),
        }
        found = [name for name, is_set in refused.items() if is_set]
        if found:
            raise UserError("config.json", f"{', '.join(found)} is not supported with training_backend: megatron; use fsdp")
        return cls(
            family=family,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            ffn=config.intermediate_size,
            vocab=config.vocab_size,
            tied=config.tie_word_embeddings,
            norm_eps=config.rms_norm_eps,
        )

    def check_layout(self, tensor_parallel: int, pipeline_parallel: int, section: str = "actor") -> None:
        """Refuse a layout that the model cannot be cut into.

        Args:
            tensor_parallel: ranks that share each layer.
            pipeline_parallel: ranks that share the layers.
            section: of the YAML, for messages.

        Raises:
            UserError: names the key and the numbers.
        """
        for name, size in (
            ("num_key_value_heads", self.kv_heads),
            ("intermediate_size", self.ffn),
            ("the padded vocabulary", self.padded_vocab),
        ):
            if size % tensor_parallel:
                raise UserError(
                    f"{section}.model.tensor_model_parallel_size",
                    f"{tensor_parallel} does not divide {name} = {size} of the model",
                )
        if self.layers % pipeline_parallel:
            raise UserError(
                f"{section}.model.pipeline_model_parallel_size",
                f"{pipeline_parallel} does not divide num_hidden_layers = {self.layers} of the model",
            )


def read_architecture(folder: str | Path) -> tuple[Architecture, Any]:
    """The architecture and the transformers configuration of a model folder or hub name.

    Raises:
        UserError: there is no readable config.json, or it is of a model that has no mapping.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(folder, f"no usable config.json ({str(error).splitlines()[0]})") from error
    return Architecture.of(config), config


def rotary_frequencies(config: Any) -> Tensor:
    """[head_dim / 2] inverse frequencies of a transformers configuration, scaled as it says (Llama 3.x).

    Raises:
        UserError: a scaling that also changes the attention's scale (YaRN, LongRoPE), which Megatron's modules do not.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = dict(config.rope_parameters)
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 1.0 / (parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    if attention_factor != 1.0 or kind in ("dynamic", "longrope"):
        raise UserError("config.json", f"rope_type {kind!r} is not supported with training_backend: megatron; use fsdp")
    return frequencies
