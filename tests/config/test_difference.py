"""What differs between two configurations."""

from __future__ import annotations

import dataclasses
import fnmatch

import pytest

from searchr1.config.difference import HARMLESS, differences, flatten
from searchr1.config.load import known_keys
from searchr1.config.schema import Config
from searchr1.config.schema_reward import LengthPenaltyConfig


def tree(**changes):
    flat = Config()
    for key, value in changes.items():
        *sections, name = key.split("__")
        holder = flat
        for section in sections:
            holder = getattr(holder, section)
        setattr(holder, name, value)
    return dataclasses.asdict(flat)


def told(old, new):
    return [(str(difference), difference.harmless) for difference in differences(old, new)]


def test_equal_trees_do_not_differ():
    assert told(tree(), tree()) == []


@pytest.mark.parametrize(
    ("changes", "text", "harmless"),
    [
        ({"actor__optim__lr": 2e-6}, "actor.optim.lr: 1e-06 -> 2e-06", False),
        ({"algorithm__eval_sampling_params": None}, None, False),
        ({"agentloop__max_new_tokens_per_turn": 64}, "agentloop.max_new_tokens_per_turn: null -> 64", False),
        ({"data__shuffle": False}, "data.shuffle: True -> False", False),
        ({"data__val_data_paths": ["a", "b"]}, "data.val_data_paths: [] -> ['a', 'b']", False),
        ({"reward__weights": {"f1_score": 0.5}}, "reward.weights.f1_score: not set -> 0.5", False),
        ({"rollout__model__model_path": "other"}, "rollout.model.model_path: '' -> other", False),
        ({"runner__max_steps": 9}, "runner.max_steps: -1 -> 9", True),
        ({"actor__group_name": "A"}, "actor.group_name: ActorGroup -> A", True),
        ({"tools__search__server_addr": ["a:1", "b:2"]}, "tools.search.server_addr: 127.0.0.1:8000 -> ['a:1', 'b:2']", True),
        ({"vars": {"a": 1}}, "vars.a: not set -> 1", True),
        ({"runner__resume_dir": "auto"}, None, True),
        ({"runner__overwrite": True}, None, True),
    ],
)
def test_each_change_is_one_line_with_both_values(changes, text, harmless):
    assert told(tree(), tree(**changes)) == ([(text, harmless)] if text else [])


def test_a_section_that_was_null_is_compared_key_by_key():
    changed = tree(reward__length_penalty=LengthPenaltyConfig(max_length=100))
    keys = ["max_length", "overlong_buffer", "penalty_factor", "tokens"]
    assert [d.key for d in differences(tree(), changed)] == [f"reward.length_penalty.{key}" for key in keys]
    assert [d.key for d in differences(changed, tree())] == [f"reward.length_penalty.{key}" for key in keys]
    assert str(differences(changed, tree())[0]) == "reward.length_penalty.max_length: 100 -> not set"


def test_a_key_that_an_older_version_did_not_know_counts_as_its_default():
    old = tree()
    del old["algorithm"]["gamma"], old["runner"]["health"]
    assert told(old, tree()) == []
    assert told(old, tree(algorithm__gamma=0.9)) == [("algorithm.gamma: 1.0 -> 0.9", False)]
    assert told(old | {"gone": {"key": "", "other": None}}, tree()) == []
    assert told(old | {"gone": {"key": 3}}, tree()) == [("gone.key: 3 -> not set", False)]


@pytest.mark.parametrize(
    "schedule", [{"lr_decay_style": "cosine"}, {"lr_decay_style": "linear"}, {"lr_warmup_fraction": 0.1}]
)
@pytest.mark.parametrize("part", ["actor", "critic"])
def test_the_length_of_a_run_is_no_harmless_change_where_rates_follow_it(schedule, part):
    changes = {f"{part}__lr_sched__{name}": value for name, value in schedule.items()}
    old, new = tree(**changes, runner__max_steps=10), tree(**changes, runner__max_steps=20)
    assert told(old, new) == [("runner.max_steps: 10 -> 20", False)]
    fixed = {f"{part}__lr_sched__lr_decay_iters": 10}
    old, new = tree(**changes, **fixed, runner__max_steps=10), tree(**changes, **fixed, runner__max_steps=20)
    assert told(old, new) == [("runner.max_steps: 10 -> 20", True)]


def test_true_is_not_one_and_long_values_are_cut():
    assert told({"a": {"b": True}}, {"a": {"b": 1}}) == [("a.b: True -> 1", False)]
    ((line, _),) = told({"a": ""}, {"a": "x\n" * 500})
    assert len(line) < 200
    assert line.startswith("a: '' -> 'x\\nx")
    assert line.endswith("… (1502 characters)")


def test_every_harmless_key_exists():
    keys = list(known_keys())
    free = ("vars.*", "cluster.component_placement.*")
    assert [p for p in HARMLESS if p not in free and not any(fnmatch.fnmatchcase(key, p) for key in keys)] == []


def test_flat_keys():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "d": [1]}
