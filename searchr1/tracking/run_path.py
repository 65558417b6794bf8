"""Where a training run or an evaluation is written."""

from __future__ import annotations

import os
from pathlib import Path

from searchr1.config.schema import Config
from searchr1.errors import UserError

NAMED_BY = "runner.experiment_name"
"""The key that a user changes to get another folder."""


def run_path(config: Config) -> Path:
    """Return `{runner.output_dir}/{runner.experiment_name}`, which need not exist; nothing is written.

    Raises:
        UserError: it cannot be made or written to.
    """
    path = Path(config.runner.output_dir) / config.runner.experiment_name
    there = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise UserError(f"runner.output_dir: cannot write {path}: {there} is not a folder; give another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"runner.output_dir: cannot write {path}: {there} is not writable; give another one")
    return path
