"""The folder of one checkpoint of a run: whole or not there at all.

    checkpoints/global_step_N/
      runner.json        the runner's own state
      manifest.json      every file with its size and checksum (manifest.py)
      actor/             DCP shards, or Megatron's torch_dist; hf/ (config and tokenizer of the model)
      critic/            likewise, with PPO

A checkpoint is written under another name and renamed when it is complete, so a folder `global_step_N` is always whole.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from searchr1.checkpoints.manifest import checkpoint_steps, rank_sums, write_manifest
from searchr1.errors import UserError
from searchr1.files.atomic import atomic_folder, sync
from searchr1.files.checksums import FileSum

HF_FOLDER = "hf"
"""In a model's folder of a checkpoint: its configuration and tokenizer."""


@contextmanager
def new_checkpoint(root: Path, step: int, sums: Mapping[str, FileSum] | None = None) -> Iterator[Path]:
    """Yield a folder to write a checkpoint of `step` into; it gets its final name when the block ends well.

    Args:
        root: the run's folder of checkpoints.
        step: the step.
        sums: those that the block has taken when it ends; the others are taken then.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".partial_step_*"):
            shutil.rmtree(leftover)  # of a run that was killed while saving
        name = f".partial_step_{step}_{os.getpid()}"
        with atomic_folder(root / f"global_step_{step}", durable=True, replace=True, partial_name=name) as partial:
            yield partial
            known = {**(sums or {}), **rank_sums(partial)}
            with ThreadPoolExecutor(1) as pool:  # to read the files and to wait for the disk at once
                synced = pool.submit(sync, [*partial.rglob("*")])
                write_manifest(partial, step, known)
                synced.result()
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise UserError(
            f"cannot write a checkpoint below {root}: {reason}; earlier checkpoints are untouched. Free space (or set "
            "runner.keep_checkpoints) and go on with runner.resume_dir=auto"
        ) from error


def prune_checkpoints(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for step in checkpoint_steps(root)[:-keep]:
        shutil.rmtree(root / f"global_step_{step}")
