"""Limits on a step's metrics: which steps break them, when a run is stopped, and what it is told to go on from."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1.agent.trajectory import Sample, Trajectory
from searchr1.checkpoints.manifest import checkpoint_steps
from searchr1.config.load import load_config
from searchr1.config.schema import Config
from searchr1.config.schema_reward import HealthConfig
from searchr1.errors import UserError
from searchr1.preflight.check import check_config
from searchr1.tracking.loggers import read_metrics
from searchr1.tracking.metrics import step_metrics
from searchr1.training.health import RULES, Health, examine

ROOT = Path(__file__).resolve().parents[2]
USUAL = {
    "reward/mean": 0.6,
    "rollout/entropy": 0.2,
    "rollout/policy_tokens": 120.0,
    "rollout/truncated": 0.05,
    "rollout/invalid_rate": 0.1,
    "rollout/uniform_groups": 0.4,
    "mismatch/kl_k3": 1e-4,
    "mismatch/effective_sample_size": 0.99,
    "actor/grad_norm": 0.5,
    "actor/updates": 2.0,
    "actor/skipped_updates": 0.0,
    "actor/early_stopped": 0.0,
}
BROKEN = {
    "entropy_min": {"rollout/entropy": 0.001},
    "entropy_max": {"rollout/entropy": 6.0},
    "length_ratio_max": {"rollout/policy_tokens": 400.0},
    "length_ratio_min": {"rollout/policy_tokens": 20.0},
    "truncated_max": {"rollout/truncated": 0.95},
    "invalid_max": {"rollout/invalid_rate": 0.7},
    "mismatch_kl_max": {"mismatch/kl_k3": 0.2},
    "effective_sample_size_min": {"mismatch/effective_sample_size": 0.3},
    "grad_norm_ratio_max": {"actor/grad_norm": 30.0},
    "skipped_max": {"actor/updates": 0.0, "actor/skipped_updates": 2.0, "actor/grad_norm": math.nan},
    "uniform_groups_max": {"rollout/uniform_groups": 1.0},
}
"""What breaks one limit and no other. The reward's needs several steps and has a test of its own."""


def keys(violations):
    return {violation.rule.key for violation in violations}


def config(**health):
    made = Config()
    made.actor.optim.lr = 1e-5
    made.runner.health = HealthConfig(**health)
    return made


def run(health, rows, first=1):
    """Put rows through; returns the step that the run was stopped at, or None, and the message."""
    for step, row in enumerate(rows, start=first):
        try:
            health.check(step, row)
        except UserError as error:
            return step, str(error)
    return None, ""


def test_every_limit_has_a_watch():
    limits = {field.name for field in fields(HealthConfig) if field.name.endswith(("_min", "_max"))}
    assert limits == {rule.key for rule in RULES} == {*BROKEN, "reward_ratio_min"}


@pytest.mark.parametrize("key", BROKEN)
def test_a_broken_limit_is_reported_alone(key):
    past = [USUAL] * 8
    assert examine(past, USUAL, HealthConfig()) == []
    [violation] = examine(past, USUAL | BROKEN[key], HealthConfig())
    assert violation.rule.key == key
    limit = getattr(HealthConfig(), key)
    metric = "actor/skipped_updates" if key == "skipped_max" else next(iter(BROKEN[key]))
    assert re.match(rf"{metric}\b.* is [\d.e+]+, (above|below) runner\.health\.{key}={limit:g}; helps: ", str(violation))
    assert examine(past, USUAL | BROKEN[key], HealthConfig(**{key: None})) == []


@pytest.mark.parametrize("metric", sorted(set(USUAL) - {"actor/updates", "actor/skipped_updates", "actor/early_stopped"}))
@pytest.mark.parametrize("value", [math.nan, math.inf, None])
@pytest.mark.parametrize("past", [[], [USUAL] * 8])
def test_a_number_that_is_not_finite_is_unhealthy_from_the_first_step_on(metric, value, past):
    violations = examine(past, USUAL | {metric: value}, HealthConfig())
    assert violations
    assert all("no finite number" in str(violation) and metric in str(violation) for violation in violations)


def test_metrics_that_were_not_measured_are_not_missed():
    assert examine([], {"reward/mean": 0.1}, HealthConfig()) == []


@pytest.mark.parametrize("key", ["truncated_max", "invalid_max", "uniform_groups_max", "entropy_min", "entropy_max"])
def test_what_the_model_never_did_well_is_no_collapse(key):
    unlearned = USUAL | BROKEN[key]
    assert examine([unlearned] * 8, unlearned, HealthConfig()) == []
    assert keys(examine([unlearned] * 4 + [USUAL] + [unlearned] * 4, unlearned, HealthConfig())) == {key}


def test_without_history_nothing_is_compared_with_what_is_usual():
    exploded = USUAL | BROKEN["length_ratio_max"] | BROKEN["grad_norm_ratio_max"]
    for count in range(5):
        assert examine([USUAL] * count, exploded, HealthConfig()) == []
    assert keys(examine([USUAL] * 5, exploded, HealthConfig())) == {"length_ratio_max", "grad_norm_ratio_max"}


def test_a_step_without_an_update_has_no_gradient_norm():
    stopped = USUAL | {"actor/updates": 0.0, "actor/early_stopped": 2.0, "actor/grad_norm": math.nan}
    assert examine([USUAL] * 8, stopped, HealthConfig()) == []


def test_the_reward_is_compared_with_its_best_five_steps():
    rewards = [0.1, 0.2, 0.4, 0.8, 0.8, 0.8, 0.8, 0.8, 0.0, 0.0, 0.0]
    # The last five are 0.8, 0.8, 0.0, 0.0 and the step's; their mean over 0.8 against the limit 0.4.
    past = [USUAL | {"reward/mean": reward} for reward in rewards[:-1]]
    assert examine(past, USUAL | {"reward/mean": 0.01}, HealthConfig()) == []
    [violation] = examine([*past, USUAL | {"reward/mean": 0.0}], USUAL | {"reward/mean": 0.0}, HealthConfig())
    assert violation.rule.key == "reward_ratio_min"
    assert violation.value == pytest.approx(0.2)


def test_rewards_that_were_never_above_zero_have_no_best():
    low = USUAL | {"reward/mean": -1.0}
    assert examine([USUAL | {"reward/mean": -0.1}] * 8, low, HealthConfig()) == []


def test_the_demo_is_healthy():
    """40 steps of ./run.sh's training, measured."""
    rows = read_metrics(Path(__file__).with_name("healthy_demo.jsonl"))
    assert len(rows) == 40
    health = Health(config(patience=1), Path("unused"))
    assert run(health, rows) == (None, "")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.booleans(), max_size=40), st.integers(1, 6), st.integers(0, 8))
def test_it_stops_at_the_first_so_many_unhealthy_steps_in_a_row(unhealthy, patience, healthy_first):
    flags = [False] * healthy_first + unhealthy
    # Mismatch needs no history, so every unhealthy row counts.
    rows = [USUAL | (BROKEN["mismatch_kl_max"] if flag else {}) for flag in flags]
    stopped, message = run(Health(config(patience=patience), Path("none")), rows)
    at = "".join("x" if flag else "." for flag in flags).find("x" * patience)
    assert stopped == (None if at < 0 else at + patience)
    assert at < 0 or f"steps {at + 1} to {at + patience} were unhealthy" in message
    assert run(Health(config(patience=patience, warn_only=True), Path("none")), rows) == (None, "")


def test_different_symptoms_in_a_row_count_together():
    rows = [USUAL] * 8 + [USUAL | BROKEN[key] for key in ("invalid_max", "grad_norm_ratio_max", "mismatch_kl_max")]
    assert run(Health(config(patience=3), Path("none")), rows)[0] == 11


def test_an_exploded_length_does_not_become_usual(caplog):
    rows = [USUAL] * 8 + [USUAL | BROKEN["length_ratio_max"]] * 60
    run(Health(config(warn_only=True), Path("none")), rows)
    told = [record.message for record in caplog.records]
    assert len(told) == 60
    assert told[0].startswith(
        "step 9 is unhealthy (1 in a row): rollout/policy_tokens divided by its running median is 3.333"
    )
    assert told[-1].startswith("step 68 is unhealthy (60 in a row)")


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_resumed_run_decides_as_one_that_was_never_stopped(tmp_path_factory, data):
    kinds = st.sampled_from([{}, {}, {}, *BROKEN.values(), {"reward/mean": 0.0}])
    rows = [USUAL | change for change in data.draw(st.lists(kinds, min_size=1, max_size=30))]
    split = data.draw(st.integers(0, len(rows)))
    made = config(patience=3)
    folder = tmp_path_factory.mktemp("run")
    lines = []
    for step, row in enumerate(rows, start=1):
        # As JsonlLogger writes them, with an evaluation after each, and rows after the checkpoint.
        values = {name: value if math.isfinite(value) else None for name, value in row.items()}
        lines += [{"step": step, **values}, {"step": step, "val/exact_match": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole = Health(made, folder / "checkpoints")
    stopped, _ = run(whole, rows)
    if stopped is not None and stopped <= split:
        return  # no run goes on from there
    resumed = Health.open(made, folder, folder / f"checkpoints/global_step_{split}", split)
    assert run(resumed, rows[split:], first=split + 1)[0] == stopped


def test_a_run_that_goes_on_elsewhere_without_metrics_starts_over(tmp_path):
    checkpoint = tmp_path / "copied/global_step_30"
    health = Health.open(config(patience=1), tmp_path / "new", checkpoint, 30)
    # Far from anything usual, but there is nothing to compare with.
    assert run(health, [USUAL | {"rollout/policy_tokens": 4000.0}] * 9, first=31) == (None, "")


def checkpoints(tmp_path, *steps):
    for step in steps:
        folder = tmp_path / f"checkpoints/global_step_{step}"
        folder.mkdir(parents=True)
        (folder / "sizes.json").write_text("{}")
    return tmp_path / "checkpoints"


def test_the_stop_message_names_the_checkpoint_and_the_overrides(tmp_path):
    root = checkpoints(tmp_path, 2, 4, 6)
    made = config(patience=3)
    stopped, message = run(Health(made, root), [USUAL] * 8 + [USUAL | BROKEN["invalid_max"]] * 3)
    assert stopped == 11
    assert "runner.health: stopped, because steps 9 to 11 were unhealthy" in message
    assert "rollout/invalid_rate is 0.7, above runner.health.invalid_max=0.5" in message
    assert f"runner.resume_dir={root / 'global_step_6'} actor.optim.lr=5e-06" in message
    assert checkpoint_steps(root) == [2, 4, 6]


def test_overrides_of_the_stop_message_are_a_valid_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("SEARCHR1_DEMO_DIR", str(tmp_path))
    path = ROOT / "examples/searchr1/config/tiny-cpu.yaml"
    made = load_config(path, ["runner.health.patience=1"])
    root = checkpoints(tmp_path, 3)
    _, message = run(Health(made, root), [USUAL] * 8 + [USUAL | BROKEN["invalid_max"]])
    [line] = [line for line in message.splitlines() if line.startswith("  runner.resume_dir=")]
    again = load_config(path, line.split())
    assert again.runner.resume_dir == str(root / "global_step_3")
    assert again.actor.optim.lr == made.actor.optim.lr / 2


def test_the_weights_that_the_first_unhealthy_step_ran_with_are_put_aside(tmp_path):
    root = checkpoints(tmp_path, 2, 8)
    _, message = run(Health(config(patience=2), root), [USUAL] * 8 + [USUAL | BROKEN["invalid_max"]] * 2)
    assert checkpoint_steps(root) == [2], "runner.resume_dir=auto must not take step 8's"
    assert (root / "suspect_step_8").is_dir()
    assert "global_step_8 holds the weights that step 9 ran with and is now suspect_step_8" in message
    assert f"runner.resume_dir={root / 'global_step_2'} " in message


def test_stopping_twice_at_the_same_step_leaves_one_suspect(tmp_path):
    for _ in range(2):
        root = checkpoints(tmp_path, 8)
        _, message = run(Health(config(patience=1), root), [USUAL] * 8 + [USUAL | BROKEN["invalid_max"]])
        assert "is now suspect_step_8" in message
    assert [folder.name for folder in root.iterdir()] == ["suspect_step_8"]


def test_unhealthy_checkpoints_that_were_asked_for_are_not_called_good(tmp_path):
    root = checkpoints(tmp_path, 2, 8, 9, 10)
    made = config(patience=2, save_unhealthy=True)
    _, message = run(Health(made, root), [USUAL] * 8 + [USUAL | BROKEN["invalid_max"]] * 2)
    assert checkpoint_steps(root) == [2, 8, 9, 10]
    assert f"runner.resume_dir={root / 'global_step_2'} " in message


def test_without_a_good_checkpoint_the_stop_message_says_start_again(tmp_path):
    _, message = run(Health(config(patience=1), tmp_path / "none"), [USUAL | BROKEN["mismatch_kl_max"]])
    assert "There is no checkpoint from before that" in message
    assert "runner.overwrite=True actor.optim.lr=5e-06" in message
    assert "resume_dir" not in message


def test_a_checkpoint_due_at_an_unhealthy_step_is_left_out_and_reported(caplog):
    health = Health(config(patience=9), Path("none"))
    run(health, [USUAL] * 3)
    assert health.allows_saving(3)
    health.check(4, USUAL | BROKEN["mismatch_kl_max"])
    assert not health.allows_saving(4)
    assert caplog.messages[-1].startswith("step 4 is unhealthy: its checkpoint is left out")
    health.check(5, USUAL)
    assert health.allows_saving(5)
    asked = Health(config(patience=9, save_unhealthy=True), Path("none"))
    asked.check(4, USUAL | BROKEN["mismatch_kl_max"])
    assert asked.allows_saving(4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patience", 0), ("window", 0), ("window", 4), ("min_history", 0), ("invalid_max", 1.0), ("truncated_max", -0.1),
        ("uniform_groups_max", 1.5), ("skipped_max", 1.0), ("length_ratio_max", 1.0), ("grad_norm_ratio_max", 0.5),
        ("length_ratio_min", 1.0), ("reward_ratio_min", 0.0), ("effective_sample_size_min", 1.0), ("entropy_max", 0.001),
        ("entropy_max", 0.005), ("entropy_min", -0.1), ("mismatch_kl_max", 0.0),
    ],
)  # fmt: skip
def test_limits_that_cannot_be_meant_are_rejected(key, value):
    assert not [problem for problem in check_config(config(), False) if problem.key.startswith("runner.health")]
    problems = [p for p in check_config(config(**{key: value}), False) if p.key.startswith("runner.health")]
    assert {problem.key for problem in problems} == {f"runner.health.{'entropy_max' if key == 'entropy_min' else key}"}


def test_every_limit_can_be_turned_off():
    off = {rule.key: None for rule in RULES}
    assert not [problem for problem in check_config(config(**off), False) if problem.key.startswith("runner.health")]
    for change in BROKEN.values():
        assert examine([USUAL] * 8, USUAL | change, HealthConfig(**off)) == []


def test_entropy_is_that_of_the_sampled_tokens_of_all_trajectories():
    def make(logprobs, mask):
        return Trajectory(
            sample=Sample("s/0", 0, [1], "", []),
            rollout_id=0,
            response_ids=np.ones(len(mask), dtype=np.int32),
            loss_mask=np.array(mask),
            rollout_logprobs=np.array(logprobs, dtype=np.float32),
            turns=[],
            stop="answer",
        )

    found = step_metrics([make([-1.0, -2.0, 0.0], [True, True, False]), make([-6.0], [True])])
    assert found["rollout/entropy"] == pytest.approx(3.0)
    assert step_metrics([make([0.0], [False])])["rollout/entropy"] == 0.0


def test_the_page_lists_every_limit_with_its_default():
    page = (ROOT / "docs/guides/health.md").read_text()
    rows = dict(re.findall(r"^\| [^|]+ \| `([a-z_]+)` \| ([^|]+) \|", page, flags=re.MULTILINE))
    defaults = {field.name: field.default for field in fields(HealthConfig)}
    assert {name: json.loads(value.lower()) for name, value in rows.items()} == defaults
