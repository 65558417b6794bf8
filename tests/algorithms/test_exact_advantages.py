"""Every advantage against the formulas of oracles.py in float64, and what must change nothing."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracles

from searchr1.agent.trajectory import Sample, Trajectory, Turn
from searchr1.algorithms.advantages import ADVANTAGES, AdvantageInputs, AdvantageSettings, compute_advantages
from searchr1.algorithms.advantages.gae import gae, whiten_tokens
from searchr1.config.schema import AlgorithmConfig
from searchr1.learner.packing import pack
from searchr1.training import advantages as training_advantages
from searchr1.training.advantages import compute_token_advantages

Batch = tuple[list[float], list[int], list[int]]
"""Rewards, groups and policy tokens of each attempt."""


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    groups = [group * 3 + 5 for group, size in enumerate(sizes) for _ in range(size)]
    # Thousandths: what is equal is equal whatever the order of the sums.
    rewards = draw(
        st.lists(st.integers(-3000, 3000) | st.sampled_from([0, 1000]), min_size=len(groups), max_size=len(groups))
    )
    tokens = draw(st.lists(st.integers(0, 9), min_size=len(groups), max_size=len(groups)))
    return [reward / 1000 for reward in rewards], groups, tokens


def computed(name: str, batch: Batch, normalize: bool = False, dtype: torch.dtype = torch.float64) -> list[float]:
    rewards, groups, tokens = batch
    inputs = AdvantageInputs(torch.tensor(rewards, dtype=dtype), torch.tensor(groups), torch.tensor(tokens))
    found = compute_advantages(inputs, AdvantageSettings(name, normalize))
    assert found.dtype == dtype
    return found.tolist()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", sorted(ADVANTAGES))
@settings(max_examples=25)
@given(batch=batches(), seed=st.integers(0, 2**31))
def test_equal_to_the_formula_in_any_order_and_under_any_numbers_of_groups(
    name: str, normalize: bool, batch: Batch, seed: int
) -> None:
    expected = oracles.advantages(name, *batch, normalize=normalize)
    assert_equal(computed(name, batch, normalize), expected, batch[2])
    order = random.Random(seed).sample(range(len(expected)), len(expected))
    rewards, groups, tokens = ([column[i] for i in order] for column in batch)
    moved = computed(name, (rewards, [-7 * group for group in groups], tokens), normalize)
    assert_equal(moved, [expected[i] for i in order], tokens)


def assert_equal(found: list[float], expected: list[float], tokens: list[int]) -> None:
    """Of attempts that have tokens: others have no part in the spread that whitening divides by, which may be 0 + 1e-6.

    Where all are equal, that makes the last bit of a mean 4e-10.
    """
    pairs = [(a, b) for a, b, count in zip(found, expected, tokens, strict=True) if count]
    assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=1e-10, abs=1e-9)


def test_the_formulas_are_those_of_all_names() -> None:
    assert set(oracles.PER_ATTEMPT) == set(ADVANTAGES)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_low_precision_rewards_are_worked_out_in_float64(name: str) -> None:
    """300 attempts at one question: bf16 can neither count them nor add up their rewards."""
    batch = ([float(i % 3 == 0) for i in range(300)], [1] * 300, [3] * 300)
    assert computed(name, batch, dtype=torch.bfloat16) == pytest.approx(computed(name, batch), rel=1e-2, abs=1e-4)


def attempt(group: int, rollout_id: int, reward: float, shape: list[tuple[int, int, bool]], seed: int = 0) -> Trajectory:
    """Of turns (policy tokens, tool tokens, whether it found the answer)."""
    rng = np.random.default_rng([seed, group, rollout_id])
    policy_tokens = sum(policy for policy, _, _ in shape)
    # Drawn for policy tokens alone, so that the environment's can be changed without changing them.
    sampled, reference = -rng.exponential(1.0, policy_tokens), 0.3 * rng.normal(size=policy_tokens)
    mask = np.concatenate([np.zeros(0, bool), *(np.repeat([True, False], [policy, tool]) for policy, tool, _ in shape)])
    logprobs, ref = np.zeros(len(mask), np.float32), np.full(len(mask), np.nan, np.float32)
    logprobs[mask], ref[mask] = sampled, sampled + reference
    return Trajectory(
        sample=Sample(f"s/{group}", group, [1, 2], "?", ["Paris"]),
        rollout_id=rollout_id,
        response_ids=np.arange(len(mask), dtype=np.int32),
        loss_mask=mask,
        rollout_logprobs=logprobs,
        turns=[
            Turn("x", "search" if tool else "answer", policy, ["q"] if tool else [], "Paris" if hit else "Rome", tool)
            for policy, tool, hit in shape
        ],
        stop="answer",
        reward=reward,
        ref_logprobs=ref,
    )


attempts = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from([0.0, 0.2, 1.0]),
        st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4), st.booleans()), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=9,
)
Plan = list[tuple[int, float, list[tuple[int, int, bool]]]]


def build(plan: Plan, tool_tokens: int = 1) -> list[Trajectory]:
    """`tool_tokens` times as many tokens of the environment; the last turn has none."""
    found = []
    for rollout_id, (group, reward, turns) in enumerate(plan):
        shape = [(p, tool * tool_tokens * (k < len(turns) - 1), hit) for k, (p, tool, hit) in enumerate(turns)]
        found.append(attempt(group, rollout_id, reward, shape))
    return found


def kl_of(trajectory: Trajectory, name: str) -> list[float]:
    policy = trajectory.loss_mask
    assert trajectory.ref_logprobs is not None
    pairs = zip(trajectory.rollout_logprobs[policy].tolist(), trajectory.ref_logprobs[policy].tolist(), strict=True)
    return [oracles.kl_term(sampled - reference, name)[0] for sampled, reference in pairs]


def token_rewards(trajectory: Trajectory, algorithm: AlgorithmConfig) -> list[float]:
    """Of each policy token, the reward on the last; of an attempt without any, its reward alone."""
    taken = [algorithm.kl_beta * kl for kl in kl_of(trajectory, algorithm.kl_penalty_type)]
    rewards = [-kl if algorithm.kl_in == "reward" else 0.0 for kl in taken] or [0.0]
    return [*rewards[:-1], rewards[-1] + trajectory.reward]


def expected_credit(trajectories: list[Trajectory], algorithm: AlgorithmConfig) -> list[list[float]]:
    """Of each policy token of each trajectory."""
    groups, tokens = [t.sample.index for t in trajectories], [t.policy_length for t in trajectories]
    rewards = [sum(token_rewards(t, algorithm)) for t in trajectories]
    whole = oracles.advantages(algorithm.adv_type, rewards, groups, tokens, algorithm.normalize_advantages)
    turns = [[float(turn.tool_text == "Paris" and bool(turn.queries)) for turn in t.turns] for t in trajectories]
    weight = algorithm.turn_reward_weight if algorithm.advantage_mode == "turn" else 0.0
    per_turn = oracles.turn_advantages(whole, turns, groups, weight)
    return [
        [value for turn, value in zip(t.turns, values, strict=True) for _ in range(turn.policy_tokens)]
        for t, values in zip(trajectories, per_turn, strict=True)
    ]


def trained_on(trajectories: list[Trajectory], credit: list) -> list[list[float]]:
    """What the loss sees at each trajectory's policy tokens, out of the packed row; everything else must be 0."""
    (batch,) = pack(trajectories, 10_000, advantages=credit)
    assert not bool(batch.advantages_T[~batch.loss_mask_T].any())
    found = {s.index: batch.advantages_T[s.response][batch.loss_mask_T[s.response]].tolist() for s in batch.sequences}
    return [found[i] for i in range(len(trajectories))]


@pytest.mark.parametrize("mode", ["trajectory", "turn"])
@pytest.mark.parametrize("name", sorted(ADVANTAGES))
@settings(max_examples=10)
@given(plan=attempts, kl_in=st.sampled_from(["loss", "reward"]), seed=st.integers(0, 2**31))
def test_credit_reaches_policy_tokens_alone_and_ignores_what_the_environment_wrote(
    name: str, mode: str, plan: Plan, kl_in: str, seed: int
) -> None:
    algorithm = AlgorithmConfig(
        adv_type=name, kl_in=kl_in, kl_beta=0.1, kl_penalty_type="k1", advantage_mode=mode, turn_reward_weight=0.7
    )
    trajectories = build(plan)
    expected = expected_credit(trajectories, algorithm)
    order = random.Random(seed).sample(range(len(plan)), len(plan))
    shuffled, longer = [trajectories[i] for i in order], build(plan, tool_tokens=3)
    found = trained_on(trajectories, training_advantages.compute_advantages(trajectories, algorithm))
    assert [
        trained_on(shuffled, training_advantages.compute_advantages(shuffled, algorithm))[order.index(i)]
        for i in range(len(plan))
    ] == [pytest.approx(values, abs=1e-6) for values in found]
    assert trained_on(longer, training_advantages.compute_advantages(longer, algorithm)) == found
    # Packed advantages are fp32.
    assert found == [pytest.approx(values, rel=1e-6, abs=1e-6) for values in expected]


@pytest.mark.parametrize("normalize", [False, True])
@settings(max_examples=30)
@given(plan=attempts, gamma=st.sampled_from([1.0, 0.9]), lam=st.sampled_from([1.0, 0.95, 0.0]), seed=st.integers(0, 2**31))
def test_gae_is_the_definition_over_policy_tokens(normalize: bool, plan: Plan, gamma: float, lam: float, seed: int) -> None:
    algorithm = AlgorithmConfig(
        adv_type="gae", gamma=gamma, gae_lambda=lam, kl_in="reward", kl_beta=0.1, normalize_advantages=normalize
    )
    rng = np.random.default_rng(seed)
    trajectories, longer = build(plan), build(plan, tool_tokens=2)
    values = [rng.normal(size=t.policy_length).astype(np.float32) for t in trajectories]

    def aligned(one: list[Trajectory]) -> list[np.ndarray]:
        """The critic's values at policy tokens, and what must not be looked at elsewhere."""
        found = [np.full(t.response_length, np.nan, np.float32) for t in one]
        for array, t, given_values in zip(found, one, values, strict=True):
            array[t.loss_mask] = given_values
        return found

    pairs = [
        oracles.gae(token_rewards(t, algorithm)[: t.policy_length], v.tolist(), gamma, lam)
        for t, v in zip(trajectories, values, strict=True)
    ]
    advantages = [pair[0] for pair in pairs]
    rewards = [np.array(token_rewards(t, algorithm)[: t.policy_length]) for t in trajectories]
    exact, _ = gae(rewards, [v.astype(np.float64) for v in values], gamma, lam)
    assert [list(one) for one in exact] == [pytest.approx(one, rel=1e-10, abs=1e-10) for one in advantages]
    if normalize:
        flat = oracles.whiten([a for one in advantages for a in one], [1] * sum(map(len, advantages)))
        advantages = [[flat.pop(0) for _ in one] for one in advantages]
        white = whiten_tokens(exact)
        assert [list(one) for one in white] == [pytest.approx(one, rel=1e-10, abs=1e-10) for one in advantages]
    for one in (trajectories, longer):
        found, targets = compute_token_advantages(one, algorithm, aligned(one))
        for t, advantage, target, expected, pair in zip(one, found, targets, advantages, pairs, strict=True):
            assert advantage[t.loss_mask].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
            assert target[t.loss_mask].tolist() == pytest.approx(pair[1], rel=1e-6, abs=1e-6)
            assert not advantage[~t.loss_mask].any()
            assert not target[~t.loss_mask].any()
