from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1.agent.trajectory import Sample
from searchr1.data.loader import PromptLoader, eval_batches
from searchr1.errors import UserError


def questions(count: int) -> list[Sample]:
    return [Sample(f"q/{i}", 0, [i], f"question {i}", [f"answer {i}"]) for i in range(count)]


def loader(count: int = 10, batch: int = 3, seed: int = 0, shuffle: bool = True, epochs: int = 2) -> PromptLoader:
    return PromptLoader(questions(count), batch, seed=seed, shuffle=shuffle, max_epochs=epochs)


def ids(batch: list[Sample]) -> list[str]:
    return [sample.id for sample in batch]


@given(
    count=st.integers(1, 40),
    batch=st.integers(1, 40),
    seed=st.integers(-3, 2**40),
    shuffle=st.booleans(),
    stop=st.integers(0, 25),
)
def test_a_resume_at_any_point_goes_on_in_the_same_order(count, batch, seed, shuffle, stop):
    batch = min(batch, count)
    whole = loader(count, batch, seed, shuffle)
    for _ in range(stop):
        whole.next_batch()
    state = whole.state_dict()
    resumed = loader(count, batch, seed, shuffle)
    resumed.load_state_dict(state)
    for _ in range(2 * whole.steps_per_epoch + 1):
        assert resumed.next_batch() == whole.next_batch()


@given(count=st.integers(1, 40), batch=st.integers(1, 10), seed=st.integers(0, 9))
def test_an_epoch_asks_no_question_twice_and_leaves_less_than_a_batch_out(count, batch, seed):
    batch = min(batch, count)
    asked = loader(count, batch, seed)
    epoch = [sample for _ in range(asked.steps_per_epoch) for sample in asked.next_batch()]
    assert len(set(ids(epoch))) == len(epoch) > count - batch


def test_batches_are_numbered_copies():
    data = questions(6)
    first = PromptLoader(data, 3, seed=0, shuffle=True, max_epochs=1).next_batch()
    assert [sample.index for sample in first] == [0, 1, 2]
    assert all(sample.index == 0 for sample in data)


def test_every_epoch_has_an_order_of_its_own():
    asked = loader(count=30, batch=30)
    assert ids(asked.next_batch()) != ids(asked.next_batch())
    assert ids(loader(count=30, batch=30, seed=1).next_batch()) != ids(loader(count=30, batch=30, seed=2).next_batch())


def test_without_shuffling_the_files_order_stays():
    asked = loader(count=5, batch=2, shuffle=False)
    assert [ids(asked.next_batch()) for _ in range(3)] == [["q/0", "q/1"], ["q/2", "q/3"], ["q/0", "q/1"]]


def test_steps():
    asked = loader(count=10, batch=3, epochs=4)
    assert asked.steps_per_epoch == 3
    assert asked.total_steps == 12


def test_fewer_questions_than_a_batch():
    with pytest.raises(UserError, match=r"data.rollout_batch_size: 11 is more than the 10 training questions"):
        loader(batch=11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "data.seed"),
        ({"batch": 2}, "data.rollout_batch_size"),
        ({"shuffle": False}, "data.shuffle"),
        ({"count": 11}, "training questions"),
    ],
)
def test_a_changed_run_does_not_resume(change, message):
    with pytest.raises(UserError, match=message):
        loader(**change).load_state_dict(loader().state_dict())


@pytest.mark.parametrize(
    "change", [{"id": "x"}, {"question": "x"}, {"golden_answers": ["x"]}, {"prompt_ids": [9]}, {"reward_name": "f1_score"}]
)
def test_a_changed_question_does_not_resume(change):
    data = questions(10)
    state = loader().state_dict()
    data[4] = replace(data[4], **change)
    with pytest.raises(UserError, match="training questions"):
        PromptLoader(data, 3, seed=0, shuffle=True, max_epochs=2).load_state_dict(state)


@given(count=st.integers(0, 30), batch=st.integers(1, 12))
def test_an_evaluation_asks_every_question_once(count, batch):
    data = questions(count)
    batches = list(eval_batches(data, batch))
    assert [sample.id for part in batches for sample in part] == ids(data)
    assert all([sample.index for sample in part] == list(range(len(part))) for part in batches)
    assert all(len(part) == batch for part in batches[:-1])
