"""Differences between two configurations, and whether each changes what a run learns. Pure functions of plain trees."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from searchr1.config.retired import RETIRED
from searchr1.config.schema import Config

Tree = Mapping[str, Any]

HARMLESS = {
    "runner.output_dir": "where the run's files are",
    "runner.experiment_name": "where the run's files are",
    "runner.max_steps": "where the run ends",
    "runner.max_epochs": "where the run ends",
    "runner.logger.*": "what is logged, and where",
    "runner.health.*": "when a run is stopped",
    "runner.step_timeout_s": "when a run is stopped",
    "runner.save_interval": "which checkpoints are kept",
    "runner.keep_checkpoints": "which checkpoints are kept",
    "runner.async_save": "how checkpoints are written",
    "runner.val_check_interval": "when the run is evaluated",
    "runner.val_before_train": "when the run is evaluated",
    "data.val_rollout_batch_size": "how an evaluation is cut into batches",
    "data.train_data_paths": "a checkpoint holds a hash of the questions themselves; others are rejected",
    "cluster.num_nodes": "which machines it runs on",
    "cluster.component_placement": "which machines it runs on",
    "cluster.component_placement.*": "which machines it runs on",
    "cluster.slots": "which machines it runs on",
    "*.group_name": "names of worker groups",
    "tools.search.server_addr": "where the retrieval server is",
    "tools.search.timeout_s": "how long a tool call may take",
    "tools.search.retries": "how long a tool call may take",
    "tools.search.max_failure_rate": "when a run is stopped",
    "reward.concurrency": "how many rewards are computed at once",
    "reward.judge.base_url": "where the judge is",
    "reward.judge.api_key_env": "where the judge is",
    "reward.judge.timeout_s": "how long a verdict may take",
    "reward.judge.concurrency": "how many verdicts are asked for at once",
    "reward.judge.cache_path": "where verdicts are kept",
    "actor.calculate_flops": "what is logged",
    "evaluation.*": "read by searchr1 eval only",
    "vars.*": "has an effect only through the keys that refer to it, which are compared themselves",
}
"""Keys (patterns) whose change is listed apart, with the reason: none of them changes a gradient."""

NOT_COMPARED = ("runner.resume_dir", "runner.overwrite", "vars.unused_keys", "vars.given_keys")
"""Keys about how the command was called, and notes of the loader: no settings of the run."""

LENGTH_KEYS = ("runner.max_steps", "runner.max_epochs")
"""Harmless keys that change the learning rate where a schedule spans the whole run."""

MAX_VALUE_CHARS = 160
"""Length limit of a value in a message, in characters."""


class _NotSet:
    def __repr__(self) -> str:
        return "not set"


NOT_SET = _NotSet()
"""Placeholder value of a key that one of the two trees lacks."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One key with two values."""

    key: str
    old: Any
    new: Any
    harmless: bool
    """Whether the change has no effect on what is learned."""

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)}"


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Flatten nested values into `{dotted key: value}`; lists are values, empty sections are dropped."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def differences(old: Tree, new: Tree) -> list[Difference]:
    """Return every key whose value differs, sorted by name.

    A key that only one of the trees has counts as its default in the other, so that a tree written before a key existed
    does not differ in it. Retired keys are not compared.
    """
    before, after = flatten(old), flatten(new)
    defaults = flatten(dataclasses.asdict(Config()))
    stretched = _rates_follow_length(after)
    changes = []
    for key in sorted({*before, *after}):
        if key in NOT_COMPARED or key in RETIRED:
            continue
        value, other = before.get(key, defaults.get(key, NOT_SET)), after.get(key, defaults.get(key, NOT_SET))
        if value != other or isinstance(value, bool) != isinstance(other, bool):
            changes.append(Difference(key, value, other, _is_harmless(key) and not (stretched and key in LENGTH_KEYS)))
    # A section that became null, or the other way round, is listed by its keys already.
    sections = {key.rpartition(".")[0] for key in {*before, *after}}
    return [d for d in changes if not (NOT_SET in (d.old, d.new) and (d.key in sections or d.old in (None, "")))]


def _is_harmless(key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in HARMLESS)


def _rates_follow_length(flat: Tree) -> bool:
    """Return whether a learning rate depends on how long the run is."""
    return any(
        flat.get(f"{part}.lr_sched.lr_decay_iters") is None
        and (
            flat.get(f"{part}.lr_sched.lr_decay_style", "constant") != "constant"
            or bool(flat.get(f"{part}.lr_sched.lr_warmup_fraction"))
        )
        for part in ("actor", "critic")
    )


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "True", False: "False"}[value]
    text = value if isinstance(value, str) and value and value.isprintable() else repr(value)
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[: MAX_VALUE_CHARS - 20]} … ({len(text)} characters)"
