"""Trajectories and rows that are longer than a model's positions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from searchr1.chat.load import fit_to_model
from searchr1.config.schema import Config
from searchr1.errors import UserError
from searchr1.preflight.check_models import check_positions, model_positions, positions_of
from searchr1.training.sft import longest_row

QWEN25 = {
    "model_type": "qwen2", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_size": 64, "intermediate_size": 96, "vocab_size": 256, "max_position_embeddings": 2048,
}  # fmt: skip


def folder(path: Path, **changes) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(QWEN25 | changes))
    return str(path)


ROPES = {
    "none": ({}, 2048),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 4096),
    # Qwen's own way of writing it: the factor has to be in max_position_embeddings too.
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}}, 2048),
    "llama3": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 512}},
        2048,
    ),
    "new names": ({"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}}, 6144),
}  # fmt: skip
"""What a config.json says more, and the positions by vLLM's rule (vllm/config/model.py, _get_and_verify_max_len)."""


@pytest.mark.parametrize("name", ROPES)
def test_positions(name, tmp_path):
    changes, expected = ROPES[name]
    assert model_positions(folder(tmp_path / "model", **changes)) == expected


@pytest.mark.slow  # importing vLLM's configuration takes some 15 s
@pytest.mark.parametrize("name", ROPES)
def test_positions_are_those_of_the_engine(name, tmp_path):
    from vllm.config import ModelConfig

    changes, expected = ROPES[name]
    path = folder(tmp_path / "model", architectures=["Qwen2ForCausalLM"], **changes)
    arguments = {"skip_tokenizer_init": True, "dtype": "float32"}
    assert ModelConfig(model=path, max_model_len=expected, **arguments).max_model_len == expected
    with pytest.raises(ValueError, match="max_model_len"):
        ModelConfig(model=path, max_model_len=expected + 1, **arguments)


def test_positions_of_other_families():
    assert positions_of({"n_positions": 1024}) == 1024
    assert positions_of({"max_position_embeddings": 4096, "seq_length": 2048}) == 2048
    assert positions_of({"max_position_embeddings": 4096, "model_max_length": 8192}) == 8192
    assert positions_of({"text_config": {"max_position_embeddings": 512}, "max_position_embeddings": 9}) == 512
    layers = {"full": {"rope_type": "linear", "factor": 8.0}, "sliding": {"rope_type": "default"}}
    assert positions_of({"max_position_embeddings": 512, "rope_parameters": layers}) == 4096
    assert positions_of({"model_type": "gemma3_text", "max_position_embeddings": 512, "rope_parameters": layers}) == 512
    assert positions_of({}) is None


def test_a_model_that_leaves_it_out_has_its_familys_own(tmp_path):
    without = {key: value for key, value in QWEN25.items() if key != "max_position_embeddings"}
    (tmp_path / "config.json").write_text(json.dumps(without | {"model_type": "llama"}))
    assert model_positions(str(tmp_path)) == 2048  # of LlamaConfig
    assert model_positions("nobody/has-this-model") is None
    assert model_positions("") is None


def test_every_model_of_a_run(tmp_path):
    config = Config()
    config.runner.seq_length = 2049
    config.rollout.model.model_path = folder(tmp_path / "long", max_position_embeddings=4096)
    config.actor.model.path = folder(tmp_path / "actor")
    config.inference.model_path = folder(tmp_path / "reference")
    config.critic.model_path, config.critic.use_critic_model = folder(tmp_path / "critic"), True
    assert list(check_positions(config, for_training=False)) == []
    found = list(check_positions(config, for_training=True))
    assert [problem.key for problem in found] == ["runner.seq_length"] * 3
    for problem, key in zip(found, ("actor.model.path", "inference.model_path", "critic.model_path"), strict=True):
        assert f"2049 tokens do not fit the 2048 positions of {key}" in problem.message
        assert "set it to 2048 or less" in problem.message
    config.algorithm.kl_beta, config.critic.use_critic_model = 0.0, False
    assert len(list(check_positions(config, for_training=True))) == 1
    config.runner.seq_length = 2048
    assert list(check_positions(config, for_training=True)) == []
    config.runner.seq_length = 4097
    (problem,) = check_positions(config, for_training=False)
    assert "rollout.model.model_path" in problem.message


def test_chat_counts_rotary_scaling(tmp_path):
    config = Config()
    config.rollout.model.model_path = folder(tmp_path / "model", **ROPES["linear"][0])
    config.runner.seq_length = 8192
    fit_to_model(config, may_cut=False)
    config.runner.seq_length = 8193
    with pytest.raises(UserError, match="8192 positions"):
        fit_to_model(config, may_cut=False)


def test_rows_for_fine_tuning(tmp_path):
    model = folder(tmp_path / "model")
    assert longest_row(model, None) == 2048
    assert longest_row(model, 100) == 100
    with pytest.raises(UserError, match=r"--max-length 2049: .* has 2048 positions; give 2048 or less"):
        longest_row(model, 2049)
    long = folder(tmp_path / "long", max_position_embeddings=32768)
    assert longest_row(long, None) == 4096
