"""What a generation is asked for and what comes back: the seam between the agent loop and an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class GenerateParams:
    """How to sample one generation."""

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 (or anything at least as large as the vocabulary) means off."""
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    """Strings that end the generation; they stay in its text and in its tokens."""
    seed: int | None = None
    """With a seed the samples depend only on weights, prompt and seed, not on what else is running."""


@dataclass(slots=True)
class Generation:
    """One finished generation."""

    token_ids: list[int]
    """Exactly what was sampled; a stop string may end inside the last token, which stays whole."""
    logprobs: list[float]
    """One per token, under the sampling distribution."""
    text: str
    """Text up to and including the stop string."""
    finish_reason: FinishReason
    weight_version: int
