"""What check-config refuses in the `reward` section."""

from __future__ import annotations

import pytest

from searchr1.config.schema_reward import JudgeConfig, LengthPenaltyConfig, RewardConfig, SearchPenaltyConfig
from searchr1.preflight.check_reward import check_reward

JUDGE = {"base_url": "http://h:1/v1", "model": "m"}


def problems(**values):
    return {problem.key: problem.message for problem in check_reward(RewardConfig(**values), response_limit=100)}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"reward_type": "exact_match_format"},
        {"reward_type": "math:floor"},
        {"weights": {"exact_match": 1, "math:floor": -0.5}, "reward_type": "unused"},
        {"reward_type": "judge", "judge": JudgeConfig(**JUDGE)},
        {"length_penalty": LengthPenaltyConfig(100, 20), "search_penalty": SearchPenaltyConfig(2, 0.1)},
    ],
)
def test_what_is_right_passes(values):
    assert problems(**values) == {}


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"reward_type": "f2"}, {"reward_type"}),
        ({"reward_type": "no_such.module:f"}, {"reward_type"}),
        ({"reward_type": "math:pi"}, {"reward_type"}),
        ({"weights": {"f2": 1.0}}, {"weights"}),
        ({"weights": {"f1_score": "much"}}, {"weights"}),
        ({"weights": {"f1_score": True}}, {"weights"}),
        ({"weights": {"f1_score": float("nan")}}, {"weights"}),
        ({"concurrency": 0}, {"concurrency"}),
        ({"reward_scale": float("inf")}, {"reward_scale"}),
        ({"reward_type": "judge"}, {"judge.base_url", "judge.model"}),
        ({"weights": {"judge": 0}}, {"judge.base_url", "judge.model"}),
        ({"judge": JudgeConfig(base_url="h:1", model="m")}, {"judge.base_url"}),
        ({"judge": JudgeConfig(timeout_s=0, concurrency=0)}, {"judge.timeout_s", "judge.concurrency"}),
        ({"judge": JudgeConfig(**JUDGE, request={"stream": True})}, {"judge.request"}),
        ({"length_penalty": LengthPenaltyConfig()}, {"length_penalty.max_length", "length_penalty.overlong_buffer"}),
        ({"length_penalty": LengthPenaltyConfig(101, 20)}, {"length_penalty.max_length"}),
        ({"length_penalty": LengthPenaltyConfig(50, 51)}, {"length_penalty.overlong_buffer"}),
        ({"length_penalty": LengthPenaltyConfig(50, 5, -1.0)}, {"length_penalty.penalty_factor"}),
        ({"length_penalty": LengthPenaltyConfig(50, 5, tokens="all")}, {"length_penalty.tokens"}),
        (
            {"search_penalty": SearchPenaltyConfig(-1, -0.1)},
            {"search_penalty.free_searches", "search_penalty.per_search"},
        ),
    ],
)
def test_what_is_wrong_is_reported_with_its_key(values, keys):
    assert set(problems(**values)) == {f"reward.{key}" for key in keys}


def test_the_judges_variable_is_named_and_its_value_is_not(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    judge = JudgeConfig(**JUDGE, api_key_env="JUDGE_KEY")
    assert "JUDGE_KEY" in problems(reward_type="judge", judge=judge)["reward.judge.api_key_env"]
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    assert problems(reward_type="judge", judge=judge) == {}
