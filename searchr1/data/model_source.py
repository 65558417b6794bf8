"""Where a model is loaded from: a folder here, or a name on the Hugging Face hub; what is neither is one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from searchr1.checkpoints.model_folder import check_files
from searchr1.errors import UserError

_CHECKPOINT = ("actor", ".metadata", "metadata.json", "runner.json")
"""What a training checkpoint has, or its actor's folder."""


def looks_local(source: str) -> bool:
    """Return whether a folder is meant rather than a name on the hub, which has at most one slash."""
    path = Path(source)
    below_folder = len(path.parts) > 1 and path.parent.is_dir()
    return source.startswith(("/", "./", "../", "~")) or source.count("/") > 1 or path.exists() or below_folder


def require_source(source: str, key: str) -> None:
    """Refuse a folder that is missing, or none of a model; names on the hub are not looked up.

    Raises:
        UserError: says so, with the flag or configuration key.
    """
    if not source:
        raise UserError(key, "is empty; give a Hugging Face folder or a hub name")
    folder = Path(source)
    if not looks_local(source) or (folder / "config.json").is_file():
        return
    if not folder.exists():
        raise UserError(key, f"{source}: no such folder; edit the path")
    if not folder.is_dir():
        raise UserError(key, f"{source}: is a file; give the folder that holds config.json")
    if any((folder / name).exists() for name in _CHECKPOINT):
        raise UserError(key, f"{source}: is a training checkpoint; convert it first: searchr1 convert fsdp2hf|mg2hf")
    raise UserError(key, f"{source}: has no config.json; give a model's folder")


def load_tokenizer(source: str, key: str) -> Any:
    """Return the tokenizer of a model.

    Raises:
        UserError: there is none, it cannot be read, or the hub cannot be asked.
    """
    from transformers import AutoTokenizer

    if looks_local(source) and not Path(source).is_dir():
        raise UserError(key, f"{source}: no such folder; edit the path")
    _check_files(source, key)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(key, f"{source}: its tokenizer cannot be loaded ({first_line(error)})") from error


def load_model_config(source: str, key: str) -> Any:
    """Return the transformers configuration of a model.

    Raises:
        UserError: there is none, it cannot be read, or the hub cannot be asked.
    """
    from transformers import AutoConfig

    require_source(source, key)
    _check_files(source, key)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # configuration classes raise what their fields' checks raise
        raise UserError(key, f"{source}: its config.json cannot be loaded ({first_line(error)})") from error


def _check_files(source: str, key: str) -> None:
    try:
        check_files(source)
    except UserError as error:
        raise UserError(key, str(error)) from error


def first_line(error: Exception) -> str:
    """Without the paragraphs of advice that follow."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
