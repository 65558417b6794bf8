"""What a generation is asked for and what comes back: the seam between the agent loop and an engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from searchr1.agent.protocol import InformationStyle, ToolcallParser, TruncateSide
from searchr1.agent.trajectory import Mode

if TYPE_CHECKING:
    from searchr1.config.schema import Config

ToolTextTokens = Literal["parts", "whole"]
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


class Engine(Protocol):
    """What the agent loop needs of a rollout engine."""

    async def generate(self, prompt_ids: list[int], params: GenerateParams) -> Generation:
        """Sample one continuation of `prompt_ids`."""
        ...


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """Everything the loop goes by."""

    sampling: GenerateParams
    """`max_new_tokens` is the limit of the whole response; the loop sets limit and seed of each generation."""
    max_model_len: int
    """Prompt and response tokens together."""
    max_turns: int = 2
    """Turns that may call a tool."""
    force_final_turn: bool = True
    """After them, generate once more without tools."""
    max_new_tokens_per_turn: int | None = None
    max_tool_response_length: int = 500
    """Tokens of a tool text between its tags."""
    truncate_side: TruncateSide = "right"
    information_style: InformationStyle = "searchr1"
    invalid_action_message: str = ""
    toolcall_parser: ToolcallParser = "tags"
    no_call_ends: bool = False
    """A turn without a tool call ends the rollout."""
    end_token_ends: bool = True
    """A turn that calls nothing and ends with an end token ends the rollout."""
    no_results_message: str | None = None
    """What a search shows that found nothing; None is the usual text."""
    tool_text_tokens: ToolTextTokens = "parts"
    """Whether tags and body are tokenized apart, or the tool text as one string."""
    tool_timeout_s: float = 60.0
    """A tool that keeps no deadline of its own is given up after this."""

    @classmethod
    def from_config(cls, config: Config, mode: Mode) -> AgentSettings:
        """Return the settings of a run's training or evaluation rollouts."""
        algorithm, agent = config.algorithm, config.agentloop
        sampling = algorithm.sampling_params
        if mode == "eval":
            greedy = replace(sampling, do_sample=False)
            sampling = algorithm.eval_sampling_params or greedy
        params = GenerateParams(
            max_new_tokens=sampling.max_new_tokens or config.runner.seq_length,
            min_new_tokens=sampling.min_new_tokens,
            temperature=sampling.temperature if sampling.do_sample else 0.0,
            top_p=sampling.top_p if sampling.do_sample else 1.0,
            top_k=sampling.top_k if sampling.do_sample else -1,
            repetition_penalty=sampling.repetition_penalty,
            stop=tuple(sampling.stop),
        )
        return cls(
            sampling=params,
            max_model_len=config.runner.seq_length,
            max_turns=agent.max_turns,
            force_final_turn=agent.force_final_turn,
            max_new_tokens_per_turn=agent.max_new_tokens_per_turn,
            max_tool_response_length=agent.max_tool_response_length,
            truncate_side=agent.tool_response_truncate_side,
            information_style=agent.information_style,
            invalid_action_message=agent.invalid_action_message,
            toolcall_parser=agent.toolcall_parser,
            no_call_ends=agent.no_call_ends,
            end_token_ends=agent.end_token_ends,
            no_results_message=agent.no_results_message,
            tool_text_tokens=agent.tool_text_tokens,
            tool_timeout_s=2 * config.tools.search.timeout_s,
        )
