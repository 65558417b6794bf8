"""The legs of a run: it is started once and may be resumed, each time with settings of its own.

    configs/step_N.yaml    the whole configuration of the leg whose first step is N

A run that was written before these files existed has `config.yaml` alone, which then counts as its only leg.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchr1.config.difference import Difference, differences
from searchr1.config.yaml_bounds import require_bounded
from searchr1.errors import UserError

FOLDER = "configs"
LATEST = "config.yaml"


@dataclass(frozen=True, slots=True)
class Leg:
    """One configuration and the first step that ran with it."""

    first_step: int
    path: Path


@dataclass(frozen=True, slots=True)
class SettingsChange:
    """A step that ran with other settings than the one before it."""

    step: int
    settings: list[Difference]
    """What changes what is learned."""


def leg_file(run: Path, first_step: int) -> Path:
    """Return the configuration of the leg that begins with `first_step`."""
    return run / FOLDER / f"step_{first_step}.yaml"


def legs_of(run: Path) -> list[Leg]:
    """Return the legs by their first step; empty if the folder holds no configuration."""
    names = (path.stem.removeprefix("step_") for path in (run / FOLDER).glob("step_*.yaml"))
    steps = sorted(int(name) for name in names if name.isascii() and name.isdigit())
    if steps:
        return [Leg(step, leg_file(run, step)) for step in steps]
    return [Leg(1, run / LATEST)] if (run / LATEST).is_file() else []


def read_settings(path: Path) -> dict[str, Any]:
    """Return a configuration as it was written, as a plain tree.

    Raises:
        UserError: not readable, or not a configuration.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    require_bounded(path)
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not readable ({str(error).splitlines()[0]}); restore the file, or move it away") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds no configuration; restore the file, or move it away")
    return {str(name): value for name, value in tree.items()}


def settings_changes(run: Path) -> list[SettingsChange]:
    """Return by step where settings changed that change what is learned.

    Raises:
        UserError: a leg's configuration is not readable.
    """
    legs = legs_of(run)
    trees = [read_settings(leg.path) for leg in legs] if len(legs) > 1 else []
    changes = []
    for leg, old, new in zip(legs[1:], trees, trees[1:], strict=False):
        settings = [d for d in differences(old, new) if not d.harmless]
        if settings:
            changes.append(SettingsChange(leg.first_step, settings))
    return changes
