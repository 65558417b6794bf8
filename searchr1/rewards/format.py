"""The format reward of Search-R1 v0.3: what the answer is worth, and how it was reached."""

from __future__ import annotations

import re
from collections.abc import Sequence

from searchr1.agent.loop import END_TOKENS
from searchr1.agent.protocol import TAGS, frame
from searchr1.agent.trajectory import Trajectory, Turn
from searchr1.config.schema_reward import RewardConfig
from searchr1.rewards import answers
from searchr1.rewards.matching import any_stands_in, evidence_of
from searchr1.rewards.types import RewardFn

_OPENS_THINKING = frame("rlinf")[1]
"""The environment's own way of opening the next turn; retrieved text cannot stand so late in a tool text."""
_NO_TAG = rf"(?:(?!</?(?:{'|'.join(TAGS)})>).)*"
_THOUGHT = rf"\s*<think>{_NO_TAG}</think>\s*"
# Possessive: many blanks before something else must not be tried in every division.
_END = rf"\s*+(?:{'|'.join(map(re.escape, END_TOKENS))})?\s*+"
_CALL = re.compile(rf"{_THOUGHT}<(search|access)>{_NO_TAG}</\1>{_END}", re.DOTALL)
_ANSWER = re.compile(rf"{_THOUGHT}<answer>{_NO_TAG}</answer>{_END}", re.DOTALL)


def valid_format(turns: Sequence[Turn]) -> bool:
    """Return whether the turns are what the method asks for.

    Every turn but the last is `<think>…</think>` and one `<search>…</search>` (or `<access>`) that the environment answered,
    the last is `<think>…</think><answer>…</answer>`: only blanks between the tags and no tag inside them, and the
    model's own end token at the end. Of the
    environment's text it only matters that it is there, and whether its frame has opened `<think>` for the policy.
    """
    opened = ""
    for turn in turns[:-1]:
        called = turn.action in ("search", "access") and bool(turn.tool_text)
        if not called or _CALL.fullmatch(opened + turn.policy_text) is None:
            return False
        opened = "<think>" if turn.tool_text.endswith(_OPENS_THINKING) else ""
    return bool(turns) and _ANSWER.fullmatch(opened + turns[-1].policy_text) is not None


def make(config: RewardConfig) -> RewardFn:
    """Return the reward, with s = `structure_score`, f = `final_format_score`, r = `retrieval_score` (arXiv 2505.15117):

        right and valid        1
        right and invalid      1 - s
        wrong and valid        s, and r besides if a gold answer stands in what was retrieved
        wrong and invalid      f
        no complete answer     0

    https://arxiv.org/abs/2505.15117. Parts: `valid_format`, `gold_retrieved`.
    """
    values = config.format

    def format_reward(policy_text: str, golden_answers: Sequence[str], trajectory: Trajectory) -> dict[str, float]:
        valid = valid_format(trajectory.turns)
        retrieved = any_stands_in(golden_answers, evidence_of(trajectory))
        answer = answers.answer_of(policy_text)
        if answers.exact_match(answer, golden_answers):
            reward = 1.0 if valid else 1.0 - values.structure_score
        elif valid:
            reward = values.structure_score + values.retrieval_score * retrieved
        else:
            reward = 0.0 if answer is None else values.final_format_score
        return {"reward": reward, "valid_format": float(valid), "gold_retrieved": float(retrieved)}

    return format_reward
