"""The `evaluation` section of a run's YAML: what `searchr1 eval` compares (docs/evaluation.md)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class EvaluationConfig:
    """`searchr1 eval`; how often and how greedily is `algorithm.group_size` and `algorithm.eval_sampling_params`."""

    methods: list[str] = field(default_factory=lambda: ["search"])
    """Any of `direct`, `cot`, `rag` (one retrieval, passages in the prompt) and `search` (the loop), on the same model."""
    untagged: str = "reject"
    """An attempt without an answer tag whose last turn has no tag at all is wrong (`reject`), or is scored by that turn's
    text (`text`), so that base models and other formats can be compared."""
    judge: bool = False
    """Also ask the judge of `reward.judge` about every answer."""
