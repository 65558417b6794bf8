"""Is the run still healthy? Limits on a step's metrics (`runner.health`), a warning first, and then a stop.

GRPO runs of search agents are known to collapse after some hundred steps. The metrics show it long before the reward is
gone, so every step is held against `watches.WATCHES`. A resumed run puts the rows of metrics.jsonl through the same
function again, and so knows what the one before it knew.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from searchr1.checkpoints.manifest import checkpoint_steps
from searchr1.config.schema import Config
from searchr1.errors import UserError
from searchr1.runner.watches import WATCHED, Finding, Row, examine
from searchr1.tracking.loggers import METRICS_FILE, read_metrics

logger = logging.getLogger(__name__)


class Health:
    """A run's record: every step is examined, warned about, and in the end stopped.

    Args:
        config: of the run.
        checkpoints: the folder that the run's checkpoints are in.
        rows: the steps before the one that the run goes on with, each with its `step`.
    """

    def __init__(self, config: Config, checkpoints: Path, rows: Sequence[Row] = ()) -> None:
        self._config = config
        self._limits = config.runner.health
        self._checkpoints = checkpoints
        self._past: list[Row] = []
        self._streak: list[int] = []
        for row in rows:
            self._record(int(row["step"] or 0), row)

    @classmethod
    def open(cls, config: Config, folder: Path, resumed_from: Path | None, step: int) -> Health:
        """Of a run in `folder` that goes on after `step`, from a checkpoint of its own or of another run."""
        metrics = (resumed_from.resolve().parents[1] if resumed_from else folder) / METRICS_FILE
        rows = read_metrics(metrics) if resumed_from and metrics.is_file() else []
        return cls(config, folder / "checkpoints", [row for row in rows if row["step"] <= step and "reward/mean" in row])

    def check(self, step: int, metrics: Row) -> None:
        """Warn about an unhealthy step.

        Raises:
            UserError: it was one too many; names the checkpoint to go on from.
        """
        findings = self._record(step, metrics)
        for finding in findings:
            logger.warning("step %d is unhealthy (%d in a row): %s", step, len(self._streak), finding)
        if len(self._streak) >= self._limits.patience and not self._limits.warn_only:
            raise UserError(self._farewell(findings))

    def allows_saving(self, step: int) -> bool:
        """Whether a checkpoint that is due may be written: `runner.resume_dir=auto` must not find an unhealthy one."""
        if self._streak and not self._limits.save_unhealthy:
            logger.warning("step %d is unhealthy: its checkpoint is left out (runner.health.save_unhealthy=True)", step)
            return False
        return True

    def _record(self, step: int, row: Row) -> list[Finding]:
        findings = examine(self._past, row, self._limits)
        if findings:
            self._streak.append(step)
        else:
            self._streak.clear()
            self._past.append({name: row[name] for name in WATCHED if name in row})
        return findings

    def _farewell(self, findings: Sequence[Finding]) -> str:
        first, last = self._streak[0], self._streak[-1]
        return "\n".join(
            [
                f"runner.health: stopped, because steps {first} to {last} were unhealthy:",
                *(f"  {finding}" for finding in findings),
                *self._put_aside(first),
                *self._how_to_go_on(first),
                "runner.health.warn_only=True goes on regardless; docs/health.md tells what each limit means.",
            ]
        )

    def _put_aside(self, first: int) -> list[str]:
        """Rename the checkpoint of the weights that step `first` ran with, so that `runner.resume_dir=auto` is good."""
        suspect = self._checkpoints / f"global_step_{first - 1}"
        if self._limits.save_unhealthy or not suspect.is_dir():
            return []
        renamed = suspect.with_name(f"suspect_step_{first - 1}")
        if renamed.exists():  # of an earlier stop at this step
            shutil.rmtree(renamed)
        suspect.rename(renamed)
        return [f"{suspect.name} holds the weights that step {first} ran with and is now {renamed.name}."]

    def _how_to_go_on(self, first: int) -> list[str]:
        rate = self._config.actor.optim.lr / 2
        overrides = f"actor.optim.lr={rate:g}"
        if self._config.actor.lr_sched.max_lr is not None:  # must say the same
            overrides += f" actor.lr_sched.max_lr={rate:g}"
        good = [step for step in checkpoint_steps(self._checkpoints) if step < first - 1]
        if not good:
            return [
                "There is no checkpoint from before that. Start again with a lower rate, or change what helps:",
                f"  runner.overwrite=True {overrides}",
            ]
        checkpoint = self._checkpoints / f"global_step_{good[-1]}"
        return [
            f"The last good checkpoint is {checkpoint}. Go on from it with a lower rate, or change what helps:",
            f"  runner.resume_dir={checkpoint} {overrides}",
        ]
