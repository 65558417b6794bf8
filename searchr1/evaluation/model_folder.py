"""What identifies a model on disk, and how large it is, without loading it."""

from __future__ import annotations

import hashlib
import math
import os
import re
from contextlib import suppress
from pathlib import Path

from searchr1.checkpoints.safetensors_header import read_header
from searchr1.config.model_settings import FILE
from searchr1.errors import UserError

SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
_WHOLE_BYTES = 32 << 20
"""Files up to this size are read whole; of larger ones blocks are taken all over the file."""
_BLOCK, _BLOCKS = 1 << 14, 256


def fingerprint(model_path: str) -> str:
    """A hash of a model's files, wherever the folder lies; the name itself for a model of the hub.

    searchr1.json is left out: what an evaluation takes from it is compared by itself.

    Weights that were trained further differ in nearly all bytes, so blocks spread over a large file tell them apart.
    """
    folder = Path(model_path)
    if not folder.is_dir():
        return model_path
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.name != FILE and p.is_file()):
        size = path.stat().st_size
        digest.update(os.fsencode(f"{path.name}\0{size}\0"))
        with path.open("rb") as file:
            if size <= _WHOLE_BYTES:
                digest.update(file.read())
                continue
            for number in range(_BLOCKS):
                file.seek((size - _BLOCK) * number // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


def billions(model_path: str) -> float | None:
    """Parameters in billions: from the weights' headers, or from a name such as `Qwen2.5-3B`; None if neither tells."""
    folder = Path(model_path)
    count = 0
    for path in folder.glob("*.safetensors") if folder.is_dir() else ():
        with suppress(UserError):  # said where the model is loaded
            count += sum(math.prod(tensor.shape) for tensor in read_header(path).values())
    if count:
        return count / 1e9
    named = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)\s?b(?![a-z0-9])", folder.name, re.IGNORECASE)
    return float(named.group(1)) if named else None
