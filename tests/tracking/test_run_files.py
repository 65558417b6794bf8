from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1.errors import UserError
from searchr1.report.run_files import COLUMNS, brief, evenly, evenly_by_group, logged_files, read_rows, shares
from searchr1.tracking.token_text import TokenText
from searchr1.tracking.trajectory_log import eval_file, remove_later, train_file, write_trajectories


def named(row):
    return dict(zip(COLUMNS, brief(row), strict=True))


def test_files_come_evaluations_first_by_step(tmp_path, make_trajectory):
    remove_later(tmp_path, 0)
    for file in (train_file(tmp_path, 10), train_file(tmp_path, 2), eval_file(tmp_path, 10), eval_file(tmp_path, 0)):
        write_trajectories(file, [make_trajectory()])
    assert [(file.mode, file.step) for file in logged_files(tmp_path)] == [
        ("eval", 0),
        ("eval", 10),
        ("train", 2),
        ("train", 10),
    ]
    assert logged_files(tmp_path / "nowhere") == []


@pytest.mark.parametrize("line", ["{torn", "[]", '{"question": "no turns"}', '{"turns": [1]}'])
def test_a_damaged_line_is_named(tmp_path, make_trajectory, line):
    path = tmp_path / "step_1.jsonl"
    write_trajectories(path, [make_trajectory()])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"step_1.jsonl:2: "):
        list(read_rows(path))
    path.write_bytes(path.read_bytes()[:-2].partition(b"\n")[0] + b"\n" + line.encode())
    assert len(list(read_rows(path))) == 1, "a last line without its end is left out"
    with pytest.raises(UserError, match="not readable"):
        list(read_rows(tmp_path / "gone.jsonl"))


def test_a_row_in_brief(tmp_path, make_trajectory):
    path = tmp_path / "step_1.jsonl"
    vocabulary = TokenText(
        [word.encode() for word in ["<search>", "w", "ho", "</search>", "<answer>", " Ann ", "</answer>"]]
    )
    ids = np.array([0, 1, 2, 3, 0, 0, 0, 4, 5, 6], np.int32)
    unlogged = make_trajectory(3, 1, response_ids=np.zeros(10, np.int32))
    surprising = make_trajectory(response_ids=ids, rollout_logprobs=np.full(10, -0.5, np.float32))
    write_trajectories(path, [unlogged, surprising], vocabulary)
    plain, shaded = map(named, read_rows(path))
    assert plain["id"] == "one_hop/3"
    assert plain["replica"] == 1
    assert plain["golds"] == ["Ann"]
    assert plain["answer"] == "Ann"
    assert plain["right"] is True
    assert (plain["searches"], plain["invalid"], plain["failures"], plain["length"]) == (1, 0, 0, 10)
    assert plain["surprise"] is None
    assert shaded["surprise"] == 500


def test_right_is_the_exact_match_or_else_the_reward():
    row = {"turns": [], "reward": 0.4}
    assert named(row | {"reward_parts": {"exact_match": 0.0}})["right"] is False
    assert named(row | {"reward_parts": {"exact_match": 1.0}})["right"] is True
    assert named(row | {"reward_parts": {"f1": 0.4}})["right"] is True
    assert named({"turns": [], "reward": None})["right"] is False


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "exact_match"]), inner, max_size=2),
    max_leaves=5,
)
FIELDS = (
    "id",
    "replica",
    "question",
    "golden_answers",
    "answer",
    "reward",
    "reward_parts",
    "stop",
    "searches",
    "forced_final",
)


@given(
    st.dictionaries(st.sampled_from(FIELDS), json_values), st.dictionaries(st.sampled_from(["token_surprise"]), json_values)
)
def test_a_row_with_other_types_in_it_is_still_read(row, turn):
    found = named(row | {"turns": [turn]})
    assert isinstance(found["question"], str)
    assert isinstance(found["searches"], int)
    assert found["reward"] is None or isinstance(found["reward"], float)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("surprise", ["1e999", "-1e999", "Infinity", "NaN", "1" + "0" * 400, "true", '"x"'])
def test_a_number_beyond_every_float_counts_as_absent(tmp_path, surprise):
    path = tmp_path / "step_1.jsonl"
    path.write_text(
        f'{{"reward": {surprise}, "searches": {surprise}, "turns": [{{"token_surprise": [{surprise}, 4, 6]}}]}}\n'
    )
    (row,) = read_rows(path)
    assert (named(row)["reward"], named(row)["searches"], named(row)["surprise"]) == (None, 0, 5)
    json.dumps(named(row), allow_nan=False)


def test_the_mean_of_large_numbers_does_not_overflow():
    assert named({"turns": [{"token_surprise": [1.5e308, 1.5e308]}]})["surprise"] == pytest.approx(1.5e308)


def test_evenly():
    assert evenly(range(10), 4) == [0, 2, 5, 7]
    assert evenly(range(3), 4) == [0, 1, 2]
    assert evenly(range(3), 0) == []


def test_whole_groups_are_kept_while_one_fits():
    items = [(group, member) for group in range(6) for member in range(4)]
    assert evenly_by_group(items, 9, lambda item: item[0]) == [(group, member) for group in (0, 3) for member in range(4)]
    assert len(evenly_by_group(items, 3, lambda item: item[0])) == 3
    assert evenly_by_group(items, 24, lambda item: item[0]) == items


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(0, 200))
def test_shares_use_the_room_and_never_more(totals, budget):
    given_out = shares(totals, budget)
    assert all(0 <= some <= total for some, total in zip(given_out, totals, strict=True))
    assert sum(given_out) == min(budget, sum(totals))
    unfilled = [some for some, total in zip(given_out, totals, strict=True) if some < total]
    assert not unfilled or max(given_out) - min(unfilled) <= 1
