"""SHA-256 of a model's weights: whether two folders hold the same model, wherever they are.

Two files keep such a hash, each of other parts, and both go on reading what earlier releases wrote:

    lora.json of a checkpoint     `hash_base_model`: the safetensors files of the folder, as names and digests
    manifest.json of an index     `hash_encoder`: the weight files below the folder, as names and contents

Whether a file has changed on its disk is another question: files/checksums.py answers it with XXH3.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

from searchr1.errors import UserError

BLOCK_BYTES = 16 << 20


@functools.cache
def hash_base_model(source: str) -> str:
    """Hash the names and digests of a model's safetensors files; once per process.

    Args:
        source: a folder or hub name.

    Raises:
        UserError: there is no model, or it has no such files.
    """
    from searchr1.checkpoints.hf_folder import local_folder  # brings torch, which a retrieval server may lack

    folder = local_folder(source)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(folder, "LoRA needs the base model's weights in safetensors files, and finds none there")
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def hash_encoder(path: str) -> str:
    """Hash an encoder's weight files: two folders with the same hash give the same vectors.

    Every byte is read (about a second per GB): a sample would not see the layers that were trained on.

    Raises:
        UserError: there are none.
    """
    folder = Path(path)
    files = sorted(folder.rglob("*.safetensors")) or sorted(folder.rglob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"--retriever_model {path}", "has no weights (model.safetensors or pytorch_model.bin)")
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(file.relative_to(folder).as_posix()))
        with file.open("rb") as opened:
            while block := opened.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()
