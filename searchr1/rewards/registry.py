"""Reward functions by name or dotted path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from searchr1.config.schema_reward import RewardConfig
from searchr1.errors import UserError
from searchr1.importing import import_function, is_dotted_path
from searchr1.rewards.format import make as make_format
from searchr1.rewards.judge import make as make_judge
from searchr1.rewards.matching import citation_reward, exact_match_reward, f1_reward, substring_reward
from searchr1.rewards.types import RewardFn, RewardMaker

REWARDS: dict[str, RewardFn] = {
    "searchr1": exact_match_reward,
    "exact_match": exact_match_reward,
    "f1_score": f1_reward,
    "substring_match": substring_reward,
    "citation": citation_reward,
}
"""By the names that the YAML and a row's own reward may use."""

CONFIGURED: dict[str, RewardMaker] = {
    "searchr1_format": make_format,
    "exact_match_format": make_format,
    "judge": make_judge,
}
"""Those that the YAML's `reward` section says more about."""


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward function that was found."""

    name: str
    function: RewardFn
    custom: bool
    """True for a user's own, of which nobody knows how long it takes."""


def find_reward(name: str, config: RewardConfig, key: str = "reward.reward_type") -> Reward:
    """Return the reward behind a known name or a dotted path (`package.module:function`); `key` is named in errors.

    Raises:
        UserError: neither, or the `reward` section says too little for it.
    """
    if name in REWARDS:
        return Reward(name, REWARDS[name], custom=False)
    if name in CONFIGURED:
        return Reward(name, CONFIGURED[name](config), custom=False)
    return Reward(name, _imported(name, key), custom=True)


def require_known(name: str, key: str = "reward.reward_type") -> None:
    """Make sure that a name or dotted path leads to a reward, without making it.

    Raises:
        UserError: it does not.
    """
    if name not in REWARDS and name not in CONFIGURED:
        _imported(name, key)


def _imported(name: str, key: str) -> RewardFn:
    if is_dotted_path(name):
        return cast(RewardFn, import_function(name, key))
    known = ", ".join([*REWARDS, *CONFIGURED])
    raise UserError(key, f"{name!r} is not known; use one of {known}, or package.module:function")
