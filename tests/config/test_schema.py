"""The schema itself: no dead key, choices by type, and a reference page that is current."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from searchr1.config.choices import choice_problems, choices_of
from searchr1.config.difference import differences
from searchr1.config.load import ConfigError, known_keys, load_config
from searchr1.config.retired import RETIRED
from searchr1.config.schema import Config

REPO = Path(__file__).parents[2]
SOURCES = REPO / "searchr1"
TINY = REPO / "examples/searchr1/config/tiny-cpu.yaml"
SETTINGS_OF_OTHER_ROOMS = ("layout.py", "critic.py")
"""Files of config/ whose functions other rooms call."""


def leaf_keys() -> list[str]:
    keys = list(known_keys())
    return [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]


def names_read() -> set[str]:
    """Names of attributes and whole strings in every module but those that define and check the configuration."""
    names: set[str] = set()
    for file in SOURCES.rglob("*.py"):
        if file.parent.name in ("config", "preflight") and file.name not in SETTINGS_OF_OTHER_ROOMS:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
            elif isinstance(node, ast.Name):
                names.add(node.id)
    return names


def test_every_key_is_read_by_a_room_that_runs_something():
    names = names_read()
    health = {f"{key}_{side}" for key in names for side in ("min", "max")}  # rules are named without their side
    unread = [
        key for key in leaf_keys()
        if key != "vars"  # read by references
        and key.rpartition(".")[2] not in names
        and not (key.startswith("runner.health.") and key.rpartition(".")[2] in health)
    ]  # fmt: skip
    assert unread == []


def test_no_key_has_a_single_choice():
    assert [key for key in leaf_keys() if len(choices_of(key)) == 1] == []


def test_a_retired_key_is_not_in_the_schema():
    assert set(RETIRED) & set(known_keys()) == set()


FINE = {
    "agentloop.group_name": "AgentLoopGroup", "rollout.model.model_type": "qwen2", "rollout.rollout_backend": "sglang",
    "reward.use_reward_model": False, "actor.mcore_gpt": True, "actor.spec_name": "decoder_gpt",
    "actor.model.apply_rope_fusion": True, "actor.model.context_parallel_size": 1, "actor.model.seq_length": 4096,
    "actor.model.activation": "swiglu", "actor.model.normalization": "rmsnorm",
    "actor.model.position_embedding_type": "rope",
    "actor.model.add_bias_linear": False, "actor.optim.optimizer": "adam", "actor.optim.bf16": False,
    "actor.optim.fp16": False, "actor.lr_sched.max_lr": 2e-6, "actor.lora.dropout": 0.0,
    "actor.megatron.use_profiler": False, "critic.optim.optimizer": "adam", "critic.optim.bf16": False,
    "critic.optim.fp16": False, "critic.lr_sched.max_lr": 1e-5,
}  # fmt: skip
BAD = {
    "rollout.rollout_backend": "hf", "reward.use_reward_model": True, "actor.mcore_gpt": False, "actor.spec_name": "gpt",
    "actor.model.context_parallel_size": 2, "actor.model.seq_length": 8, "actor.model.activation": "gelu",
    "actor.model.normalization": "layernorm", "actor.model.position_embedding_type": "learned",
    "actor.model.add_bias_linear": True, "actor.optim.optimizer": "sgd", "actor.optim.bf16": True, "actor.optim.fp16": True,
    "actor.lr_sched.max_lr": 1, "actor.lora.dropout": 0.1, "actor.megatron.use_profiler": True,
    "critic.optim.optimizer": "sgd", "critic.optim.bf16": True, "critic.optim.fp16": True, "critic.lr_sched.max_lr": 1,
}  # fmt: skip
COMMON = ("actor.model.precision=fp32", "actor.optim.lr=2e-6", "critic.optim.lr=1e-5")


def test_every_retired_key_loads_with_one_line_and_nothing_changes():
    plain = load_config(TINY, COMMON)
    assert set(FINE) == set(RETIRED)
    loaded = load_config(TINY, [*COMMON, *(f"{key}={value}" for key, value in FINE.items())])
    lines = [note for note in loaded.notes if note.startswith("ignored")]
    assert [line.split()[1].rstrip(":") for line in lines] == sorted(FINE)
    assert loaded == plain


@pytest.mark.parametrize("key", BAD)
def test_a_retired_key_that_asks_for_something_else_is_rejected(key):
    with pytest.raises(ConfigError) as raised:
        load_config(TINY, [*COMMON, f"{key}={BAD[key]}"])
    assert [problem.key for problem in raised.value.problems] == [key]


def test_true_and_one_are_not_the_same_answer():
    for override in ("actor.mcore_gpt=1", "actor.model.context_parallel_size=True"):
        with pytest.raises(ConfigError, match="is supported, found"):
            load_config(TINY, [override])


def test_a_run_of_an_earlier_version_differs_in_no_retired_key():
    old = {"actor": {"mcore_gpt": True, "optim": {"optimizer": "adam"}}, "rollout": {"rollout_backend": "vllm"}}
    assert differences(old, {}) == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("algorithm.kl_in", "both", "'both' is not one of loss, reward"),
        ("actor.model.recompute_granularity", "some", "'some' is not one of None, full, selective"),
        ("evaluation.methods", "[search,rga]", "'rga' is not one of direct, cot, rag, search"),
    ],
)
def test_a_choice_of_the_schema_is_checked_as_a_yaml_is_read(key, value, message):
    with pytest.raises(ConfigError) as raised:
        load_config(TINY, [f"{key}={value}"])
    assert {problem.key: problem.message for problem in raised.value.problems} == {key: message}


def test_choices_are_checked_in_a_configuration_made_in_python():
    config = Config()
    assert list(choice_problems(config)) == []
    config.actor.training_backend = "deepspeed"
    config.algorithm.adv_type = "grpoo"
    config.algorithm.loss_type = "package.module:function"
    assert [key for key, _ in choice_problems(config)] == ["algorithm.adv_type", "actor.training_backend"]


def test_names_of_a_registry_are_choices():
    from searchr1.algorithms.kl import KL_FUNCTIONS

    assert choices_of("algorithm.kl_penalty_type") == tuple(KL_FUNCTIONS)
    assert choices_of("critic.training_backend") == (None, "fsdp", "megatron")
    assert choices_of("runner.max_steps") == ()
