"""What `--verify` does: the bits of every tensor, and the logits of two readings of a model that share no code."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.filesize import decimal
from torch import Tensor

from searchr1.checkpoints.mapping import entries
from searchr1.checkpoints.megatron_source import MegatronSource
from searchr1.checkpoints.model_shape import ModelShape, read_megatron_shape, rotary_frequencies
from searchr1.checkpoints.safetensors import bytes_of, pieces
from searchr1.errors import UserError
from searchr1.progress import ProgressBar

SMALL_BYTES = 1 << 30
"""Models up to this size are also run, without being asked."""
PROBE_TOKENS = 24
_TOLERANCE = 1e-3
"""Of the largest logit: both compute in fp32, in another order. A wrong row anywhere changes logits by their own size."""


def compare(pairs: Iterable[tuple[str, Tensor, Tensor]], total_bytes: int, dtype: torch.dtype | None) -> str:
    """Compare (name, source, written) bit by bit, the source first brought to `dtype`. Return what was compared.

    Raises:
        UserError: a tensor differs.
    """
    count = size = 0
    with ProgressBar("comparing", total_bytes) as bar:
        for name, source, written in pairs:
            if source.shape != written.shape or not same_bits(source, written, dtype, name):
                raise UserError(
                    f"--verify: {name} differs from the source after reading it back: the disk or memory is faulty"
                )
            bar.advance(source.nbytes)
            count, size = count + 1, size + written.nbytes
            del source, written
    return f"verified: {count} tensors ({decimal(size)}) read back, identical bit by bit; the checkpoint's checksums hold"


def same_bits(source: Tensor, written: Tensor, dtype: torch.dtype | None, name: str) -> bool:
    """Return whether `written` is `source` in precision `dtype` (None: the source's), with the signs of zeros and NaNs."""
    flat = written.contiguous().reshape(-1)
    start = 0
    for piece in pieces(source, dtype or source.dtype, name):
        found = flat[start : start + len(piece)]
        if found.dtype != piece.dtype or not torch.equal(bytes_of(found), bytes_of(piece)):
            return False
        start += len(piece)
    return start == len(flat)


def compare_logits(source: MegatronSource, config: Path, folder: Path, dtype: torch.dtype | None) -> str:
    """Run the Hugging Face folder with transformers, the Megatron checkpoint with `megatron_logits`; compare.

    Args:
        source: the Megatron side.
        config: a folder with the model's config.json.
        folder: the Hugging Face side.
        dtype: the precision that both sides' weights are rounded to first; None leaves them.

    Raises:
        UserError: the logits differ.
    """
    from transformers import AutoModelForCausalLM

    arch, settings = read_megatron_shape(config)
    ids_T = (torch.arange(PROBE_TOKENS) * 7919 + 1) % arch.vocab_size
    with torch.inference_mode():
        expected = megatron_logits(source, arch, rotary_frequencies(settings), ids_T, dtype)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        if dtype is not None:
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
        found = model(ids_T[None]).logits[0]
    error, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    if not error <= _TOLERANCE * scale:
        raise UserError(f"--verify: the logits differ by {error:.2g} (largest logit {scale:.2g}): please report this model")
    return (
        f"verified: logits of {PROBE_TOKENS} probe tokens, transformers against a plain reading of the Megatron tensors: "
        f"largest difference {error:.1e}, largest logit {scale:.2g}"
    )


def megatron_logits(
    source: MegatronSource, arch: ModelShape, frequencies: Tensor, ids_T: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Return logits [T, V] in fp32, computed from tensors in Megatron's layout as Megatron's modules use them.

    Uses none of mapping.py's rearrangements, so that an error in those shows.
    """
    table = {entry.name: entry for entry in entries(arch)}

    def weight(name: str) -> Tensor:
        found = source.read(table[name])
        return (found if dtype is None else found.to(dtype)).float()

    def norm(hidden: Tensor, name: str) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], weight(name), arch.rms_norm_eps)

    angles = torch.outer(torch.arange(len(ids_T)).float(), frequencies.float())
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]

    def rotate(heads_THD: Tensor) -> Tensor:
        first, second = heads_THD.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    hidden = weight("embedding.word_embeddings.weight")[ids_T]
    for layer in range(arch.num_hidden_layers):
        prefix = f"decoder.layers.{layer}."
        normed = norm(hidden, prefix + "self_attention.linear_qkv.layer_norm_weight")
        bias = weight(prefix + "self_attention.linear_qkv.bias") if arch.qkv_bias else None
        fused = F.linear(normed, weight(prefix + "self_attention.linear_qkv.weight"), bias)
        # Per key-value head: its queries, its key, its value.
        fused_TGHD = fused.view(
            len(ids_T), arch.num_key_value_heads, arch.num_attention_heads // arch.num_key_value_heads + 2, arch.head_dim
        )
        query, key, value = fused_TGHD[:, :, :-2].flatten(1, 2), fused_TGHD[:, :, -2], fused_TGHD[:, :, -1]
        if arch.qk_norm:
            query = norm(query, prefix + "self_attention.q_layernorm.weight")
            key = norm(key, prefix + "self_attention.k_layernorm.weight")
        mixed = F.scaled_dot_product_attention(
            rotate(query).transpose(0, 1)[None],
            rotate(key).transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            is_causal=True,
            enable_gqa=True,
        )[0]
        hidden = hidden + F.linear(mixed.transpose(0, 1).flatten(1), weight(prefix + "self_attention.linear_proj.weight"))
        normed = norm(hidden, prefix + "mlp.linear_fc1.layer_norm_weight")
        gate, up = F.linear(normed, weight(prefix + "mlp.linear_fc1.weight")).chunk(2, -1)
        hidden = hidden + F.linear(F.silu(gate) * up, weight(prefix + "mlp.linear_fc2.weight"))
    output = "embedding.word_embeddings.weight" if arch.tied else "output_layer.weight"
    return F.linear(norm(hidden, "decoder.final_layernorm.weight"), weight(output))
