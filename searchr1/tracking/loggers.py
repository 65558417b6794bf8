"""Where metrics go: always metrics.jsonl, and the backends that the YAML names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from searchr1.errors import UserError


class Logger(Protocol):
    """One destination."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record a step's metrics."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


class JsonlLogger:
    """One JSON object a line, `{"step": …, name: value}`; written at once, so that a killed run keeps what it had."""

    def __init__(self, path: Path, first_step: int) -> None:
        rows = read_metrics(path) if path.exists() else []
        if rows:
            # Steps after the checkpoint that a resumed run goes on from will be run, and logged, again.
            kept = [row for row in rows if row["step"] <= first_step and first_step != 0]
            path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line; values that JSON cannot hold become null."""
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardLogger:
    """Event files for TensorBoard."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class ModuleLogger:
    """wandb and swanlab, whose modules have the same three functions."""

    def __init__(self, module: Any, project: str, name: str, config: dict[str, Any]) -> None:
        self._module = module
        module.init(project=project, name=name, config=config)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send a step."""
        self._module.log(metrics, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._module.finish()


def build_loggers(
    folder: Path, backends: Sequence[str], *, project: str, name: str, config: dict[str, Any], first_step: int
) -> list[Logger]:
    """metrics.jsonl and every backend.

    Raises:
        UserError: unknown backend, or its package is not installed.
    """
    import importlib

    loggers: list[Logger] = [JsonlLogger(folder / "metrics.jsonl", first_step)]
    makers: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: TensorBoardLogger(folder / "tensorboard", first_step),
        "wandb": lambda: ModuleLogger(importlib.import_module("wandb"), project, name, config),
        "swanlab": lambda: ModuleLogger(importlib.import_module("swanlab"), project, name, config),
    }
    for backend in backends:
        if backend not in makers:
            raise UserError(f"runner.logger.logger_backends: unknown {backend!r}; use any of {', '.join(makers)}")
        try:
            loggers.append(makers[backend]())
        except ImportError as error:
            raise UserError(
                f"runner.logger.logger_backends: {backend} is not installed; pip install 'searchr1[{backend}]'"
            ) from error
    return loggers


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
