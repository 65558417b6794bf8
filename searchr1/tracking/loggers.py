"""Where metrics go: always metrics.jsonl, and the backends that the YAML names, with a check of their logins."""

from __future__ import annotations

import configparser
import hashlib
import importlib
import json
import math
import netrc
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from searchr1.config.schema import RunnerConfig
from searchr1.errors import UserError
from searchr1.files.atomic import write_text
from searchr1.tracking.json_lines import parse_json

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


METRICS_FILE = "metrics.jsonl"
EXTRAS = {"tensorboard": "train", "wandb": "wandb", "swanlab": "swanlab"}
"""Which extra of the package brings a backend."""
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "swanlab": "swanlab"}
"""What a backend imports."""


class Logger(Protocol):
    """One destination."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record a step's metrics."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


class JsonlLogger:
    """One JSON object a line, `{"step": …, name: value}`; handed to the system at once, so that a killed run keeps it.

    Args:
        path: the file; made if missing.
        first_step: the step that the run goes on from. Rows of later steps will be logged again and are removed; with 0
            (a fresh run) all are.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        if path.exists():
            kept = [row for row in read_metrics(path) if row["step"] <= first_step] if first_step else []
            write_text(path, (json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line; values that JSON cannot hold become null."""
        row = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardLogger:
    """Event files for TensorBoard; what an earlier run in the folder logged after `first_step` is hidden there."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else 0)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write one scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class ModuleLogger:
    """wandb and swanlab, whose modules have the same three functions. A resumed run goes on under its old id."""

    def __init__(
        self, module: Any, folder: Path, *, project: str, name: str, config: dict[str, Any], first_step: int
    ) -> None:
        self._module = module
        self.name = module.__name__
        self._id_file = folder / f"{module.__name__}_id"
        goes_on = first_step and self._id_file.is_file()
        self._id = self._id_file.read_text(encoding="utf-8") if goes_on else hashlib.sha256(os.urandom(16)).hexdigest()[:16]
        self._id_is_written = False
        module.init(project=project, name=name, config=config, id=self._id, resume="allow")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send a step."""
        if not self._id_is_written:
            write_text(self._id_file, self._id)
            self._id_is_written = True
        self._module.log(metrics, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._module.finish()


def require_backends(backends: Sequence[str]) -> None:
    """Import what the backends need, so that a run is refused before it has written anything.

    Raises:
        UserError: unknown backend, or its package is not installed.
    """
    for backend in backends:
        if backend not in MODULES:
            raise UserError(f"runner.logger.logger_backends: unknown {backend!r}; use any of {', '.join(MODULES)}")
        try:
            importlib.import_module(MODULES[backend])
        except ImportError as error:
            raise UserError(
                f"runner.logger.logger_backends: {backend} is not installed; pip install 'searchr1[{EXTRAS[backend]}]' "
                f"or take it out of the list ({error})"
            ) from error


def hosted_loggers(folder: Path, runner: RunnerConfig, config: dict[str, Any], first_step: int) -> list[Logger]:
    """Return the backends that log to a service. They write into `folder` with their first step only.

    Args:
        folder: the run's; it need not exist yet.
        runner: names the backends, the project and the run.
        config: shown there.
        first_step: the step that the run goes on from, 0 for a fresh one.

    Raises:
        UserError: unknown backend, or its package is not installed.
    """
    backends = runner.logger.logger_backends
    require_backends(backends)
    return [
        ModuleLogger(
            importlib.import_module(MODULES[backend]),
            folder,
            project=runner.logger.project_name,
            name=runner.experiment_name,
            config=config,
            first_step=first_step,
        )
        for backend in backends
        if backend != "tensorboard"
    ]


def file_loggers(folder: Path, backends: Sequence[str], first_step: int) -> list[Logger]:
    """Return metrics.jsonl, and TensorBoard's files if they are wanted; `folder` exists."""
    loggers: list[Logger] = [JsonlLogger(folder / METRICS_FILE, first_step)]
    if "tensorboard" in backends:
        loggers.append(TensorBoardLogger(folder / "tensorboard", first_step))
    return loggers


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl; a last line that a kill cut short is left out.

    Raises:
        UserError: the file cannot be read, or another line is not a row of metrics.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: not valid JSON ({error}); remove the line") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path}:{number}: no row of metrics ('step' is missing); remove the line")
        rows.append(row)
    return rows


FAILED = "logger/failed"
"""How often a logger has failed so far; only there once one has."""
LONGEST_REASON = 300


class GuardedLogger:
    """A logger whose failures are counted and reported once, and stop nothing."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._name = str(getattr(logger, "name", type(logger).__name__))
        self._logged = 0
        self.failed = 0

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record a step's metrics, if the logger can."""
        self._logged += 1
        self._try(lambda: self._logger.log(step, metrics), f"step {step}")

    def close(self) -> None:
        """End, and say how much is missing."""
        before = self.failed
        self._try(self._logger.close, "its end")
        if before:
            print(
                f"{FAILED}: {self._name} did not take {before} of {self._logged} rows; metrics.jsonl has all of them",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def _try(self, act: Callable[[], None], what: str) -> None:
        try:
            act()
        except (Exception, SystemExit) as error:  # a service's package may end the process where it is not logged in
            self.failed += 1
            if self.failed == 1:
                print(
                    f"warning: {self._name} failed at {what} ({_reason(error)}); the run goes on, metrics.jsonl has all",
                    file=sys.stderr, flush=True,
                )  # fmt: skip


def start_loggers(make: Callable[[], list[Logger]]) -> list[Logger]:
    """Start loggers.

    Raises:
        UserError: one does not start.
    """
    try:
        return make()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"runner.logger.logger_backends: a service did not start ({_reason(error)}); check its key and the network, log "
            "offline (WANDB_MODE=offline, SWANLAB_MODE=offline), or take it out of the list"
        ) from error


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON]
