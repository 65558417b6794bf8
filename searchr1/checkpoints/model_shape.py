"""The shape of a decoder: ONE parser of `config.json`, sizes of tensors, parameter counts. No torch at import."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchr1.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

VOCAB_MULTIPLE = 128
"""Megatron's embedding is padded to a multiple of this, so that its size does not depend on the layout."""

FAMILIES = ("qwen2", "qwen3", "llama")
"""`model_type` of config.json: Qwen2 and Qwen2.5, Qwen3 (dense), Llama 3.x. Their names in Megatron are in mapping.py."""
_COUNTS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense decoder with grouped-query attention, SwiGLU, RMSNorm and rotary positions; names are those of config.json."""

    family: str
    """One of `FAMILIES`."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    """As in config.json; Megatron's embedding has `padded_vocab` rows."""
    tied: bool
    """The output layer is the embedding."""
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    value_head: bool = False
    """A critic: one number a token instead of the output layer."""
    not_in_megatron: tuple[str, ...] = ()
    """Settings that change what a model computes and that Megatron's modules do not have."""

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> ModelShape:
        """Read the contents of a config.json, with transformers' defaults for what is left out.

        Args:
            values: of the file, or of a transformers configuration (`to_dict`).
            where: names the file in messages.

        Raises:
            UserError: a family, or tensors of one, that are not known here, or sizes that are none.
        """
        family = values.get("model_type")
        if family not in FAMILIES:
            raise UserError(
                where,
                f"model_type {family!r} has no Megatron mapping and no memory formula (there are: "
                f"{', '.join(FAMILIES)}); use training_backend: fsdp, for any causal language model of transformers",
            )
        biases = [key for key in ("attention_bias", "mlp_bias") if values.get(key)]
        if family == "qwen2":  # its biases are fixed, the key means nothing
            biases = [key for key in biases if key != "attention_bias"]
        if biases:
            raise UserError(
                where,
                f"{', '.join(biases)} is not supported with training_backend: megatron, and has no memory formula; use fsdp",
            )
        wrong = [key for key in _COUNTS if type(values.get(key)) is not int or values[key] < 1]
        if wrong:
            raise UserError(where, f"{', '.join(wrong)}: missing, or no whole number above 0")
        heads = values["num_attention_heads"]
        groups = values.get("num_key_value_heads", None if family == "llama" else 32)
        activation = values.get("hidden_act", "silu")
        absent = {
            "use_sliding_window": values.get("use_sliding_window"),
            f"hidden_act={activation}": activation != "silu",
            "attention_dropout": values.get("attention_dropout"),
        }
        return cls(
            family=family,
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_hidden_layers=values["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=groups or heads,
            vocab_size=values["vocab_size"],
            tied=bool(values.get("tie_word_embeddings", False)),
            head_dim=values.get("head_dim") or (128 if family == "qwen3" else values["hidden_size"] // heads),
            rms_norm_eps=values.get("rms_norm_eps", 1e-6),
            not_in_megatron=tuple(name for name, is_set in absent.items() if is_set),
        )

    @property
    def padded_vocab(self) -> int:
        """`vocab_size` rounded up to a multiple of `VOCAB_MULTIPLE`."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def qkv_bias(self) -> bool:
        """Qwen2's query, key and value projections have biases; no other linear layer has one."""
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises queries and keys, each head on its own."""
        return self.family == "qwen3"

    @property
    def query_size(self) -> int:
        """Width of all queries of a token."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Width of all keys (or values) of a token."""
        return self.num_key_value_heads * self.head_dim

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Weights of one layer's linear modules, by Hugging Face's names."""
        h, f, q, k = self.hidden_size, self.intermediate_size, self.query_size, self.key_size
        attention = {"q_proj": (q, h), "k_proj": (k, h), "v_proj": (k, h), "o_proj": (h, q)}
        return attention | {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)}

    @property
    def layer_tensors(self) -> list[tuple[tuple[int, ...], bool]]:
        """One layer's parameters: shape, and whether tensor parallelism cuts it."""
        biases = [self.query_size, self.key_size, self.key_size] if self.qkv_bias else []
        norms = [self.head_dim, self.head_dim] if self.qk_norm else []
        whole = [*norms, self.hidden_size, self.hidden_size]
        cut = [*self.projections.values(), *((size,) for size in biases)]
        return [*((shape, True) for shape in cut), *(((size,), False) for size in whole)]

    @property
    def embedding(self) -> int:
        """Parameters of the embedding; as many again in an output layer that is not tied."""
        return self.vocab_size * self.hidden_size

    @property
    def root_tensors(self) -> list[tuple[int, ...]]:
        """Shapes outside the layers: embedding, final norm, output layer or value head."""
        head: list[tuple[int, ...]] = [(1, self.hidden_size)] if self.value_head else []
        embeddings = 1 if self.tied or self.value_head else 2
        return [*[(self.vocab_size, self.hidden_size)] * embeddings, (self.hidden_size,), *head]

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        return sum(math.prod(shape) for shape, _ in self.layer_tensors)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, as transformers counts them."""
        return self.num_hidden_layers * self.layer_parameters + sum(math.prod(shape) for shape in self.root_tensors)

    def adapters(self, rank: int, targets: tuple[str, ...]) -> list[tuple[int, ...]]:
        """Return the shapes of one layer's LoRA matrices, A then B of each target; other modules have none here."""
        sizes = [self.projections[target] for target in targets if target in self.projections]
        return [shape for rows, columns in sizes for shape in ((rank, columns), (rows, rank))]

    def check_megatron(self) -> None:
        """Reject a model that Megatron's modules would compute otherwise than transformers.

        Raises:
            UserError: names the settings of config.json.
        """
        if self.not_in_megatron:
            names = ", ".join(self.not_in_megatron)
            raise UserError("config.json", f"{names} is not supported with training_backend: megatron; use fsdp")

    def check_layout(self, tensor_parallel: int, pipeline_parallel: int, section: str = "actor") -> None:
        """Reject a layout that the model cannot be cut into.

        Args:
            tensor_parallel: ranks that share each layer.
            pipeline_parallel: ranks that share the layers.
            section: of the YAML, for messages.

        Raises:
            UserError: names the key and the numbers.
        """
        for name, size in (
            ("num_key_value_heads", self.num_key_value_heads),
            ("intermediate_size", self.intermediate_size),
            ("the padded vocabulary", self.padded_vocab),
        ):
            if size % tensor_parallel:
                raise UserError(
                    f"{section}.model.tensor_model_parallel_size",
                    f"{tensor_parallel} does not divide {name} = {size} of the model",
                )
        if self.num_hidden_layers % pipeline_parallel:
            raise UserError(
                f"{section}.model.pipeline_model_parallel_size",
                f"{pipeline_parallel} does not divide num_hidden_layers = {self.num_hidden_layers} of the model",
            )


def read_shape(path: Path) -> ModelShape:
    """Read a config.json, or the one of a folder, without transformers.

    Raises:
        UserError: no such file, or a model that is not known here.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(file, f"cannot be read ({error.strerror}); give --model-config config.json or --shape") from error
    except (ValueError, RecursionError) as error:
        raise UserError(file, f"is no JSON: {error}") from error
    return ModelShape.of(values if isinstance(values, dict) else {}, str(file))


def read_hf_config(source: str | Path) -> Any:
    """Return the transformers configuration of a model folder or hub name.

    Raises:
        UserError: there is no readable config.json.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(source, f"no usable config.json ({str(error).splitlines()[0]})") from error


def read_megatron_shape(source: str | Path) -> tuple[ModelShape, Any]:
    """Return the shape and the transformers configuration of a model that Megatron can build.

    Args:
        source: a folder or hub name.

    Raises:
        UserError: there is no readable config.json, or Megatron cannot build its model.
    """
    config = read_hf_config(source)
    shape = ModelShape.of(config.to_dict(), f"{source}/config.json")
    shape.check_megatron()
    return shape, config


def rotary_frequencies(config: Any) -> Tensor:
    """Return the inverse frequencies [head_dim / 2] of a transformers configuration, scaled as it says (Llama 3.x).

    Raises:
        UserError: a scaling that also changes the attention's scale (YaRN, LongRoPE), which Megatron's modules do not.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = dict(config.rope_parameters)
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        inverse: Tensor = 1.0 / (parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
        return inverse
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    if attention_factor != 1.0 or kind in ("dynamic", "longrope"):
        raise UserError("config.json", f"rope_type {kind!r} is not supported with training_backend: megatron; use fsdp")
    scaled: Tensor = frequencies
    return scaled


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
