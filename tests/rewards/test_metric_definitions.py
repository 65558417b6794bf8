"""The published definitions of exact match, F1 and substring match, on cases where implementations go apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1.rewards.answers import exact_match, f1_score, normalise, substring_match

CASES = [
    # answer, gold answers, exact match, F1, substring match
    # Articles: words of their own, after punctuation has gone.
    ("The Lord of the Rings", ["Lord of Rings"], 1, 1, 1),
    ("a-ha", ["aha"], 1, 1, 1),
    ("A. A. Milne", ["Milne"], 1, 1, 1),  # initials that are articles go
    ("Vitamin A", ["vitamin"], 1, 1, 1),
    ("Theresa May", ["resa May"], 0, 1 / 2, 1),  # a substring of characters, not of words
    # Punctuation: ASCII's only, and it leaves no blank.
    ("rock 'n' roll", ["rock n roll"], 1, 1, 1),
    ("Jean-Paul Sartre", ["Jean Paul Sartre"], 0, 2 / 5, 0),
    ("AC/DC", ["ACDC"], 1, 1, 1),
    ("snake_case", ["snakecase"], 1, 1, 1),
    ("O’Brien", ["O'Brien"], 0, 0, 0),
    ("1914–1918", ["1914-1918"], 0, 0, 0),
    ("“Yesterday”", ["Yesterday"], 0, 0, 1),
    # Characters beyond ASCII: compared as they are, blanks of any kind are blanks.
    ("Beyoncé", ["BEYONCÉ"], 1, 1, 1),
    ("Beyonce\u0301", ["Beyonc\u00e9"], 0, 0, 0),
    ("New\u00a0York", ["New York"], 1, 1, 1),
    ("New\u3000York", ["new york"], 1, 1, 1),
    ("Straße", ["Strasse"], 0, 0, 0),
    ("北京", ["北京市"], 0, 0, 0),
    ("北京市", ["北京"], 0, 0, 1),
    # Numbers: signs and separators are punctuation, digits are letters.
    ("1,234,567", ["1234567"], 1, 1, 1),
    ("3.14", ["314"], 1, 1, 1),
    ("$100", ["100%"], 1, 1, 1),
    ("-5", ["5"], 1, 1, 1),
    ("1990s", ["1990"], 0, 0, 1),
    ("2", ["two"], 0, 0, 0),
    ("10 million", ["10,000,000"], 0, 0, 0),
    ("May 5, 1990", ["5 May 1990"], 0, 1, 0),
    # Several gold answers: the best of them, each on its own.
    ("JFK", ["John F. Kennedy", "JFK", "Kennedy"], 1, 1, 1),
    ("John Kennedy", ["John F. Kennedy", "JFK"], 0, 4 / 5, 0),
    ("Paris and London", ["Paris", "London"], 0, 1 / 2, 1),
    ("Ann", ["", "Ann"], 1, 1, 1),
    # Words that repeat.
    ("Duran", ["Duran Duran"], 0, 2 / 3, 0),
    ("Duran Duran Duran", ["Duran Duran"], 0, 4 / 5, 1),
    # HotpotQA's rule: yes, no and noanswer earn F1 only whole; anywhere else they are words.
    ("Yes.", ["yes"], 1, 1, 1),
    ("yes, both are", ["yes"], 0, 0, 1),
    ("No", ["yes"], 0, 0, 0),
    ("no", ["no one"], 0, 0, 0),
    ("no one", ["no"], 0, 0, 1),
    ("noanswer", ["noanswer given"], 0, 0, 0),
    ("No Doubt", ["no doubt band"], 0, 4 / 5, 0),
    ("yes", ["no", "yes"], 1, 1, 1),
    # Nothing is left of the answer.
    ("", ["Ann"], 0, 0, 0),
    ("the...", ["Ann"], 0, 0, 0),
]


@pytest.mark.parametrize(("answer", "golds", "exact", "token_f1", "substring"), CASES)
def test_tricky_answers(answer: str, golds: list[str], exact: int, token_f1: float, substring: int) -> None:
    assert exact_match(answer, golds) == exact
    assert f1_score(answer, golds) == pytest.approx(token_f1)
    assert substring_match(answer, golds) == substring


answers = st.lists(
    st.sampled_from("a an the yes no noanswer Ann ann's ann 3.1 31 é ’ - 北京 The_End".split()), max_size=5
).map(" ".join) | st.text(max_size=12)


@given(answers, answers)
def test_squads_script_says_the_same(answer: str, gold: str) -> None:
    """Against the copy of SQuAD's script in transformers; the two rules beyond SQuAD are the exceptions."""
    from transformers.data.metrics import squad_metrics

    assert normalise(answer) == squad_metrics.normalize_answer(answer)
    if not normalise(gold):
        return  # here an empty answer must not be right; SQuAD has questions without an answer
    assert exact_match(answer, [gold]) == squad_metrics.compute_exact(gold, answer)
    if {normalise(answer), normalise(gold)} & {"yes", "no", "noanswer"}:
        assert f1_score(answer, [gold]) == exact_match(answer, [gold])  # HotpotQA's rule
    else:
        assert f1_score(answer, [gold]) == pytest.approx(squad_metrics.compute_f1(gold, answer))
