"""The critic's section: what it takes over from the actor, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from searchr1.commands.check_config import explain
from searchr1.config.critic import critic_model
from searchr1.config.layout import critic_layout, group_ranks
from searchr1.config.load import ConfigError, load_config
from searchr1.device import Device
from searchr1.learner.trainer_config import TrainerConfig
from searchr1.preflight.check import check_config

CONFIG = Path(__file__).resolve().parents[2] / "examples/searchr1/config/tiny-cpu.yaml"
GAE = ("algorithm.adv_type=gae", "critic.use_critic_model=True")
TENSOR = ("actor.training_backend=megatron", "actor.model.tensor_model_parallel_size=2")


@pytest.fixture
def load(tmp_path):
    (tmp_path / "model").mkdir()
    model = {"model_type": "qwen2", "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2}
    (tmp_path / "model/config.json").write_text(json.dumps(model | {"hidden_size": 2048, "intermediate_size": 11008}))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    paths = (f"rollout.model.model_path={tmp_path}/model", f"data.train_data_paths=[{tmp_path}/rows.jsonl]",
             f"data.val_data_paths=[{tmp_path}/rows.jsonl]")  # fmt: skip
    return lambda *overrides: load_config(CONFIG, [*paths, *GAE, *overrides])


@pytest.mark.parametrize(
    ("overrides", "backend", "cut", "processes"),
    [
        ((), "fsdp", (1, 1), 1),
        (TENSOR, "megatron", (2, 1), 2),
        ((*TENSOR, "critic.training_backend=fsdp"), "fsdp", (1, 1), 1),
        (("critic.training_backend=megatron",), "megatron", (1, 1), 1),
        (("critic.training_backend=megatron", "critic.model.pipeline_model_parallel_size=3"), "megatron", (1, 3), 3),
        (
            (*TENSOR, "critic.model.tensor_model_parallel_size=1", "critic.model.pipeline_model_parallel_size=2"),
            "megatron", (1, 2), 2,
        ),
    ],
)  # fmt: skip
def test_the_critic_follows_the_actor_unless_reported_otherwise(load, overrides, backend, cut, processes):
    config = load(*overrides)
    assert check_config(config, for_training=True) == []
    trainer = TrainerConfig.for_critic(config)
    assert (trainer.backend, trainer.optim, trainer.lora.rank) == (backend, config.critic.optim, 0)
    ranks = len(group_ranks(config, "critic", Device.detect("cpu")))
    layout = critic_layout(config, ranks)
    assert (ranks, (layout.tensor_parallel, layout.pipeline_parallel), layout.data_parallel) == (processes, cut, 1)
    assert f"critic      {backend}, tensor x pipeline x data parallel {cut[0]} x {cut[1]} x 1" in explain(config, True)


@pytest.mark.parametrize(
    ("overrides", "recomputes"),
    [
        ((), (False, None)),
        (("actor.model.gradient_checkpointing=True",), (True, None)),
        (("actor.model.gradient_checkpointing=True", "critic.gradient_checkpointing=False"), (False, None)),
        (("actor.model.gradient_checkpointing=True", "critic.training_backend=megatron"), (False, "full")),
        ((*TENSOR, "actor.model.recompute_granularity=selective"), (False, "selective")),
        ((*TENSOR, "actor.model.recompute_granularity=full", "critic.training_backend=fsdp"), (True, None)),
        ((*TENSOR, "critic.gradient_checkpointing=True"), (False, "full")),
    ],
)
def test_recomputing_is_the_actors_in_the_backends_own_words(load, overrides, recomputes):
    model = critic_model(load(*overrides))
    assert (model.gradient_checkpointing, model.recompute_granularity) == recomputes


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (("critic.training_backend=deepspeed",), "critic.training_backend", "is not one of None, fsdp, megatron"),
        (("critic.model.tensor_model_parallel_size=2",), "critic.model.tensor_model_parallel_size", "needs critic.training"),
        ((*TENSOR, "critic.model.tensor_model_parallel_size=4"), "critic.model.tensor_model_parallel_size", "num_key_value"),
        (
            (*TENSOR, "critic.model.pipeline_model_parallel_size=5"),
            "critic.model.pipeline_model_parallel_size", "5 does not divide num_hidden_layers = 36",
        ),
        (
            (*TENSOR, "cluster.slots=2", "critic.model.pipeline_model_parallel_size=4"),
            "critic.model.tensor_model_parallel_size", "does not divide the critic's 2 ranks",
        ),
        (("critic.model.sequence_parallel=True",), "critic.model.sequence_parallel", "needs tensor_model_parallel_size"),
        (("critic.model_path=/nowhere/model",), "critic.model_path", "/nowhere/model: no such folder"),
        (("critic.optim.lr=0",), "critic.optim.lr", "must be more than 0"),
        (("critic.lr_sched.max_lr=1",), "critic.lr_sched.max_lr", "contradicts critic.optim.lr: 1e-05"),
        (("critic.warmup_steps=-1",), "critic.warmup_steps", "must be 0 or more"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_rejected_with_the_key(load, overrides, key, message):
    try:
        problems = check_config(load(*overrides), for_training=True)
    except ConfigError as error:
        problems = error.problems
    found = {problem.key: problem.message for problem in problems}
    assert message in found[key], found
    assert set(found) <= {key, "critic.training_backend"}


def test_a_critic_on_fsdp_cannot_start_from_a_megatron_checkpoint(load, tmp_path):
    (tmp_path / "metadata.json").write_text("{}")
    checkpoint = f"actor.model.megatron_checkpoint={tmp_path}"
    assert critic_model(load(*TENSOR, checkpoint)).megatron_checkpoint == str(tmp_path)
    config = load(*TENSOR, checkpoint, "critic.training_backend=fsdp")
    assert [problem.key for problem in check_config(config, for_training=True)] == ["critic.model_path"]
