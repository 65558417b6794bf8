"""The check after the first weight update: what counts as rounding, and what as another model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from searchr1.errors import UserError
from searchr1.runner.weight_sync import actor_logprobs, validate_weights

PROBE = [[5, 6, 7], [8, 9]]


def groups_that_differ_by(gap: float) -> SimpleNamespace:
    """An actor, and two engines of which the second one differs at one token."""

    def group(*answers):
        return SimpleNamespace(call=lambda method, probe: SimpleNamespace(wait=lambda timeout_s: list(answers)))

    ours = [[0.0, -1.5, -2.0], [0.0, -0.5]]
    return SimpleNamespace(actor=group(ours), rollout=group(ours, [[0.0, -1.5, -2.0 + gap], [0.0, -0.5]]))


@pytest.mark.parametrize("precisions", [("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "bf16")])
def test_rounding_of_the_coarser_side_is_no_difference(precisions):
    groups = groups_that_differ_by(0.02)
    assert validate_weights(groups, PROBE, actor_logprobs(groups, PROBE, 1.0), precisions, 1.0) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("gap", "precisions"), [(0.02, ("fp32", "fp32")), (0.4, ("fp32", "bf16")), (float("nan"), ("bf16", "bf16"))]
)
def test_more_than_rounding_ends_the_run(gap, precisions):
    groups = groups_that_differ_by(gap)
    expected = actor_logprobs(groups, PROBE, 1.0)
    with pytest.raises(UserError, match="validate_weight_first_sync"):
        validate_weights(groups, PROBE, expected, precisions, 1.0)
