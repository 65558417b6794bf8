"""What several tests of retrieval need."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def encoder_path(tmp_path_factory):
    """A folder with a small random BERT and its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    from searchr1.demo.cold_start_rows import train_tokenizer

    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=2048, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, pad_token_id=0
    )
    BertModel(config).save_pretrained(path)
    train_tokenizer().save_pretrained(path)
    return str(path)
