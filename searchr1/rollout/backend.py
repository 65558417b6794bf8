"""What the engine's thread drives: a synchronous engine that is stepped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from searchr1.agent.settings import FinishReason, GenerateParams
from searchr1.rollout.weights import WeightManifest

OnText = Callable[[str], None]
"""Told the text so far of a generation that goes on."""


@dataclass(slots=True)
class Finished:
    """A request that ended."""

    request_id: str
    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    prompt_logprobs: list[float] | None


WEIGHTS, KV_CACHE = "weights", "kv_cache"
"""What of an engine's memory wakes by itself; vLLM's names."""


class Backend(Protocol):
    """What the engine's thread drives; `VllmBackend` is the one in use."""

    @property
    def has_work(self) -> bool:
        """True while a request is unfinished."""

    def add(self, request_id: str, prompt_ids: list[int], params: GenerateParams, on_text: OnText | None = None) -> None:
        """Queues a generation; `on_text` is called in `step` whenever it has grown and not ended."""

    def add_scoring(self, request_id: str, token_ids: list[int]) -> None:
        """Queues the scoring of given tokens."""

    def step(self) -> list[Finished]:
        """Runs the model once; returns what ended."""

    def take_ended(self) -> list[Finished]:
        """Return, once, the requests that ended in a call other than `step`, which waited for what was on the device."""

    def abort(self, request_ids: list[str]) -> list[Finished]:
        """Ends requests; returns what they had."""

    def load_weights(self, bucket: WeightManifest) -> list[str]:
        """Replace the weights between two steps and empty the caches; from the first bucket to the last nothing may run.

        Once it returns, the bucket's buffer may be written again. Returns what made it slower than it should be.
        """

    def load_adapter(self, folder: str, version: int) -> None:
        """Replaces the LoRA adapter between two steps and empties the caches."""

    def reset_prefix_cache(self) -> None:
        """Forgets cached prompts."""

    def sleep(self, level: int) -> None:
        """Hand memory back."""

    def wake(self, tags: tuple[str, ...]) -> None:
        """Take the memory of `tags` again."""

    def close(self) -> None:
        """Frees everything."""
