"""RLinf's `grpo_dynamic`: GRPO whose loss scales weight agents and turns."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from searchr1.algorithms.advantages.grpo import grpo
from searchr1.algorithms.advantages.inputs import AdvantageInputs, AdvantageSettings
from searchr1.errors import UserError

LOSS_SCALES = ("group_level", "agent_level", "turn_level")
"""Accepted `algorithm.loss_scales`, in the order in which they must be given."""


def grpo_dynamic(inputs: AdvantageInputs, settings: AdvantageSettings) -> Tensor:
    """RLinf's name for GRPO over trajectories whose turns may be separate sequences of several agents.

    Its loss scales weight a turn by 1 / (agents of the trajectory) and by its share of the agent's tokens. Here a
    trajectory is one sequence with all its turns and one agent, so every scale is exactly 1 and the result is
    plain GRPO.

    Raises:
        UserError: `advantage_mode` is not `trajectory`, or `loss_scales` is not the beginning of
            `[group_level, agent_level, turn_level]`.
    """
    if settings.mode != "trajectory":
        raise UserError(
            "algorithm.advantage_mode",
            f"'{settings.mode}' is not supported: a trajectory is trained as one sequence; use 'trajectory'",
        )
    check_loss_scales(settings.loss_scales)
    return grpo(inputs, settings)


def check_loss_scales(names: Sequence[str]) -> None:
    """Make sure that `algorithm.loss_scales` is one of RLinf's.

    Raises:
        UserError: it is not the beginning of `LOSS_SCALES`.
    """
    if tuple(names) != LOSS_SCALES[: len(names)]:
        raise UserError(
            "algorithm.loss_scales", f"{list(names)} must be the beginning of {list(LOSS_SCALES)}, in that order"
        )
