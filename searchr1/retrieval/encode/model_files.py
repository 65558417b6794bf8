"""The folder of an encoder."""

from __future__ import annotations

from pathlib import Path

from searchr1.errors import UserError

UNUSED_FILES = ["onnx/*", "openvino/*", "*.h5", "*.ot", "*.msgpack", "*.onnx"]
"""What a hub repository may hold beside the weights that PyTorch reads."""


def local_folder(path: str) -> str:
    """Return the folder of a model, downloaded first if `path` names a repository of the Hugging Face hub.

    Raises:
        UserError: neither a folder, nor cached, nor to be downloaded.
    """
    if Path(path).is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(path, ignore_patterns=UNUSED_FILES, etag_timeout=10))
    except (OSError, ValueError) as error:  # the hub's errors are one or the other
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--retriever_model {path}: cannot load an encoder: no such folder, and not to be had from the hub ({reason})"
        ) from error
