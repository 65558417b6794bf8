"""Rows in every known shape become questions; whatever cannot is told, and nothing else is raised."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1.data.prepare.rows import Question, check_row
from searchr1.data.prepare.stats import find_overlap, question_key, split_duplicates
from searchr1.errors import UserError

QUESTION = {"question": "who?"}


def check(row, question_mark=True):
    return check_row(row, "set", 7, "train_7", question_mark)


@pytest.mark.parametrize(
    ("row", "identity", "answers"),
    [
        ({"id": "train_0", "question": "who?", "golden_answers": ["Ann", "A."], "metadata": {}}, "train_0", ["Ann", "A."]),
        ({"question": "who?", "answer": ["Ann"]}, "train_7", ["Ann"]),  # NQ-open
        (
            {
                "QuestionId": "tc_1", "Question": "who?", "EntityPages": [],
                "Answer": {"Aliases": ["Ann", "Anna"], "NormalizedAliases": ["ann"], "Value": "Ann", "Type": "X"},
            },
            "tc_1",
            ["Ann", "Anna"],
        ),  # TriviaQA
        ({"id": "12", "question": "who?", "obj": "x", "possible_answers": '["Ann"]'}, "12", ["Ann"]),  # PopQA
        ({"_id": "5a", "question": "who?", "answer": "Ann", "type": "bridge", "context": []}, "5a", ["Ann"]),  # HotpotQA
        (
            {"id": "2hop__1", "question": "who?", "answer": "Ann", "answer_aliases": ["Anna", "Ann"], "answerable": True},
            "2hop__1",
            ["Ann", "Anna"],
        ),  # MuSiQue
        ({"Question": "who?", "Answer": "Ann"}, "train_7", ["Ann"]),  # Bamboogle
        ({"question": "who?", "golden_answers": '["Ann", "Anna"]'}, "train_7", ["Ann", "Anna"]),  # a column of a csv
        ({"question": "who?", "golden_answers": "['Ann', 'Anna']"}, "train_7", ["Ann", "Anna"]),
        ({"question": "who?", "answer": "[REC]"}, "train_7", ["[REC]"]),
        ({"id": "a", "question": "who?", "answers": {"text": ["Ann"], "answer_start": [3]}}, "a", ["Ann"]),  # SQuAD
        ({"prompt": "who?", "solutions": ["Ann"]}, "train_7", ["Ann"]),  # RLinf
        (
            {
                "data_source": "nq",
                "prompt": [{"role": "user", "content": "Answer. Question: who?\n"}],
                "reward_model": {"style": "rule", "ground_truth": {"target": ["Ann"]}},
                "extra_info": {"split": "train", "index": 3},
            },
            "train_7",
            ["Ann"],
        ),  # Search-R1
        ({"id": 0, "question": " who ", "answer": 1914}, "0", ["1914"]),
        ({"question": "who", "golden_answers": [" ", "Ann ", "Ann "]}, "train_7", ["Ann "]),
    ],
)  # fmt: skip
def test_known_shapes(row, identity, answers):
    assert check(row) == Question("set", 7, identity, "who?", answers)


def test_question_marks_are_added_as_search_r1_does_and_only_if_wanted():
    row = {"question": "tell me who ", "answer": "Ann"}
    assert check(row).text == "tell me who?"
    assert check(row, question_mark=False).text == "tell me who"
    assert check({"question": "誰？", "answer": "Ann"}).text == "誰？"


def test_own_reward_and_passages_come_along():
    row = check(QUESTION | {"answer": "Ann", "reward_model": "f1_score", "passages": "Doc 1"})
    assert (row.reward, row.passages) == ("f1_score", "Doc 1")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "no question"),
        ({"question": " \n", "answer": "Ann"}, "question is empty"),
        ({"prompt": "Answer this. Question: ", "answer": "Ann"}, "question is empty"),
        ({"question": ["who?"], "answer": "Ann"}, "question: is a list"),
        ({"prompt": [{"role": "user"}], "answer": "Ann"}, r"prompt\[0\]: .* no content"),
        (QUESTION, "no gold answer"),
        (QUESTION | {"golden_answers": []}, "no gold answer"),
        (QUESTION | {"golden_answers": ["", "  "]}, "no gold answer"),
        (QUESTION | {"golden_answers": [None]}, "no gold answer"),
        (QUESTION | {"golden_answers": [["Ann"]]}, "golden_answers: holds a list inside"),
        (QUESTION | {"golden_answers": [{"text": "Ann"}]}, "golden_answers: holds"),
        (QUESTION | {"answer": True}, "answer: holds True"),
        (QUESTION | {"answer": float("nan")}, "no gold answer .answer is NaN."),
        (QUESTION | {"possible_answers": '["Ann"'}, "possible_answers: is not a valid JSON list"),
        (QUESTION | {"golden_answers": "['Ann' 'Anna']"}, "golden_answers: .* looks like a list.*write several answers as"),
        (QUESTION | {"answer": "Ann", "answerable": False}, "not answerable"),
        (QUESTION | {"answer": "Ann", "id": " "}, "id is empty"),
        (QUESTION | {"answer": "Ann", "id": 1.5}, "id is a float"),
        (QUESTION | {"answer": "Ann", "id": True}, "id is a bool"),
        (QUESTION | {"answer": "Ann", "passages": ["Doc"]}, "passages is a list"),
        (QUESTION | {"answer": "Ann\ud800"}, "surrogate"),
        ({"question": "\udfff", "answer": "Ann"}, "surrogate"),
    ],
)
def test_bad_rows_are_reported(row, message):
    with pytest.raises(UserError, match=message):
        check(row)


keys = st.sampled_from(
    "id question prompt golden_answers answer possible_answers answer_aliases reward_model passages".split()
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | keys, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(keys, values, max_size=5))
def test_any_row_is_a_question_or_a_reported_mistake(row):
    try:
        found = check(row)
    except UserError:
        return
    assert found.text.strip() == found.text != ""
    assert found.answers
    assert all(answer.strip() for answer in found.answers)
    assert len(set(found.answers)) == len(found.answers)
    json.dumps([found.id, found.text, found.answers, found.passages, found.reward], ensure_ascii=False).encode()


def question(text, number=0, set_name="set"):
    return Question(set_name, number, f"train_{number}", text, ["Ann"])


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Who wrote the Iliad?", "who  wrote Iliad", True),
        ("Ｗｈｏ?", "who?", True),
        ("caf\u00e9?", "cafe\u0301?", True),
        ("STRASSE?", "straße", True),
        ("who is 5?", "who is 6?", False),
        ("?", "!", False),
    ],
)
def test_when_two_questions_are_one(one, other, same):
    assert (question_key(one) == question_key(other)) == same


texts = st.text(alphabet="ab the?ÉßＡ \t", max_size=12)


@given(texts)
def test_a_questions_key_does_not_change_with_case_and_blanks(text):
    text = f"x {text}"
    assert question_key(text) == question_key(f" {text.replace(' ', '   ')} ??")
    assert question_key(text) == question_key(text.swapcase())


@given(st.lists(texts, max_size=12))
def test_what_is_left_out_as_a_duplicate_has_its_first_among_what_is_kept(items):
    questions = [question(text, number) for number, text in enumerate(items)]
    kept, repeated = split_duplicates(questions)
    assert len(kept) + len(repeated) == len(questions)
    assert sorted(kept, key=lambda found: found.index) == kept
    assert len({question_key(found.text) for found in kept}) == len(kept)
    for again, first in repeated:
        assert first in kept
        assert first.index < again.index


def test_overlap_counts_training_questions_by_where_they_are_asked():
    train = [question("Who wrote the Iliad?", 0, "nq"), question("Who?", 1, "nq"), question("who wrote Iliad", 2, "own")]
    found = find_overlap(train, [("hotpotqa", "hotpotqa/dev_9", "who wrote the Iliad"), ("x", "x/1", "When?")])
    assert [item.id for item in found.questions] == ["train_0", "train_2"]
    assert found.pairs == {("nq", "hotpotqa"): 1, ("own", "hotpotqa"): 1}
    assert found.examples[0] == ("nq/train_0", "hotpotqa/dev_9", "Who wrote the Iliad?")
