"""From rows to the numbers of the tables."""

from __future__ import annotations

import pytest

from searchr1.evaluation.published import LABELS, canonical, in_order
from searchr1.evaluation.rollouts import ScoredRollout
from searchr1.evaluation.summary import flat_metrics, summarise, validation_metrics
from searchr1.tracking.trajectory_log import trajectory_row


def scored(trajectory):
    return ScoredRollout.from_row(trajectory_row(trajectory), trajectory.sample.index)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("NQ", "nq"), ("nq_open", "nq"), ("natural_questions", "nq"), ("NaturalQuestions-open", "nq"), ("searchR1_nq", "nq"),
        ("trivia_qa", "triviaqa"), ("TriviaQA", "triviaqa"), ("TQA_rand1000", "triviaqa"), ("PopQA", "popqa"),
        ("hotpot_qa", "hotpotqa"), ("HotpotQA_distractor", "hotpotqa"), ("hotpotqa_dev", "hotpotqa"),
        ("2wiki", "2wikimultihopqa"), ("2WikiMultiHopQA", "2wikimultihopqa"),
        ("2WikiMultihopQA_rand1000", "2wikimultihopqa"),
        ("MuSiQue", "musique"), ("musique_ans_dev", "musique"), ("Bamboogle", "bamboogle"), ("bamboogle_test", "bamboogle"),
    ],
)  # fmt: skip
def test_spellings_of_the_seven_sets(spelling, name):
    assert canonical(spelling) == name


@pytest.mark.parametrize("name", ["one_hop", "org/two", "wiki", "test", "", "my nq", "nqx", "<b>nq</b>"])
def test_other_names_stay_as_they_are(name):
    assert canonical(name) == name


def test_sets_come_in_the_papers_order_then_others_by_name():
    assert in_order({"zoo", "bamboogle", "nq", "apes"}) == ["nq", "bamboogle", "apes", "zoo"]
    assert in_order(set(LABELS)) == list(LABELS)


@pytest.mark.parametrize(
    ("answer", "golds", "scores"),
    [
        ("The Beatles!", ["beatles"], (1, 1, 1)),
        ("the rock band The Beatles", ["Beatles"], (0, 0.5, 1)),
        ("1,000", ["1000"], (1, 1, 1)),
        ("Björk", ["Bjork"], (0, 0, 0)),
        ("yes", ["no"], (0, 0, 0)),
        ("yes it is", ["yes"], (0, 0, 1)),
        ("Paris", ["London", "paris."], (1, 1, 1)),
        ("U.S.A.", ["USA"], (1, 1, 1)),
        ("An A", ["a"], (0, 0, 0)),
    ],
)
def test_scores_are_taken_from_the_text(make_trajectory, answer, golds, scores):
    trajectory = make_trajectory(answer=answer, reward_parts={"exact_match": 0.123})
    trajectory.sample.golden_answers = golds
    found = scored(trajectory)
    assert (found.exact_match, found.f1, found.substring_match) == pytest.approx(scores)


def test_an_example_in_the_retrieved_text_scores_nothing(make_trajectory):
    trajectory = make_trajectory()
    trajectory.turns[0].tool_text = "<answer> Ann Lee </answer>"
    trajectory.turns[1].policy_text = "I do not know"
    assert scored(trajectory).exact_match == 0


def test_per_set_macro_and_all(make_trajectory):
    rows = [make_trajectory(i, source="NQ", right=i < 1) for i in range(4)]
    rows += [make_trajectory(4 + i, source="my set", right=True) for i in range(2)]
    found = summarise([scored(row) for row in rows], seed=0, resamples=500)
    assert [(one.name, one.questions) for one in found.sets] == [("nq", 4), ("my set", 2)]
    assert [one.scores["exact_match"].mean for one in found.sets] == [0.25, 1]
    assert found.macro["exact_match"].mean == 0.625
    assert found.overall.scores["exact_match"].mean == 0.5
    value = found.sets[0].scores["exact_match"]
    assert 0 <= value.low < 0.25 < value.high <= 1
    macro = found.macro["exact_match"]
    # The second set has no spread: the average's interval is half the first one's around it.
    assert macro.high - macro.low == pytest.approx((value.high - value.low) / 2)
    assert "judge" not in found.overall.scores


def test_several_rollouts_give_avg_and_pass_at_k(make_trajectory):
    right = {0: [True, False, False, False], 1: [True, True, True, True], 2: [False] * 4}
    rows = [make_trajectory(i, rollout_id=r, right=ok) for i, oks in right.items() for r, ok in enumerate(oks)]
    found = summarise([scored(row) for row in rows])
    assert found.group_size == 4
    scores = found.overall.scores
    assert scores["exact_match"].mean == pytest.approx((0.25 + 1 + 0) / 3)
    assert scores["pass@2"].mean == pytest.approx((0.5 + 1 + 0) / 3)
    assert scores["pass@4"].mean == pytest.approx(2 / 3)
    assert (found.overall.questions, found.overall.attempts) == (3, 12)


def test_a_judge_is_a_score_only_if_it_was_asked_about_every_rollout(make_trajectory):
    parts = {"reward": 0.0, "exact_match": 0.0, "term/judge": 1.0}
    rows = [make_trajectory(0, reward_parts=parts), make_trajectory(1, reward_parts=parts)]
    assert summarise([scored(row) for row in rows]).overall.scores["judge"].mean == 1
    rows.append(make_trajectory(2))
    assert "judge" not in summarise([scored(row) for row in rows]).overall.scores


def test_facts(make_trajectory):
    lost = make_trajectory(1, right=False, stop="length")
    lost.turns[0].tool_error = "no answer"
    lost.turns[1].action = "invalid"
    facts = summarise([scored(make_trajectory(0)), scored(lost)]).overall.facts
    assert facts["searches"] == 1
    assert facts["turns"] == 2
    assert facts["response_length"] == 10
    assert facts["policy_tokens"] == 7
    assert facts["invalid_rate"] == 0.25
    assert facts["truncated"] == facts["answered"] == 0.5
    assert facts["tool_failure_rate"] == 0.5
    assert facts["failed"] == 0


def test_flat_metrics_hold_what_a_training_runs_evaluation_logs(make_trajectory):
    rows = [make_trajectory(i, source=source, right=i % 2 == 0) for i, source in enumerate(["nq", "nq", "one_hop"])]
    flat = flat_metrics(summarise([scored(row) for row in rows]))
    logged = validation_metrics(rows)
    assert {name: flat[name] for name in logged} == logged
