"""Check that model folders hold the weights that they describe, and that trajectories fit into a model's positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from searchr1.config.load import Problem
from searchr1.config.schema import Config
from searchr1.errors import UserError


def check_models(config: Config, for_training: bool, needs_weights: bool = True) -> Iterator[Problem]:
    """Yield the problems of every local model folder, by the key that names it.

    Headers are read, and what has checksums is compared with them.

    Args:
        config: one that names model folders.
        for_training: look at what trains too.
        needs_weights: a folder without any is a problem; otherwise, to look at a YAML, its config.json will do.
    """
    from searchr1.checkpoints.hf_folder import has_weights
    from searchr1.checkpoints.manifest import verify_source
    from searchr1.checkpoints.megatron_source import check_megatron_checkpoint
    from searchr1.checkpoints.model_folder import verify_weights
    from searchr1.checkpoints.weight_check import check_model_folder

    actor = config.actor.model
    folders: list[tuple[str, str | None, bool, bool]] = [
        ("rollout.model.model_path", config.rollout.model.model_path, for_training, False)
    ]
    if for_training:
        if actor.megatron_checkpoint is None:  # else only its config.json is read
            folders.append(("actor.model.path", actor.path, True, False))
        if config.algorithm.kl_beta > 0:
            folders.append(("inference.model_path", config.inference.model_path, True, False))
        if config.critic.use_critic_model:
            folders.append(("critic.model_path", config.critic.model_path, True, True))
    verified: set[str] = set()
    for key, path, trained, decoder_only in folders:
        if not path or not (Path(path) / "config.json").is_file():
            continue  # a hub name, or a problem of its own
        if not (needs_weights or has_weights(Path(path))):
            continue
        try:
            if needs_weights and path not in verified:
                verify_weights(path)
                verified.add(path)
            check_model_folder(path, decoder_only=decoder_only, trained=trained)
        except UserError as error:
            yield Problem(key, str(error))
    checkpoint, model = actor.megatron_checkpoint, actor.path or config.rollout.model.model_path
    given = for_training and config.actor.training_backend == "megatron" and checkpoint is not None
    if given and checkpoint and (Path(checkpoint) / "metadata.json").is_file() and (Path(model) / "config.json").is_file():
        try:
            if needs_weights:
                verify_source(Path(checkpoint), "actor.model.megatron_checkpoint=")
            check_megatron_checkpoint(Path(checkpoint), model)
        except UserError as error:
            yield Problem("actor.model.megatron_checkpoint", str(error))


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
    """Return a model's positions: of a local folder, or of a hub name that has been downloaded; None if nothing says so."""
    from transformers import AutoConfig

    folder = Path(path)
    if not path or (folder.is_dir() and not (folder / "config.json").is_file()):
        return None
    try:
        return positions_of(AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).to_dict())
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not downloaded yet, or what loading it reports


def positions_of(values: Mapping[str, Any]) -> int | None:
    """Return the positions that a transformers configuration gives its model, rotary scaling included."""
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
    """Return rotary settings: one set, or one for each kind of layer."""
    ropes = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if any(isinstance(one, Mapping) for one in ropes.values()):
        yield from (one for one in ropes.values() if isinstance(one, Mapping))
    else:
        yield ropes
