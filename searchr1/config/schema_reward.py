"""The sections `reward`, `evaluation` and `runner.health` of a run's YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class FormatRewardConfig:
    """Values of `searchr1_format`."""

    structure_score: float = 0.2
    """A valid trajectory with a wrong answer; a right answer in an invalid one loses as much."""
    final_format_score: float = 0.1
    """An invalid trajectory whose answer is wrong, but an answer."""
    retrieval_score: float = 0.0
    """On top of `structure_score` if a gold answer is among the retrieved text."""


@dataclass
class JudgeConfig:
    """A language model that compares answers, behind OpenAI's chat API."""

    base_url: str = ""
    """As in OpenAI's clients: `http://host:port/v1`."""
    model: str = ""
    """Name of the model at that address."""
    api_key_env: str | None = None
    """Environment variable that holds the key; null sends none."""
    timeout_s: float = 120.0
    """Deadline of one verdict, retries included, from when its turn has come; one request gets at most a third of it."""
    concurrency: int = 16
    """Requests at once, of each reward process."""
    cache_path: str | None = None
    """SQLite file of earlier verdicts, on a local disk; null asks anew."""
    prompt: str | None = None
    """The judge's instructions (question and answers follow as JSON); null is searchr1/rewards/judge.py's."""
    request: dict[str, Any] = field(default_factory=dict)
    """Further fields of the request, such as `max_completion_tokens`; null leaves one of ours out."""


@dataclass
class LengthPenaltyConfig:
    """Soft punishment of long responses (DAPO)."""

    max_length: int = 0
    """Tokens from which the whole penalty is due: the response's limit."""
    overlong_buffer: int = 0
    """The penalty grows from 0 over the last so many tokens before `max_length`."""
    penalty_factor: float = 1.0
    """The whole penalty."""
    tokens: Literal["response", "policy"] = "response"
    """What is counted: `response` (retrieved text included, as the limit does) or `policy`."""


@dataclass
class SearchPenaltyConfig:
    """Punishment of many searches."""

    free_searches: int = 0
    """Queries of a trajectory that cost nothing."""
    per_search: float = 0.0
    """What each further query costs."""


@dataclass
class RewardConfig:
    """The reward group."""

    group_name: str = "RewardGroup"
    """Name of the worker group."""
    reward_type: str = "searchr1"
    """Name of a reward (docs/guides/rewards.md) or the dotted path of a function; without effect if `weights` is set."""
    weights: dict[str, Any] = field(default_factory=dict)
    """A weighted sum instead: names or dotted paths -> weights; a weight of 0 only reports."""
    reward_scale: float = 1.0
    """Multiplies every reward, penalties included."""
    concurrency: int = 64
    """Trajectories that a reward process scores at once."""
    format: FormatRewardConfig = field(default_factory=FormatRewardConfig)
    """See `FormatRewardConfig`."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """See `JudgeConfig`."""
    length_penalty: LengthPenaltyConfig | None = None
    """See `LengthPenaltyConfig`; null is off."""
    search_penalty: SearchPenaltyConfig | None = None
    """See `SearchPenaltyConfig`; null is off."""


@dataclass
class EvaluationConfig:
    """`searchr1 eval`; how often and how greedily is `algorithm.group_size` and `algorithm.eval_sampling_params`."""

    methods: list[Literal["direct", "cot", "rag", "search"]] = field(default_factory=lambda: ["search"])
    """Any of `direct`, `cot`, `rag` (one retrieval, passages in the prompt) and `search` (the loop), on the same model."""
    untagged: Literal["reject", "text"] = "reject"
    """A rollout without an answer tag whose last turn has no tag at all is wrong (`reject`), or is scored by that turn's
    text (`text`), so that base models and other formats can be compared."""
    judge: bool = False
    """Also ask the judge of `reward.judge` about every answer."""


@dataclass
class HealthConfig:
    """Limits that a healthy run keeps (docs/guides/health.md); null turns one off."""

    entropy_min: float | None = 0.005
    """Entropy of a sampled token in nats, at least."""
    entropy_max: float | None = 3.0
    """The same, at most."""
    length_ratio_max: float | None = 3.0
    """Policy tokens of a response divided by their running median, at most."""
    length_ratio_min: float | None = 0.25
    """The same, at least."""
    truncated_max: float | None = 0.9
    """Share of trajectories that ran out of tokens, at most."""
    invalid_max: float | None = 0.5
    """Share of turns without a valid action, at most."""
    mismatch_kl_max: float | None = 0.05
    """KL of engine and actor per token (`mismatch/kl_k3`), at most."""
    effective_sample_size_min: float | None = 0.5
    """Effective share of the sampled tokens under the actor's weights, at least."""
    grad_norm_ratio_max: float | None = 10.0
    """Gradient norm divided by its running median, at most."""
    skipped_max: float | None = 0.5
    """Share of a step's updates that were left out because a gradient was not finite, at most."""
    uniform_groups_max: float | None = 0.95
    """Share of groups whose rollouts all earned the same reward, at most."""
    reward_ratio_min: float | None = 0.4
    """Mean reward of five steps divided by the best such mean, at least."""
    window: int = 20
    """Healthy steps that a running median is taken over."""
    min_history: int = 5
    """Healthy steps that a running median needs."""
    patience: int = 5
    """Unhealthy steps in a row that end the run."""
    warn_only: bool = False
    """Warn, but never end the run."""
    save_unhealthy: bool = False
    """Write checkpoints at unhealthy steps too."""
