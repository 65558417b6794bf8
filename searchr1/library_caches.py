"""Where libraries keep what they compile and download, for a user without a home that can be written to.

A container that runs under any user id has no entry in the password file and often no home. Libraries then fail in the
middle of a run (torch asks for the user's name, Triton and vLLM make folders below the home), or write to a folder `~`.
"""

from __future__ import annotations

import getpass
import os
import secrets
import sys
import tempfile
from pathlib import Path

from searchr1 import caches

FOLDERS = {
    "HF_HOME": ".cache/huggingface",
    "TORCH_HOME": ".cache/torch",
    "TRITON_CACHE_DIR": ".triton/cache",
    "VLLM_CACHE_ROOT": ".cache/vllm",
    "VLLM_CONFIG_ROOT": ".config/vllm",
    "FLASHINFER_WORKSPACE_BASE": ".cache/flashinfer",
    "MPLCONFIGDIR": ".config/matplotlib",
    "WANDB_CACHE_DIR": ".cache/wandb",
    "WANDB_CONFIG_DIR": ".config/wandb",
    "WANDB_DATA_DIR": ".local/share/wandb",
}
"""The variable that moves a library's folder, and the folder below the home."""
RAY_TOKEN = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""What Ray takes the secret from that its processes know each other by."""
MOVED_BY = {".cache": "XDG_CACHE_HOME", ".config": "XDG_CONFIG_HOME", ".local": "XDG_DATA_HOME"}
"""Variables that move all of these folders."""


def provide_caches() -> None:
    """Set what libraries read for this process and its children, where the home cannot be used; say so on standard error.

    What the user has set stays. A folder in a home that can only be read stays where it is: its models can be used.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    home = _home()
    if home is not None and os.access(home, os.W_OK | os.X_OK):
        return
    if not {*RAY_TOKEN, "RAY_ADDRESS"} & set(os.environ) and not (home is not None and (home / ".ray/auth_token").is_file()):
        os.environ[RAY_TOKEN[0]] = secrets.token_hex(16)  # Ray would write one below the home
    missing = {name: place for name, place in FOLDERS.items() if not _is_chosen(name, place) and not _is_there(home, place)}
    if not missing:
        return
    folder = Path(tempfile.gettempdir()) / f"searchr1-caches-{os.getuid()}"
    if not caches.make_private(folder):
        folder = caches.temporary_private("caches")
    for name, place in missing.items():
        os.environ[name] = str(folder / place)
    what = "no home folder" if home is None else f"the home folder {home} cannot be written to"
    print(f"note: {what}; what libraries download and compile goes to {folder} (set HOME to keep it)", file=sys.stderr)


def _home() -> Path | None:
    """The home folder, if there is one."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.is_absolute() and home.is_dir() else None


def _is_chosen(name: str, place: str) -> bool:
    return name in os.environ or MOVED_BY.get(place.partition("/")[0], name) in os.environ


def _is_there(home: Path | None, place: str) -> bool:
    return home is not None and (home / place).is_dir()
