"""Plans of micro-batches and the layout of packed rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from searchr1.agent.trajectory import Sample, Trajectory
from searchr1.errors import UserError
from searchr1.learner.packing import pack, plan_micro_batches, sequence_length, split_balanced, unpack_all, unpack_logprobs
from searchr1.learner.stats import count_denominators


def make_trajectory(index: int, prompt: int, response: int, seed: int = 0, with_ref: bool = True) -> Trajectory:
    generator = np.random.default_rng([seed, index])
    mask = generator.random(response) < 0.6
    return Trajectory(
        sample=Sample(f"toy/{index}", index, generator.integers(1, 90, prompt).tolist(), "?", ["!"]),
        rollout_id=0,
        response_ids=generator.integers(1, 90, response).astype(np.int32),
        loss_mask=mask,
        rollout_logprobs=(-generator.random(response) * mask).astype(np.float32),
        turns=[],
        stop="answer",
        ref_logprobs=-generator.random(response).astype(np.float32) if with_ref else None,
    )


lengths_lists = st.lists(st.integers(1, 100), max_size=30)


@given(lengths_lists, st.integers(100, 300), st.integers(1, 12))
def test_a_plan_holds_every_sequence_once_within_the_limit(lengths: list[int], limit: int, at_least: int) -> None:
    plan = plan_micro_batches(lengths, limit, at_least)
    assert sorted(index for members in plan for index in members) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in members) <= limit for members in plan)
    assert len(plan) >= at_least
    assert plan == plan_micro_batches(lengths, limit, at_least)
    # First-fit-decreasing: never more than 11/9 of the best plus one; the total over the limit bounds the best below.
    alone = plan_micro_batches(lengths, limit)
    assert len(plan) == max(at_least, len(alone))
    assert len(alone) <= max(1, 2 * sum(lengths) // limit + 1)


@given(st.lists(lengths_lists, min_size=1, max_size=4))
def test_ranks_reach_the_same_number(ranks: list[list[int]]) -> None:
    agreed = max(len(plan_micro_batches(lengths, 128)) for lengths in ranks)
    assert {len(plan_micro_batches(lengths, 128, at_least=agreed)) for lengths in ranks} == {agreed}


def test_micro_batches_are_balanced() -> None:
    lengths = np.random.default_rng(0).integers(100, 300, 64).tolist()
    loads = [sum(lengths[index] for index in members) for members in plan_micro_batches(lengths, 4096)]
    assert len(loads) == -(-sum(lengths) // 4096)
    assert max(loads) - min(loads) < 100


@given(lengths_lists, st.integers(1, 8))
def test_ranks_get_nearly_equal_token_counts(lengths: list[int], ranks: int) -> None:
    split = split_balanced(lengths, ranks)
    assert len(split) == ranks
    assert sorted(index for members in split for index in members) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in members) for members in split]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_a_sequence_over_the_limit_names_the_key() -> None:
    with pytest.raises(UserError, match=r"^runner.max_tokens_per_mbs: a sequence of 101 tokens does not fit into 100"):
        plan_micro_batches([5, 101], 100)


def test_every_token_is_where_it_belongs() -> None:
    trajectories = [make_trajectory(index, 3 + index, 4 * index) for index in range(5)]
    advantages = [0.5, -1.0, 2.0, 0.25, -3.0]
    old = [np.arange(len(t.response_ids), dtype=np.float32) - 99 for t in trajectories]
    batches = pack(trajectories, 40, advantages=advantages, old_logprobs=old)
    assert len(batches) == 2
    seen = []
    for batch in batches:
        assert batch.tokens == sum(batch.lengths) <= 40
        assert batch.cu_seqlens.tolist() == [0, *np.cumsum(batch.lengths)]
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.old_logprobs_T is not None
        assert batch.ref_logprobs_T is not None
        for segment, sequence in enumerate(batch.sequences):
            seen.append(sequence.index)
            trajectory = trajectories[sequence.index]
            whole = slice(sequence.offset, sequence.offset + sequence.length)
            ids = trajectory.sample.prompt_ids + trajectory.response_ids.tolist()
            mask = [False] * sequence.prompt_length + trajectory.loss_mask.tolist()
            assert batch.input_ids_T[whole].tolist() == ids
            assert batch.position_ids_T[whole].tolist() == list(range(len(ids)))
            assert set(batch.segment_ids_T[whole].tolist()) == {segment}
            assert batch.loss_mask_T[whole].tolist() == mask
            for packed, values in (
                (batch.advantages_T, np.full(sequence.response_length, advantages[sequence.index])),
                (batch.rollout_logprobs_T, trajectory.rollout_logprobs),
                (batch.old_logprobs_T, old[sequence.index]),
                (batch.ref_logprobs_T, trajectory.ref_logprobs),
            ):
                assert values is not None
                expected = np.where(trajectory.loss_mask, values, 0)
                np.testing.assert_array_equal(packed[sequence.response].numpy(), expected.astype(np.float32))
                assert (packed[sequence.offset : sequence.response.start] == 0).all()
    assert sorted(seen) == list(range(5))
    moved = batches[0].to(torch.device("meta"))
    assert moved.input_ids_T.is_meta
    assert moved.lengths == batches[0].lengths


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), min_size=1, max_size=9), st.integers(15, 40))
def test_what_is_packed_comes_back(shapes: list[tuple[int, int]], limit: int) -> None:
    trajectories = [make_trajectory(index, *shape) for index, shape in enumerate(shapes)]
    batches = pack(trajectories, limit, at_least=3)
    found = unpack_all(batches, [batch.input_ids_T.float() for batch in batches])
    assert len(found) == len(trajectories)
    for array, trajectory in zip(found, trajectories, strict=True):
        np.testing.assert_array_equal(array, trajectory.response_ids.astype(np.float32))
    denominators = count_denominators(trajectories)
    assert sum(int(batch.loss_mask_T.sum()) for batch in batches) == denominators.tokens
    assert denominators.sequences == sum(trajectory.loss_mask.any() for trajectory in trajectories)


def test_filler_batches_have_no_trajectory() -> None:
    batches = pack([make_trajectory(0, 4, 4)], 100, at_least=3)
    fillers = [batch for batch in batches if not batch.sequences]
    assert len(batches) == 3
    assert len(fillers) == 2
    for filler in fillers:
        assert filler.lengths == (2,)
        assert not filler.loss_mask_T.any()
        assert unpack_logprobs(filler, torch.zeros(2)) == []
        assert filler.ref_logprobs_T is not None  # the same parts as the real ones, so that all ranks do the same
    assert len(pack([], 100)) == 1


def test_policy_values_scatter_and_carry_gradients() -> None:
    batch = pack([make_trajectory(0, 3, 12)], 100)[0]
    values_P = torch.arange(1.0, 1 + len(batch.policy_positions_P), requires_grad=True)
    scattered_T = batch.scatter_policy(values_P)
    assert scattered_T[batch.loss_mask_T].tolist() == values_P.tolist()
    assert (scattered_T[~batch.loss_mask_T] == 0).all()
    scattered_T.square().sum().backward()
    assert values_P.grad is not None
    torch.testing.assert_close(values_P.grad, 2 * values_P.detach())


def test_inconsistent_input_is_rejected() -> None:
    first, second = make_trajectory(0, 3, 4), make_trajectory(1, 3, 4, with_ref=False)
    with pytest.raises(ValueError, match="1 of 2 trajectories"):
        pack([first, second], 100)
    with pytest.raises(ValueError, match="1 advantages for 2"):
        pack([first, first], 100, advantages=[1.0])
    with pytest.raises(ValueError, match="empty prompt"):
        pack([make_trajectory(0, 0, 4)], 100)
    with pytest.raises(ValueError, match="packed tokens"):
        unpack_logprobs(pack([first], 100)[0], torch.zeros(3))
    assert sequence_length(first) == 7
