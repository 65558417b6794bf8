"""The folder of an encoder: where it is, and whether two hold the same weights."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from searchr1.errors import UserError

UNUSED_FILES = ["onnx/*", "openvino/*", "*.h5", "*.ot", "*.msgpack", "*.onnx"]
"""What a hub repository may hold beside the weights that PyTorch reads."""


def local_folder(path: str) -> str:
    """The folder of a model, downloaded first if `path` names a repository of the Hugging Face hub.

    Raises:
        UserError: neither a folder, nor cached, nor to be downloaded.
    """
    if Path(path).is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, ignore_patterns=UNUSED_FILES, etag_timeout=10)
    except (OSError, ValueError) as error:  # the hub's errors are one or the other
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--retriever_model {path}: cannot load an encoder: no such folder, and not to be had from the hub ({reason})"
        ) from error


def weights_hash(path: str) -> str:
    """SHA-256 of an encoder's weight files: two folders with the same hash give the same vectors.

    Every byte is read (about a second per GB): a sample would not see the layers that were trained on.

    Raises:
        UserError: there are none.
    """
    folder = Path(path)
    files = sorted(folder.rglob("*.safetensors")) or sorted(folder.rglob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"--retriever_model {path}: has no weights (model.safetensors or pytorch_model.bin)")
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(file.relative_to(folder).as_posix()))
        with file.open("rb") as opened:
            while block := opened.read(16 << 20):
                digest.update(block)
    return digest.hexdigest()
