"""Whether wandb and swanlab have a key, before anything starts: without one they ask on a terminal, or fail hours later.

Read as the packages read it: environment, netrc files, their own settings. No network is needed to see that one is missing,
and whether it is right is seen when the service starts.
"""

from __future__ import annotations

import configparser
import netrc
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from searchr1.errors import UserError

WANDB_HOST = "https://api.wandb.ai"
WITHOUT_KEY = ("offline", "disabled", "dryrun", "local")
"""Modes that log on this machine alone."""
SETTING = re.compile(r"^\s*(?:export\s+)?(?:SWANLAB_)?(?:API_KEY|MODE)\s*[:=]\s*\S", re.IGNORECASE | re.MULTILINE)
MOST_CHARACTERS = 1 << 16


def require_logins(backends: Sequence[str]) -> None:
    """Reject a run whose loggers would ask for a key.

    Raises:
        UserError: a service has neither a key nor a mode that needs none.
    """
    for backend in backends:
        if backend in LOGGED_IN and not LOGGED_IN[backend]():
            name = backend.upper()
            raise UserError(
                f"runner.logger.logger_backends: {backend} is not logged in; run {backend} login, set {name}_API_KEY, log "
                f"offline ({name}_MODE=offline), or take it out of the list"
            )


def _wandb() -> bool:
    settings = _wandb_settings()
    mode = os.environ.get("WANDB_MODE") or settings.get("mode", "")
    if mode.lower() in WITHOUT_KEY or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    if (os.environ.get("WANDB_ANONYMOUS") or settings.get("anonymous", "")) in ("allow", "must"):
        return True
    host = os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or WANDB_HOST
    if any(_has_key(path, urlsplit(host).netloc) for path in _netrc_files()):
        return True
    # Keys that only the package can see: of a login by code, or in the store of a later version.
    try:
        return bool(getattr(getattr(sys.modules.get("wandb"), "api", None), "api_key", None))
    except Exception:  # another version, which reports the problem itself
        return False


def _wandb_settings() -> dict[str, str]:
    """Return the `default` section of wandb's settings files, the working directory's last."""
    parser = configparser.ConfigParser(default_section="none", interpolation=None)
    own = Path(os.environ.get("WANDB_CONFIG_DIR") or _home(".config/wandb"))
    run = Path(os.environ.get("WANDB_DIR") or ".")
    with suppress(configparser.Error, OSError, UnicodeDecodeError):
        parser.read([own / "settings", run / "wandb/settings", run / ".wandb/settings"], encoding="utf-8")
    return dict(parser["default"]) if parser.has_section("default") else {}


def _netrc_files() -> Iterator[Path]:
    if given := os.environ.get("NETRC"):
        yield Path(given).expanduser()
        return
    yield from (_home(".netrc"), _home("_netrc"))


def _swanlab() -> bool:
    mode = os.environ.get("SWANLAB_MODE", "")
    if mode.lower() in WITHOUT_KEY or os.environ.get("SWANLAB_API_KEY"):
        return True
    roots = [Path(os.environ[name]) for name in ("SWANLAB_ROOT", "SWANLAB_SAVE_DIR") if os.environ.get(name)]
    roots = [*(roots or [_home(".swanlab")]), Path(".swanlab")]
    if any(_has_key(root / ".netrc", None) for root in roots):
        return True
    # Its settings files may hold a key or a mode; the package itself judges their contents.
    files = [Path(".env"), *(Path(f"swanlab.{end}") for end in ("yaml", "yml"))]
    for folder in (Path(os.environ.get("SWANLAB_CONFIG_DIR") or "/etc/swanlab"), *roots):
        files += sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    secrets = os.environ.get("SWANLAB_SECRETS_DIR")
    if secrets and any((Path(secrets) / name).is_file() for name in ("api_key", "swanlab_api_key", "SWANLAB_API_KEY")):
        return True
    return any(SETTING.search(_text(path)) for path in files)


def _has_key(path: Path, host: str | None) -> bool:
    """Return whether a netrc file has a password for the host, or for any."""
    try:
        read = netrc.netrc(path)
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError):
        return False
    entries = [read.authenticators(host)] if host is not None else list(read.hosts.values())
    return any(entry is not None and bool(entry[2]) for entry in entries)


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(MOST_CHARACTERS)
    except OSError:
        return ""


def _home(name: str) -> Path:
    return Path(os.path.expanduser("~")) / name


LOGGED_IN: dict[str, Callable[[], bool]] = {"wandb": _wandb, "swanlab": _swanlab}
