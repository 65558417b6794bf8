from __future__ import annotations

import pytest

from searchr1.report.run_files import brief
from searchr1.report.summary import difference_is_sure, example_of, summarise


def evaluation(step, match, searches=1.0, questions=480, sources=()):
    row = {"step": step, "val/exact_match": match, "val/searches": searches, "val/questions": questions}
    for source, value in sources:
        row |= {f"val/{source}/exact_match": value, f"val/{source}/questions": 100, f"val/{source}/searches": 2.0}
    return row


def briefs(*answers):
    """(id, right, searches) as briefs."""
    return [
        brief({"id": id, "answer": "x", "searches": searches, "turns": [], "reward_parts": {"exact_match": float(right)}})
        for id, right, searches in answers
    ]


@pytest.mark.parametrize(
    ("before", "after", "headline", "tone", "sentence"),
    [
        ((0.45, 0.9), (0.99, 1.75), "The model learned to search.", "good", "rose from 45% to 99%"),
        ((0.45, 1.0), (0.99, 1.0), "The model got better at the held-out questions.", "good", "rose from 45% to 99%"),
        ((0.6, 1.0), (0.4, 2.0), "The model got worse at the held-out questions.", "bad", "fell from 60% to 40%"),
        (
            (0.40, 1.0),
            (0.42, 2.0),
            "The model's answers to held-out questions did not clearly change.",
            "plain",
            "chance alone",
        ),
    ],
)
def test_before_and_after_in_words(before, after, headline, tone, sentence):
    found = summarise([evaluation(0, *before), evaluation(40, *after)], [], [])
    assert (found.headline, found.tone) == (headline, tone)
    assert sentence in found.sentences[0]
    assert "between step 0 and step 40" in found.sentences[0]
    assert f"It searches {after[1]:.2f} times a question, {before[1]:.2f} times before." in found.sentences[1]


def test_a_peak_on_the_way_is_not_hidden():
    found = summarise([evaluation(0, 0.2), evaluation(10, 0.9), evaluation(20, 0.5)], [], [])
    assert found.sentences[-1] == "It was better on the way: 90% at step 10."
    level = summarise([evaluation(0, 0.2), evaluation(10, 0.51), evaluation(20, 0.5)], [], [])
    assert "better on the way" not in " ".join(level.sentences)


def test_what_searching_is_good_for_is_counted():
    first = briefs(("a", False, 0), ("b", True, 0))
    last = briefs(("a", True, 2), ("b", True, 0), ("c", False, 1), ("d", False, 0))
    found = summarise([evaluation(0, 0.1), evaluation(1, 0.9, 2.0)], first, last)
    assert (
        "50% of the questions make it search at least once (0% before); 50% of its right answers come after"
        in found.sentences[1]
    )


def test_data_sources_are_named_each_or_by_their_extremes():
    few = [("one", 0.5), ("two", 0.2)]
    found = summarise([evaluation(0, 0.1, sources=few), evaluation(1, 0.9, sources=[("one", 0.9), ("two", 0.3)])], [], [])
    assert "By data source: one 50% → 90% with 2.00 searches, two 20% → 30% with 2.00 searches." in found.sentences
    many = [(f"s{i}", 0.1) for i in range(9)]
    after = [(f"s{i}", 0.1 * i) for i in range(9)]
    found = summarise([evaluation(0, 0.1, sources=many), evaluation(1, 0.9, sources=after)], [], [])
    assert "Of 9 data sources, s8 10% → 80% with 2.00 searches gained most, s0 10% → 0%" in found.sentences[-1]
    found = summarise([evaluation(1, 0.9, sources=after)], [], [])
    sentence = "Of 9 data sources, s8 80% with 2.00 searches is the best, s0 0% with 2.00 searches the worst."
    assert found.sentences[-1] == sentence


def test_one_evaluation_training_alone_and_nothing():
    assert summarise([evaluation(0, 0.5)], [], []).headline == "50% of 480 questions are answered exactly right."
    rewards = [{"step": step, "reward/mean": step / 10} for step in range(1, 11)]
    assert summarise(rewards, [], []).headline == "The mean training reward rose from 0.300 to 0.800 over 10 steps."
    assert "fell" in summarise([{"step": 1, "reward/mean": 1.0}, {"step": 2, "reward/mean": 0.5}], [], []).headline
    assert "One step so far" in summarise(rewards[:1], [], []).headline
    assert summarise([], [], []).headline == "No training step and no evaluation has been logged yet."


def test_caveats_are_those_of_the_last_step():
    rows = [{"step": 1, "rollout/truncated": 0.9}, {"step": 2, "rollout/truncated": 0.01, "tool/failure_rate": 0.25}]
    assert summarise(rows, [], []).sentences[-1] == "At the last training step 25% of the tool calls failed."


def test_the_example_is_the_question_that_gained_most_searches():
    first = briefs(("a", False, 0), ("b", False, 1), ("c", True, 0), ("d", False, 0))
    last = briefs(("a", True, 1), ("b", True, 3), ("c", True, 9), ("d", False, 9))
    assert example_of(first, last) == "b"
    assert example_of(first, first) is None
    assert example_of([], []) is None


def test_differences_within_chance():
    assert difference_is_sure(0.4, 0.6, 480)
    assert not difference_is_sure(0.4, 0.42, 480)
    assert difference_is_sure(0.4, 0.42, 48_000)
    assert not difference_is_sure(1.0, 1.0, 10)
    assert difference_is_sure(0.0, 1.0, 10)
