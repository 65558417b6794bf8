from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1.agent.trajectory import Sample, Trajectory, Turn
from searchr1.report.run_files import read_rows
from searchr1.tracking.token_text import TokenText
from searchr1.tracking.trajectory_log import (
    eval_file,
    logged_steps,
    remove_later,
    train_file,
    whole_groups,
    write_trajectories,
)


def test_a_person_finds_everything_in_a_row(tmp_path, make_trajectory):
    path = tmp_path / "step_1.jsonl"
    write_trajectories(path, [make_trajectory()])
    row = json.loads(path.read_text())
    assert row["question"] == "Who?"
    assert row["golden_answers"] == ["Ann"]
    assert row["answer"].strip() == "Ann"
    assert row["stop"] == "answer"
    assert row["reward_parts"]["exact_match"] == 1
    assert (row["response_length"], row["policy_tokens"], row["searches"]) == (10, 7, 1)
    search, answer = row["turns"]
    assert search["queries"] == ["who"]
    assert search["tool_text"] == "<information>Ann</information>"
    assert answer["policy_text"] == "<answer> Ann </answer>"


def test_text_is_readable_not_escaped(tmp_path, make_trajectory):
    path = tmp_path / "step_1.jsonl"
    write_trajectories(path, [make_trajectory(turns=[Turn("谁是 Zoë?", "none", 3)])])
    assert "谁是 Zoë?" in path.read_text(encoding="utf-8")


@settings(max_examples=60)
@given(text=st.text(st.characters(exclude_categories=())), reward=st.floats())
def test_no_text_and_no_reward_can_break_the_log(tmp_path_factory, text, reward):
    path = tmp_path_factory.mktemp("log") / "step_1.jsonl"
    sample, empty = Sample("q/0", 0, [1], text, [text]), np.zeros(0)
    turns = [Turn(text, "search", 1, [text], text, 1)]
    odd = Trajectory(sample, 0, empty.astype(np.int32), empty.astype(bool), empty, turns, "eos", reward=reward)
    write_trajectories(path, [odd, odd])
    first, second = read_rows(path)
    assert first["turns"][0]["policy_text"] == first["turns"][0]["tool_text"] == text
    assert "NaN" not in path.read_text(encoding="utf-8") or "NaN" in text
    assert second["reward"] is None or second["reward"] == reward


def test_the_file_appears_whole_or_not_at_all(tmp_path, make_trajectory):
    path = tmp_path / "step_1.jsonl"

    bad = make_trajectory()
    bad.turns = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        write_trajectories(path, [make_trajectory(), bad])
    assert not path.exists()


@pytest.mark.parametrize(
    ("most", "kept"),
    [(None, [0, 1, 2, 3, 4, 5]), (24, [0, 1, 2, 3, 4, 5]), (23, [0, 1, 2, 3, 4]), (9, [0, 3]), (4, [0]), (0, [])],
)
def test_a_step_is_thinned_by_whole_groups(make_trajectory, most, kept):
    step = [make_trajectory(index, rollout_id) for index in range(6) for rollout_id in range(4)]
    assert [(t.sample.index, t.rollout_id) for t in whole_groups(step, most)] == [(i, r) for i in kept for r in range(4)]


def test_a_group_that_is_larger_than_the_limit_is_cut(make_trajectory):
    step = [make_trajectory(index, rollout_id) for index in range(2) for rollout_id in range(4)]
    assert [(t.sample.index, t.rollout_id) for t in whole_groups(step, 3)] == [(0, 0), (0, 1), (0, 2)]


def test_tokens_are_logged_beside_the_text(tmp_path, make_trajectory):
    path = tmp_path / "step_1.jsonl"
    words = ["<search>", "w", "ho", "</search>", "<answer>", " Ann ", "</answer>"]
    vocabulary = TokenText([word.encode() for word in words])
    ids = np.array([0, 1, 2, 3, -1, -1, -1, 4, 5, 6], np.int32)
    logprobs = np.array([-0.0014, -0.25, 0, -np.inf, 0, 0, 0, np.nan, 1e-6, -3], np.float32)
    write_trajectories(path, [make_trajectory(response_ids=ids, rollout_logprobs=logprobs)], vocabulary)
    search, answer = json.loads(path.read_text())["turns"]
    assert search["token_chars"] == [8, 1, 2, 9]
    assert search["token_surprise"] == [1, 250, 0, 99_999]
    assert answer["token_chars"] == [8, 5, 9]
    assert answer["token_surprise"] == [0, 0, 3000]


def test_no_tokens_are_logged_where_they_do_not_spell_the_text(tmp_path, make_trajectory):
    path = tmp_path / "step_1.jsonl"
    vocabulary = TokenText([b"other"] * 10)
    unmasked = make_trajectory(
        response_ids=np.zeros(10, np.int32), turns=[Turn("aaa", "none", 3)], loss_mask=np.zeros(10, bool)
    )
    write_trajectories(path, [make_trajectory()], vocabulary)
    write_trajectories(tmp_path / "step_2.jsonl", [unmasked], TokenText([b"a"]))
    for file in (path, tmp_path / "step_2.jsonl"):
        assert not any("token_chars" in turn for turn in json.loads(file.read_text())["turns"])


@pytest.mark.parametrize(("first_step", "train", "evals"), [(0, [], []), (2, [1, 2], [0, 2]), (30, [1, 2, 10], [0, 2, 10])])
def test_files_of_steps_that_will_run_again_go(tmp_path, make_trajectory, first_step, train, evals):
    remove_later(tmp_path, 0)
    for step in (1, 2, 10):
        write_trajectories(train_file(tmp_path, step), [make_trajectory()])
    for step in (0, 2, 10):
        write_trajectories(eval_file(tmp_path, step), [make_trajectory()])
    (tmp_path / "trajectories" / "step_notes.jsonl").touch()
    remove_later(tmp_path, first_step)
    assert logged_steps(tmp_path, "step_") == train
    assert logged_steps(tmp_path, "eval_step_") == evals
    assert (tmp_path / "trajectories" / "step_notes.jsonl").exists()
