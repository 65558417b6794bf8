"""Whether the model folders that a configuration names hold the weights that they describe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
    from searchr1.actor.weight_check import check_model_folder, has_weights
    from searchr1.checkpoints.manifest import verify_source
    from searchr1.checkpoints.model_sums import verify_weights
    from searchr1.convert.megatron_source import check_megatron_checkpoint

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
