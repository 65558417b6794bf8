"""What is wrong with an evaluation's configuration, across sections."""

from __future__ import annotations

from collections.abc import Iterator

from searchr1.config.load import Problem
from searchr1.config.schema import Config

METHODS = ("direct", "cot", "rag", "search")


def check_evaluation(config: Config) -> Iterator[Problem]:
    """Every problem."""
    methods = config.evaluation.methods
    key = "evaluation.methods"
    if not methods:
        yield Problem(key, f"is empty; name any of {', '.join(METHODS)}")
    for name in dict.fromkeys(methods):
        if name not in METHODS:
            yield Problem(key, f"{name!r} is not one of {', '.join(METHODS)}")
        if methods.count(name) > 1:
            yield Problem(key, f"{name} stands there twice")
    if "rag" in methods and config.tools.search.dummy_mode:
        yield Problem("tools.search.dummy_mode", "must be False: evaluation.methods has rag, which needs a retrieval server")
    if config.agentloop.generate_fn and set(methods) - {"search"}:
        yield Problem("agentloop.generate_fn", "is a loop of your own, which evaluation.methods: [search] alone can use")
    if config.evaluation.judge and not config.reward.judge.base_url:
        yield Problem("reward.judge.base_url", "is empty, and evaluation.judge is True; give the judge's address")
    if config.runner.resume_dir not in (None, "auto"):
        yield Problem("runner.resume_dir", "an evaluation goes on by itself in its own folder; leave it out, or give auto")
