from __future__ import annotations

import numpy as np
import pytest

from searchr1.agent.trajectory import Turn
from searchr1.evaluation.summary import validation_metrics
from searchr1.tracking.metrics import STEP_METRICS, data_sources, eval_table, step_metrics


def test_a_step_counted_by_hand(make_trajectory):
    lost = make_trajectory(
        index=1,
        right=False,
        stop="length",
        forced_final=True,
        response_ids=np.arange(30, dtype=np.int32),
        loss_mask=np.arange(30) < 6,
        rollout_logprobs=np.where(np.arange(30) < 6, -0.5, 0).astype(np.float32),
        turns=[
            Turn("hm", "invalid", 2),
            Turn("<search>a</search><search>b</search>", "search", 2, ["a", "b"], "…", 12, 1.5, tool_error="no answer"),
            Turn("…", "none", 2),
        ],
    )
    found = step_metrics([make_trajectory(0, 0), make_trajectory(0, 1), make_trajectory(1, 0), lost])
    assert found == pytest.approx(
        {
            "reward/mean": 0.75,
            "reward/std": np.sqrt(3) / 4,
            "reward/exact_match": 0.75,
            "reward/f1": 0.75,
            "rollout/searches": 5 / 4,
            "rollout/turns": 9 / 4,
            "rollout/response_length": 15,
            "rollout/response_length_max": 30,
            "rollout/policy_tokens": 27 / 4,
            "rollout/entropy": 6 * 0.5 / 27,
            "rollout/invalid_rate": 1 / 9,
            "rollout/answered": 0.75,
            "rollout/truncated": 0.25,
            "rollout/failed": 0,
            "rollout/forced_final": 0.25,
            "rollout/uniform_groups": 0.5,
            "tool/calls": 4,
            "tool/failure_rate": 0.25,
            "tool/seconds_p50": 0.5,
            "tool/seconds_p99": 0.5 + 0.97,
        }
    )


def test_every_metric_is_documented(make_trajectory):
    parts = {"reward": 1.0, "exact_match": 1.0, "f1": 1.0}
    assert set(step_metrics([make_trajectory(reward_parts=parts)])) == set(STEP_METRICS)
    assert all(text and text[0].islower() for text in STEP_METRICS.values())


def test_parts_of_a_custom_reward_are_logged(make_trajectory):
    found = step_metrics([make_trajectory(reward_parts={"reward": 2.0, "style": 1.0}), make_trajectory(1)])
    assert found["reward/style"] == 0.5
    assert found["reward/exact_match"] == 0.5


def test_no_tool_calls_and_no_turns_are_no_trouble(make_trajectory):
    found = step_metrics([make_trajectory(turns=[], stop="error")])
    assert found["tool/failure_rate"] == found["tool/seconds_p99"] == found["rollout/invalid_rate"] == 0
    assert found["rollout/failed"] == 1
    assert all(np.isfinite(value) for value in found.values())


def test_an_evaluation_is_reported_per_source_and_in_all(make_trajectory):
    rows = [make_trajectory(i, source="nq", right=i < 1) for i in range(4)]
    rows += [make_trajectory(i, source="org/two", right=True) for i in range(2)]
    found = validation_metrics(rows)
    assert found["val/questions"] == 6
    assert found["val/exact_match"] == 0.5
    assert found["val/nq/questions"] == 4
    assert found["val/nq/exact_match"] == 0.25
    assert found["val/org/two/exact_match"] == 1
    assert found["val/macro/exact_match"] == 0.625
    assert found["val/searches"] == 1
    assert data_sources(found) == ["nq", "org/two"]


def test_the_table_has_a_row_per_source_and_one_for_all(make_trajectory):
    rows = [make_trajectory(0, source="a_very_long_name_of_a_source", right=False), make_trajectory(1, source="nq")]
    head, *body = eval_table(validation_metrics(rows)).splitlines()
    assert head.split()[:2] == ["questions", "exact_match"]
    assert [line.split()[:3] for line in body] == [
        ["a_very_long_name_of_a_source", "1", "0.000"],
        ["nq", "1", "1.000"],
        ["all", "2", "0.500"],
    ]
    assert len({len(line) for line in body}) == 1
