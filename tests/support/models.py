"""Small models with random weights, their shapes, and what is in their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from searchr1.checkpoints.model_shape import ModelShape

VOCAB = 300
FAMILIES = ("qwen2", "qwen3", "llama")
MODELS = [(family, tied) for family in FAMILIES for tied in (True, False)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def model_name(family: str, tied: bool, dtype: str) -> str:
    return f"{family}-{'tied' if tied else 'untied'}-{dtype}"


def architecture(family: str, **changes: Any) -> ModelShape:
    settings = {
        "family": family, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 50, "tied": False, "head_dim": 4,
    }  # fmt: skip
    return ModelShape(**settings | changes)


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


def make_model(
    family: str, tied: bool, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Write a small causal language model with random weights, biases and norms into `folder`. Return the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB, "tie_word_embeddings": tied,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    if family == "llama":
        settings["rope_parameters"] = {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_theta": 10000.0,
        }  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings | changes))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.06) if parameter.ndim > 1 else parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder
