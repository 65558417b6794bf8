"""Whether trajectories are longer than a model's positions, as vLLM counts these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from searchr1.config.load import Problem
from searchr1.config.schema import Config

_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions", "max_sequence_length",
    "max_seq_length", "seq_len",
)  # fmt: skip
"""Where config.json files of different families have it; the smallest counts."""
_COUNTED = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
"""Kinds of rotary scaling whose factor is in `max_position_embeddings` already."""


def check_positions(config: Config, for_training: bool) -> Iterator[Problem]:
    """Find every model that has fewer positions than a trajectory may have tokens."""
    length = config.runner.seq_length
    models = {"rollout.model.model_path": config.rollout.model.model_path}
    if for_training:
        models["actor.model.path"] = config.actor.model.path or ""
        if config.algorithm.kl_beta > 0:
            models["inference.model_path"] = config.inference.model_path or ""
        if config.critic.use_critic_model:
            models["critic.model_path"] = config.critic.model_path or ""
    for key, path in models.items():
        positions = model_positions(path)
        if positions is not None and length > positions:
            yield Problem(
                "runner.seq_length",
                f"{length} tokens do not fit the {positions} positions of {key}: {path}; set it to {positions} or less, or "
                "take a model with more",
            )


def model_positions(path: str) -> int | None:
    """Positions of a model: of a local folder, or of a hub name that has been downloaded; None if nothing says so."""
    from transformers import AutoConfig

    folder = Path(path)
    if not path or (folder.is_dir() and not (folder / "config.json").is_file()):
        return None
    try:
        return positions_of(AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).to_dict())
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not downloaded yet, or what loading it reports


def positions_of(values: Mapping[str, Any]) -> int | None:
    """Positions that a transformers configuration gives its model, rotary scaling included."""
    text = values.get("text_config")
    if isinstance(text, Mapping):
        values = text
    found = [values[key] for key in _KEYS if isinstance(values.get(key), int)]
    own = values.get("model_max_length")
    if not found and not own:
        return None
    positions = own or min(found)
    if "gemma3" not in values.get("model_type", ""):  # its rotary scaling is counted already
        for rope in _ropes(values):
            if rope.get("rope_type", rope.get("type")) not in _COUNTED and rope.get("factor"):
                return int(positions * rope["factor"])
    return int(positions)


def _ropes(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Rotary settings: one set, or one for each kind of layer."""
    ropes = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if any(isinstance(one, Mapping) for one in ropes.values()):
        yield from (one for one in ropes.values() if isinstance(one, Mapping))
    else:
        yield ropes
