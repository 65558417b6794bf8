"""Turn credit says nothing of the decision to search again: every group of a toy policy, enumerated."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from searchr1.algorithms.advantages.turn import turn_advantages

SEARCH, FINDS, ATTEMPTS = 0.5, 0.6, 4
OUTCOMES = {(True, 1.0): SEARCH * FINDS, (True, 0.0): SEARCH * (1 - FINDS), (False, 0.0): 1 - SEARCH}
"""(the attempt searched, its search found a gold answer): probability."""


def expected_gradient(credit):
    """E of the mean over attempts of credit * d log P(decision) / d logit; `credit` gives one number per attempt."""
    total = 0.0
    for group in itertools.product(OUTCOMES, repeat=ATTEMPTS):
        chance = math.prod(OUTCOMES[outcome] for outcome in group)
        scores = [(1 - SEARCH) if searched else -SEARCH for searched, _ in group]
        total += chance * sum(s * c for s, c in zip(scores, credit(group), strict=True)) / ATTEMPTS
    return total


def turn_credit(group):
    """What the rule gives the turn in which the decision fell, where the attempts as wholes are worth nothing."""
    rewards = [[found, 0.0] if searched else [0.0] for searched, found in group]
    per_turn = turn_advantages(torch.zeros(len(group)), rewards, torch.zeros(len(group), dtype=torch.int64), 1.0)
    return [turns[0] for turns in per_turn]


def among_all(group):
    """Each attempt against the mean of the others; one that did not search counts 0."""
    worth = [found for _, found in group]
    return [w - (sum(worth) - w) / (len(worth) - 1) for w in worth]


def true_gradient(step=1e-5):
    """d/d logit of P(search) * P(finds), by central differences."""
    logit = math.log(SEARCH / (1 - SEARCH))

    def objective(at):
        return FINDS / (1 + math.exp(-at))

    return (objective(logit + step) - objective(logit - step)) / (2 * step)


def test_turn_credit_has_no_effect_on_the_decision_to_search():
    assert true_gradient() == pytest.approx(0.15, abs=1e-9)
    assert expected_gradient(turn_credit) == pytest.approx(0, abs=1e-12)
    # The enumeration sees a gradient where there is one.
    assert expected_gradient(among_all) == pytest.approx(0.15, abs=1e-12)


def test_it_is_zero_in_every_group_and_still_reports_good_searches_from_bad_ones():
    for group in itertools.product(OUTCOMES, repeat=ATTEMPTS):
        credit = turn_credit(group)
        assert sum(c for c, (searched, _) in zip(credit, group, strict=True) if searched) == pytest.approx(0, abs=1e-12)
        assert all(c == 0 for c, (searched, _) in zip(credit, group, strict=True) if not searched)
    good, bad, *_ = turn_credit([(True, 1.0), (True, 0.0), (False, 0.0), (False, 0.0)])
    assert good > 0 > bad
