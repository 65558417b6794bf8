"""Advantages of whole trajectories, of turns, and with the KL in the reward; refilled batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from searchr1.agent.trajectory import Sample, Trajectory, Turn
from searchr1.algorithms.advantages.turn import turn_advantages
from searchr1.cluster.collect import Batch, RolloutStats
from searchr1.config.schema import AlgorithmConfig
from searchr1.learner.packing import pack
from searchr1.training.advantages import compute_advantages, compute_token_advantages, evidence_rewards, token_kl
from searchr1.training.dynamic_sampling import replace_uniform_groups


def make(index, rollout_id, reward, turns=((3, 2, "nothing"), (4, 0, "")), golds=("Paris",), seed=0):
    """A trajectory of turns (policy tokens, tool tokens, tool text)."""
    rng = np.random.default_rng([seed, index, rollout_id])
    mask = np.concatenate([np.repeat([True, False], [policy, tool]) for policy, tool, _ in turns])
    logprobs = np.where(mask, -rng.exponential(1.0, len(mask)), 0).astype(np.float32)
    return Trajectory(
        sample=Sample(f"s/{index}", index, [1, 2], "?", list(golds)),
        rollout_id=rollout_id,
        response_ids=rng.integers(0, 50, len(mask)).astype(np.int32),
        loss_mask=mask,
        rollout_logprobs=logprobs,
        turns=[
            Turn("x", "search" if text else "answer", policy, ["q"] if text else [], text, tool)
            for policy, tool, text in turns
        ],
        stop="answer",
        reward=reward,
        ref_logprobs=np.where(mask, logprobs + 0.3 * rng.normal(size=len(mask)), 0).astype(np.float32),
    )


def test_the_kl_is_taken_from_the_reward_before_groups_are_compared():
    trajectories = [make(0, rollout_id, reward) for rollout_id, reward in enumerate([1.0, 0.0, 1.0, 0.0])]
    for name, estimate in (("k1", lambda d: d), ("k2", lambda d: d**2 / 2), ("abs", np.abs)):
        algorithm = AlgorithmConfig(adv_type="rloo", kl_in="reward", kl_beta=0.05, kl_penalty_type=name)
        divergences = []
        for t in trajectories:
            d = (t.rollout_logprobs.astype(np.float64) - t.ref_logprobs)[t.loss_mask]
            divergences.append(estimate(d).sum())
            assert token_kl(t, name).sum() == pytest.approx(divergences[-1], abs=1e-12)
        rewards = np.array([1.0, 0.0, 1.0, 0.0]) - 0.05 * np.array(divergences)
        expected = rewards - (rewards.sum() - rewards) / 3
        assert np.allclose(compute_advantages(trajectories, algorithm), expected, atol=1e-12)
    without = compute_advantages(trajectories, AlgorithmConfig(adv_type="rloo", kl_in="loss", kl_beta=0.05))
    assert np.allclose(without, [2 / 3, -2 / 3, 2 / 3, -2 / 3])
    trajectories[0].ref_logprobs = None
    with pytest.raises(ValueError, match="no reference"):
        compute_advantages(trajectories, algorithm)


def test_a_turn_is_credited_for_what_it_found():
    """Both attempts fail; the one whose search found the evidence gets credit for that turn's tokens, and nothing else."""
    found = make(0, 0, 0.0, ((3, 2, "Paris is the capital"), (4, 0, "")))
    missed = make(0, 1, 0.0, ((5, 1, "Rome"), (2, 0, "")))
    assert evidence_rewards(found) == [1.0, 0.0]
    assert evidence_rewards(missed) == [0.0, 0.0]
    first, second = compute_advantages(
        [found, missed], AlgorithmConfig(adv_type="grpo", advantage_mode="turn", turn_reward_weight=2)
    )
    relative = 2 * 0.5 / (np.sqrt(0.5) + 1e-6)
    assert np.allclose(first, [relative] * 5 + [0] * 4)
    assert np.allclose(second, [-relative] * 6 + [0] * 2)
    batch = pack([found, missed], 100, advantages=[first, second])[0]
    assert torch.equal(batch.advantages_T != 0, batch.loss_mask_T & (batch.advantages_T != 0))
    expected = np.concatenate([[0, 0], first * found.loss_mask, [0, 0], second * missed.loss_mask])
    assert np.allclose(batch.advantages_T.numpy(), expected)


def test_gae_skips_what_the_environment_wrote_and_ends_with_the_reward():
    trajectories = [make(0, 0, 1.0, ((3, 2, "Paris"), (2, 0, ""))), make(1, 0, 0.0, ((2, 3, "x"), (1, 0, "")))]
    values = [np.where(t.loss_mask, 0.1 * np.arange(1, t.response_length + 1), 9.0).astype(np.float32) for t in trajectories]
    algorithm = AlgorithmConfig(
        adv_type="gae", gamma=0.9, gae_lambda=0.8, kl_in="reward", kl_beta=0.05, kl_penalty_type="k1"
    )
    advantages, returns = compute_token_advantages(trajectories, algorithm, values)
    for t, value, advantage, target in zip(trajectories, values, advantages, returns, strict=True):
        positions = t.loss_mask.nonzero()[0]
        rewards = -0.05 * (t.rollout_logprobs.astype(np.float64) - t.ref_logprobs)[positions]
        rewards[-1] += t.reward
        running = following = 0.0
        for r, position in reversed(list(zip(rewards, positions, strict=True))):
            v = float(value[position])
            running = r + 0.9 * following - v + 0.9 * 0.8 * running
            following = v
            assert advantage[position] == pytest.approx(running, abs=1e-6)
            assert target[position] == pytest.approx(running + v, abs=1e-6)
        assert not advantage[~t.loss_mask].any()
        assert not target[~t.loss_mask].any()
    algorithm.normalize_advantages = True
    whitened, again = compute_token_advantages(trajectories, algorithm, values)
    tokens = np.concatenate([a[t.loss_mask] for a, t in zip(whitened, trajectories, strict=True)])
    assert tokens.mean() == pytest.approx(0, abs=1e-6)
    assert tokens.std(ddof=1) == pytest.approx(1, abs=1e-4)
    assert all(np.array_equal(a, b) for a, b in zip(returns, again, strict=True))


def test_turns_that_do_not_fit_the_tokens_are_an_error():
    trajectory = make(0, 0, 0.0)
    trajectory.turns.pop()
    with pytest.raises(ValueError, match="turns of 5 tokens in a response of 9"):
        compute_advantages([trajectory, make(0, 1, 1.0)], AlgorithmConfig(advantage_mode="turn"))


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.floats(-2, 2), st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=4)),
        min_size=1, max_size=10,
    ),
    st.floats(0, 3),
)  # fmt: skip
def test_turn_advantages_equal_the_formula(attempts, weight):
    groups = torch.tensor([group for group, _, _ in attempts])
    outcome = torch.tensor([advantage for _, advantage, _ in attempts], dtype=torch.float64)
    found = turn_advantages(outcome, [turns for _, _, turns in attempts], groups, weight)
    for number, (group, advantage, turns) in enumerate(attempts):
        assert len(found[number]) == len(turns)
        assert found[number][-1] == pytest.approx(advantage)
        for k in range(len(turns) - 1):
            peers = [other[k] for g, _, other in attempts if g == group and k < len(other) - 1]
            spread = np.std(peers, ddof=1) if len(peers) > 1 else 0.0
            own = (turns[k] - np.mean(peers)) / (spread + 1e-6) if spread else 0.0
            assert found[number][k] == pytest.approx(advantage + weight * own, abs=1e-9)


def batch_of(rewards, seed=0):
    trajectories = [
        make(index, rollout_id, reward, seed=seed)
        for index, group in enumerate(rewards)
        for rollout_id, reward in enumerate(group)
    ]
    return Batch(trajectories, RolloutStats(2.0, 0.5, 0.25, 10, 1, 0, 0.8))


VARIED, UNIFORM = (1.0, 0.0), (1.0, 1.0)


def refilled(rounds, max_refills):
    asked = []

    def rollout(refill):
        asked.append(refill)
        return batch_of(rounds[refill], seed=refill)

    return replace_uniform_groups(batch_of(rounds[0]), rollout, max_refills), asked


def test_groups_without_reward_variance_are_replaced_in_order():
    batch, asked = refilled([[VARIED, UNIFORM, VARIED], [UNIFORM, UNIFORM, UNIFORM], [UNIFORM, VARIED, VARIED]], 5)
    assert asked == [1, 2]
    metrics = {
        "rollout/refills": 2.0,
        "rollout/groups_replaced": 5.0,
        "rollout/asked_reward": (4 * 0.5 + 5) / 9,  # of everything that was asked
        "rollout/asked_uniform_groups": 5 / 9,
    }
    assert batch.metrics() == pytest.approx(batch.stats.metrics() | metrics)
    trajectories = batch.trajectories
    assert [(t.sample.index, t.rollout_id) for t in trajectories] == [(i, r) for i in range(3) for r in range(2)]
    assert [t.reward for t in trajectories] == [1.0, 0.0] * 3
    assert trajectories[4].sample.id == "s/1"  # of the second refill
    assert batch.stats.rollout_seconds == 6.0
    assert batch.stats.engine_busy_share == pytest.approx(0.8)
    assert batch.stats.generated_tokens == 30


def test_the_bound_holds_and_the_batch_keeps_its_size():
    batch, asked = refilled([[UNIFORM, UNIFORM, VARIED], [UNIFORM, UNIFORM, UNIFORM]], 1)
    assert asked == [1]
    assert [t.reward for t in batch.trajectories] == [1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert batch.groups_replaced == 3


def test_a_batch_in_which_every_group_has_reward_variance_is_left_alone():
    batch, asked = refilled([[VARIED, VARIED]], 5)
    assert (asked, batch.refills, batch.groups_replaced, len(batch.trajectories)) == ([], 0, 0, 4)
    assert batch.asked == {"rollout/asked_reward": 0.5, "rollout/asked_uniform_groups": 0.0}
    plain = batch_of([UNIFORM]).metrics()
    assert plain["rollout/refills"] == plain["rollout/groups_replaced"] == 0.0
    assert "rollout/asked_reward" not in plain  # of runs without dynamic sampling
