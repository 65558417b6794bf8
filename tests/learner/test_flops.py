"""The formula against PyTorch's own count of operations."""

from __future__ import annotations

import pytest
import torch
from support.models import make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from searchr1.learner.stats import training_flops


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_formula_is_what_pytorch_counts(family, tmp_path):
    path = make_model(family, True, tmp_path, head_dim=32)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    lengths, policy = [50, 31], 20
    counted = 0
    for number, length in enumerate(lengths):
        with FlopCounterMode(display=False) as counter:
            positions = torch.arange(policy if number else 0)
            model(torch.arange(length)[None], logits_to_keep=positions).logits.sum().backward()
        counted += counter.get_total_flops()
    config = model.config
    # Eager attention computes the half that is masked as well; the rotary table is a product too, of 0.1 %.
    queries = config.num_attention_heads * config.head_dim
    masked = 3 * config.num_hidden_layers * sum(2 * 2 * queries * n * (n - 1) / 2 for n in lengths)
    assert counted == pytest.approx(training_flops(config, lengths, policy) + masked, rel=2e-3)
