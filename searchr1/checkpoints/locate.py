"""Find a checkpoint's files below what the user gave, and check the new folder that a conversion writes."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from searchr1.checkpoints.metadata import METADATA
from searchr1.errors import UserError
from searchr1.files.atomic import atomic_folder

Kind = Literal["distributed", "megatron_ranks", "fsdp_ranks", "full_weights"]
"""
    distributed      `.metadata` and `.distcp` files: Megatron's `torch_dist`, FSDP's DCP
    megatron_ranks   `mp_rank_XX[_YYY]/model_optim_rng.pt`: Megatron's `torch`
    fsdp_ranks       `model_world_size_W_rank_R.pt`: verl's FSDP
    full_weights     `full_weights.pt`: RLinf's FSDP
"""

LATEST = "latest_checkpointed_iteration.txt"
FULL_WEIGHTS = "full_weights.pt"
RANK_FILES = ("model_optim_rng.pt", "model_rng.pt", "model.pt")
_BELOW = ("actor", "dist_ckpt", "dcp_checkpoint", "model_state_dict", "model")
"""Folders in which trainers put the policy's weights, in the order in which they are looked for."""
_STEP = re.compile(r"(iter|global_step)_\d+|release")


@dataclass(frozen=True, slots=True)
class Located:
    """A checkpoint."""

    folder: Path
    """The folder of the files."""
    kind: Kind


def locate(given: Path) -> Located:
    """Follow what trainers write beside their checkpoints down to the files.

    Raises:
        UserError: there is no checkpoint, an unfinished one, or several; the message lists what is there.
    """
    if not given.exists():
        raise UserError(f"--checkpoint {given}: does not exist")
    folder = given if given.is_dir() else given.parent
    if folder.name.startswith("mp_rank_"):
        folder = folder.parent
    found = _follow(folder, given)
    if found is not None:
        return found
    for name in ("huggingface", "hf_checkpoint"):
        for below in (folder / name, folder / "actor" / name):
            if list(below.glob("*.safetensors")):
                raise UserError(
                    f"--checkpoint {given}: has a Hugging Face model already, which needs no conversion: {below}"
                )
    steps = sorted(path.name for path in folder.iterdir() if path.is_dir() and _STEP.fullmatch(path.name))
    advice = (
        f"it has {', '.join(steps)}: give one of them"
        if steps
        else f"give a folder that has one of {METADATA}, mp_rank_*, model_world_size_*_rank_*.pt or {LATEST}"
    )
    raise UserError(f"--checkpoint {given}: is not a checkpoint folder (no {METADATA}); {advice}")


def _follow(folder: Path, given: Path) -> Located | None:
    here = _here(folder, given)
    if here is not None:
        return here
    if (folder / LATEST).is_file():
        return _follow(_latest(folder), given)
    steps = [path for path in folder.glob("iter_*") if path.is_dir()]
    if len(steps) == 1:
        return _follow(steps[0], given)
    if steps:
        names = ", ".join(sorted(path.name for path in steps))
        raise UserError(f"--checkpoint {given}: {folder} has no {LATEST} to choose from {names}; give one of them")
    for name in _BELOW:
        if (folder / name).is_dir():
            found = _follow(folder / name, given)
            if found is not None:
                return found
    return None


def _here(folder: Path, given: Path) -> Located | None:
    if (folder / METADATA).is_file():
        return Located(folder, "distributed")
    if any((path / name).is_file() for path in folder.glob("mp_rank_*") for name in RANK_FILES):
        return Located(folder, "megatron_ranks")
    if any(folder.glob("model_world_size_*_rank_*.pt")):
        return Located(folder, "fsdp_ranks")
    if (folder / FULL_WEIGHTS).is_file():
        return Located(folder, "full_weights")
    if any(folder.glob("*.distcp")):
        raise UserError(
            f"--checkpoint {given}: has .distcp files, but no {METADATA}: it was never completed, or not copied whole"
        )
    if any(folder.glob("*/.zarray")):
        raise UserError(
            f"--checkpoint {given}: is in Megatron's zarr format, which is not read; load it with Megatron-LM and save it "
            "with ckpt_format: torch_dist"
        )
    return None


def _latest(folder: Path) -> Path:
    text = (folder / LATEST).read_text(errors="replace", encoding="utf-8").strip()
    names = ["release"] if text == "release" else []
    if text.isdecimal() and len(text) < 12:
        names = [f"iter_{int(text):07d}", f"global_step_{int(text)}"]
    if not names:
        raise UserError(
            f"{folder / LATEST} says {text[:40]!r} instead of an iteration or release; give the iteration's folder"
        )
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    raise UserError(f"{folder / LATEST} says {text}, but there is no {names[0]}; give the folder of another iteration")


Carry = Callable[[Path, Path], str]
"""Write into the new folder (the second) what belongs to the checkpoint (the first) besides weights; return a line."""


@contextmanager
def new_folder(output: Path, need_bytes: int) -> Iterator[Path]:
    """Yield a folder to write into; it gets the name `output` when the block ends well, and is deleted otherwise.

    Args:
        output: must not exist, or be an empty folder.
        need_bytes: what will be written, compared with the free space first.

    Raises:
        UserError: `output` is in use, or the disk is full or not writable.
    """
    check_unused(output)
    try:
        with atomic_folder(output, durable=True) as partial:
            free = shutil.disk_usage(partial).free
            if free < need_bytes:
                raise UserError(f"--output {output}: needs {_gib(need_bytes)}, but the disk has {_gib(free)} free")
            yield partial
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise UserError(f"--output {output}: cannot write: {reason}; nothing was left there") from error


def check_unused(output: Path) -> None:
    """Check that a new folder can be made, before anything is read.

    Raises:
        UserError: the output is a file, or a folder with something in it.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists and is not empty; give a new folder")


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
