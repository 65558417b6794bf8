"""Carry searchr1.json, what a model was trained with, from a checkpoint or its run into a converted model folder."""

from __future__ import annotations

from pathlib import Path

from searchr1.checkpoints.step_folder import HF_FOLDER
from searchr1.config.load import leaves, load_config
from searchr1.config.schema import Config
from searchr1.data.model_settings import FILE, ModelSettings
from searchr1.errors import UserError
from searchr1.tracking.legs import read_settings


def carry_settings(checkpoint: Path, output: Path) -> str:
    """Write `output`/searchr1.json from the checkpoint's own, else from its run's config.yaml. Return what was done.

    Without either the file that was copied with the base model's tokenizer stays, if there is one.

    Args:
        checkpoint: the actor's folder, `RUN/checkpoints/global_step_N/actor`.
        output: the model folder, with its configuration and tokenizer.
    """
    kept, run = checkpoint / HF_FOLDER / FILE, _run_config(checkpoint)
    try:
        if kept.is_file():
            settings, source = ModelSettings.read(kept), kept
        elif run is not None:
            settings, source = ModelSettings.of(_recorded(run)), run
        elif (output / FILE).is_file():
            return f"{FILE}: that of the base model; the checkpoint has none, and no run's config.yaml lies above it"
        else:
            return (
                f"{FILE}: not written; the checkpoint has none, and no run's config.yaml lies above it. Ask the model with "
                "--config, or with the flags of its training"
            )
    except UserError as error:
        (output / FILE).unlink(missing_ok=True)
        return f"{FILE}: not written; ask the model with --config, or with the flags of its training ({error})"
    settings.write(output)
    return f"{FILE}: {settings.described()} (from {source})"


def _run_config(checkpoint: Path) -> Path | None:
    """Find config.yaml of the run whose `checkpoints/global_step_N` a checkpoint lies in."""
    folder = checkpoint.resolve()
    for step in (folder, *folder.parents[:3]):
        config = step.parent.parent / "config.yaml"
        if step.name.startswith("global_step_") and step.parent.name == "checkpoints" and config.is_file():
            return config
    return None


def _recorded(path: Path) -> Config:
    """Read a run's config.yaml, which a stranger may have written.

    Raises:
        UserError: not readable, or it refers to something outside of itself: what is carried may be published, and a
            reference can stand for a secret of whoever converts.
    """
    tree = read_settings(path)
    if "defaults" in tree or any("${" in str(value) for value in leaves(tree).values()):
        raise UserError(f"{path}: refers to other files or to the environment, which a run's own record never does")
    return load_config(path)
