"""What the environment retrieved in a trajectory, and whether an answer stands in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from searchr1.agent.protocol import NO_RESULTS
from searchr1.agent.trajectory import Trajectory
from searchr1.rewards.answers import normalise

# Our frame and labels are no evidence: an answer "2" must not be found in "Doc 2".
_LABEL = re.compile(r"^Doc \d+\(Title: |^\[Doc \d+\]\([^)\n]*\):|^>>>> Page \d+ >>>>$", re.MULTILINE)
_FRAME = re.compile(r"\A\s*<information>|</information>\s*(?:<think>\s*)?\Z")
# Letters that make words with blanks between them. Others (東京) may be followed by anything.
_SPACED = "0-9a-z\u00c0-\u024f\u0370-\u052f"


def evidence_of(trajectory: Trajectory) -> list[str]:
    """The normalised text of every answered tool call, without the environment's own words."""
    texts = []
    for turn in trajectory.turns:
        if not turn.queries or turn.tool_error is not None:
            continue
        body = _FRAME.sub("", turn.tool_text).strip()
        if body and body != NO_RESULTS:
            texts.append(normalise(_LABEL.sub("", body)))
    return texts


def stands_in(answer: str, evidence: Iterable[str]) -> bool:
    """Whether the normalised answer stands in a text of `evidence`, as whole words."""
    wanted = normalise(answer)
    if not wanted:
        return False
    before = f"(?<![{_SPACED}])" if re.match(f"[{_SPACED}]", wanted) else ""
    after = f"(?![{_SPACED}])" if re.match(f"[{_SPACED}]", wanted[-1]) else ""
    pattern = re.compile(before + re.escape(wanted) + after)
    return any(pattern.search(text) for text in evidence)


def any_stands_in(golden_answers: Iterable[str], evidence: Sequence[str]) -> bool:
    """Whether any of them does."""
    return any(stands_in(gold, evidence) for gold in golden_answers)
