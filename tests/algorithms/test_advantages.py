"""Advantages: known values, and what is refused (formulas: test_exact_advantages.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from searchr1.algorithms.advantages import ADVANTAGES, AdvantageInputs, AdvantageSettings, compute_advantages
from searchr1.config.choices import choices_of
from searchr1.errors import UserError


def advantages(rewards: list[float], groups: list[int], tokens: list[int] | None = None, **settings: object) -> np.ndarray:
    inputs = AdvantageInputs(
        rewards_N=torch.tensor(rewards, dtype=torch.float64),
        group_ids_N=torch.tensor(groups),
        policy_tokens_N=torch.tensor(tokens or [1] * len(rewards)),
    )
    result_N = compute_advantages(inputs, AdvantageSettings(**settings))  # type: ignore[arg-type]
    assert result_N.dtype == torch.float64
    return result_N.numpy()


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[float], list[int]]:
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    groups = [group * 3 + 5 for group, size in enumerate(sizes) for _ in range(size)]
    rewards = draw(st.lists(st.floats(-4, 4), min_size=len(groups), max_size=len(groups)))
    return rewards, groups


def by_hand(rewards: list[float], groups: list[int]) -> np.ndarray:
    result = np.zeros(len(rewards))
    for group in set(groups):
        members = [index for index, found in enumerate(groups) if found == group]
        values = np.array([rewards[index] for index in members])
        if len(values) > 1 and values.min() != values.max():
            result[members] = (values - values.mean()) / (values.std(ddof=1) + 1e-6)
    return result


def test_known_values() -> None:
    found = advantages([1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1])
    np.testing.assert_allclose(found, [1.5, -0.5, -0.5, -0.5, 0, 0], atol=1e-5)


def test_no_spread_and_singletons_are_exactly_zero() -> None:
    assert (advantages([0.1, 0.1, 0.1, 0.7], [4, 4, 4, 9]) == 0).all()


@given(batches(), st.floats(-10, 10), st.sampled_from([0.5, 2.0, 16.0]))
def test_a_shift_changes_nothing_and_a_scale_hardly(
    batch: tuple[list[float], list[int]], shift: float, scale: float
) -> None:
    # Multiples of 1/8 keep equal rewards equal after the shift.
    rewards = [round(reward * 8) / 8 for reward in batch[0]]
    shift = round(shift * 8) / 8
    plain = advantages(rewards, batch[1])
    np.testing.assert_allclose(advantages([r + shift for r in rewards], batch[1]), plain, atol=1e-9)
    np.testing.assert_allclose(advantages([r * scale for r in rewards], batch[1]), plain, atol=1e-3)


def test_normalisation_weighs_tokens() -> None:
    rewards, groups, tokens = [1.0, 0.0, 0.0, 1.0, 0.5], [0, 0, 0, 1, 1], [7, 1, 3, 2, 9]
    found = advantages(rewards, groups, tokens, normalize=True)
    per_token = np.repeat(by_hand(rewards, groups), tokens)
    expected = (by_hand(rewards, groups) - per_token.mean()) / (per_token.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (advantages([1, 1], [0, 0], [3, 4], normalize=True) == 0).all()


def test_grpo_dynamic_is_grpo_for_whole_trajectories() -> None:
    rewards, groups = [1.0, 0.0, 0.25, 1.0], [0, 0, 0, 0]
    scales = ["group_level", "agent_level", "turn_level"]
    for count in range(4):
        found = advantages(rewards, groups, adv_type="grpo_dynamic", loss_scales=scales[:count])
        assert (found == advantages(rewards, groups)).all()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"adv_type": "gae_2"}, "algorithm.adv_type"),
        ({"adv_type": "grpo_dynamic", "mode": "turn"}, "algorithm.advantage_mode"),
        ({"adv_type": "grpo_dynamic", "loss_scales": ["turn_level"]}, "algorithm.loss_scales"),
        ({"adv_type": "grpo_dynamic", "loss_scales": ["group_level", "nonsense"]}, "algorithm.loss_scales"),
    ],
)
def test_unsupported_settings_name_their_key(settings: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=key):
        advantages([1.0, 0.0], [0, 0], **settings)


def test_a_reward_that_is_not_finite_is_rejected() -> None:
    with pytest.raises(ValueError, match="finite"):
        advantages([1.0, float("nan")], [0, 0])


@pytest.mark.parametrize("name", sorted(set(ADVANTAGES) - {"reinforce++"}))
def test_a_group_without_spread_teaches_nothing(name: str) -> None:
    assert (advantages([0.3, 0.3, 0.3, 1.0], [1, 1, 1, 2], adv_type=name) == 0).all()


def test_the_yaml_knows_every_advantage() -> None:
    assert choices_of("algorithm.adv_type") == (*ADVANTAGES, "gae")  # which needs a critic, and so is no function of rewards
