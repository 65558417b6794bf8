"""One object that records a run: metrics, trajectories, the progress bar and a line per step."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console

from searchr1.agent.trajectory import Trajectory
from searchr1.config.schema import Config
from searchr1.progress import ProgressBar
from searchr1.tracking.loggers import FAILED, GuardedLogger, Logger, file_loggers
from searchr1.tracking.metrics import eval_table
from searchr1.tracking.token_text import load_token_text
from searchr1.tracking.trajectory_log import eval_file, remove_later, train_file, whole_groups, write_trajectories

LINE = (
    ("reward", "reward/mean", "{:.3f}"),
    ("em", "reward/exact_match", "{:.3f}"),
    ("searches", "rollout/searches", "{:.2f}"),
    ("length", "rollout/response_length", "{:.0f}"),
    ("kl", "actor/kl", "{:.4f}"),
    ("entropy", "actor/entropy", "{:.3f}"),
    ("mismatch", "mismatch/logprob_gap_max", "{:.0e}"),
)
SECONDS = (
    ("rollout", "time/rollout"),
    ("reward", "time/reward"),
    ("logprob", "time/logprob"),
    ("train", "time/train"),
    ("update", "time/weight_update"),
)


class RunLog:
    """Use as a context manager; every write is on disk when the call returns."""

    def __init__(
        self, folder: Path, config: Config, hosted: Sequence[Logger] = (), *, first_step: int, total_steps: int
    ) -> None:
        """Take up the folder's files after `first_step`; `hosted` log besides, and are closed with it."""
        self._folder = folder
        self._console = Console(file=sys.stdout, soft_wrap=True)
        # metrics.jsonl comes first and has everything; what fails besides must not end a run.
        self._metrics_file, *others = file_loggers(folder, config.runner.logger.logger_backends, first_step)
        self._others = [GuardedLogger(logger) for logger in (*others, *hosted)]
        self._most = config.runner.logger.trajectories_per_step
        self._token_text = load_token_text(config.rollout.model.model_path)
        remove_later(folder, first_step)
        self._bar = ProgressBar("training", total_steps, "steps", done=first_step, least=1, console=self._console)
        self._started = time.perf_counter()
        self._first_step, self._total_steps = first_step, total_steps

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.__exit__(kind, error, trace)
        for logger in (self._metrics_file, *self._others):
            logger.close()

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        if failed := sum(logger.failed for logger in self._others):
            metrics = metrics | {FAILED: float(failed)}
        for logger in (self._metrics_file, *self._others):
            logger.log(step, metrics)

    def step(self, step: int, trajectories: Sequence[Trajectory], metrics: dict[str, float]) -> None:
        """Record a training step."""
        write_trajectories(train_file(self._folder, step), whole_groups(trajectories, self._most), self._token_text)
        self._log(step, metrics)
        per_step = (time.perf_counter() - self._started) / max(step - self._first_step, 1)
        left = per_step * (self._total_steps - step)
        values = [f"{name} {form.format(metrics[key])}" for name, key, form in LINE if key in metrics]
        seconds = "/".join(f"{metrics.get(key, 0.0):.1f}" for _, key in SECONDS)
        names = "/".join(name for name, _ in SECONDS)
        self._bar.update(step, f"{per_step:.1f} s/step")
        self._console.print(
            f"step {step}/{self._total_steps}  {'  '.join(values)}  seconds {seconds} ({names})  left {left / 60:.1f} min",
            highlight=False,
            markup=False,
        )

    def evaluation(self, step: int, trajectories: Sequence[Trajectory], metrics: dict[str, float]) -> None:
        """Record an evaluation."""
        write_trajectories(eval_file(self._folder, step), trajectories, self._token_text)
        self._log(step, metrics)
        self._console.print(f"evaluation at step {step}\n{eval_table(metrics)}", highlight=False, markup=False)
