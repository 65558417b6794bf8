"""Small random models of every family, and folders to convert."""

from __future__ import annotations

from pathlib import Path

import torch

from searchr1.checkpoints.model_shape import Architecture
from support import policy_ranks

VOCAB = policy_ranks.VOCAB
FAMILIES = ("qwen2", "qwen3", "llama")
MODELS = [(family, tied) for family in FAMILIES for tied in (True, False)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def model_name(family: str, tied: bool, dtype: str) -> str:
    return f"{family}-{'tied' if tied else 'untied'}-{dtype}"


def make_model(family: str, tied: bool, dtype: str, folder: Path, **changes) -> Path:
    return policy_ranks.make_model(family, tied, folder, seed=7, dtype=DTYPES[dtype], **changes)


def architecture(family: str, **changes) -> Architecture:
    settings = {
        "family": family, "layers": 2, "hidden": 16, "heads": 4, "kv_heads": 2, "head_dim": 4, "ffn": 24, "vocab": 50,
        "tied": False, "norm_eps": 1e-6,
    }  # fmt: skip
    return Architecture(**settings | changes)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face folder, read by the safetensors library."""
    from safetensors.torch import load_file

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_tensors(left: Path, right: Path) -> None:
    first, second = tensors_of(left), tensors_of(right)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name
