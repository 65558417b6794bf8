"""A run's folder: where everything goes, and where to go on from."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from searchr1.actor.checkpoint import HF_FOLDER, latest_checkpoint, new_checkpoint, prune_checkpoints
from searchr1.config.load import save_config
from searchr1.config.model_settings import ModelSettings
from searchr1.config.schema import Config
from searchr1.data.loader import PromptLoader
from searchr1.errors import UserError
from searchr1.runner.groups import Groups

logger = logging.getLogger(__name__)

RUNNER_STATE = "runner.json"
SAVE_TIMEOUT_S = 3600.0


@dataclass(slots=True)
class RunFolder:
    """`{runner.output_dir}/{runner.experiment_name}`."""

    path: Path
    resume_from: Path | None
    keep_checkpoints: int | None
    model_settings: ModelSettings
    """Written into every checkpoint, so that one that is copied elsewhere can still be converted with them."""
    async_save: bool = False
    _writing: Iterator[None] | None = None

    @classmethod
    def open(cls, config: Config) -> RunFolder:
        """Make the folder, or decide what to resume.

        Raises:
            UserError: the folder holds a run that nobody asked to resume, or there is nothing to resume.
        """
        path = Path(config.runner.output_dir) / config.runner.experiment_name
        resume_from = _resume_from(path, config.runner.resume_dir)
        settings = ModelSettings.of(config)
        used = (path / "metrics.jsonl").exists() or (path / "checkpoints").exists()
        if used and config.runner.resume_dir is None and not config.runner.overwrite:
            raise UserError(
                f"runner.experiment_name: {path} already holds a run; give another name, set runner.resume_dir=auto to go "
                "on with it, or runner.overwrite=True to write over it"
            )
        try:
            if config.runner.overwrite and resume_from is None:
                # An earlier run's checkpoints must not be taken for this one's by a later resume.
                for name in ("checkpoints", "trajectories", "tensorboard"):
                    shutil.rmtree(path / name, ignore_errors=True)
                (path / "metrics.jsonl").unlink(missing_ok=True)
            path.mkdir(parents=True, exist_ok=True)
            save_config(config, path / "config.yaml")
        except OSError as error:
            raise UserError(f"runner.output_dir: cannot write {path}: {error.strerror}") from error
        return cls(path, resume_from, config.runner.keep_checkpoints, settings, config.runner.async_save)

    def resume(self, groups: Groups, loader: PromptLoader) -> int:
        """Load the checkpoint, if there is one to go on from. Returns the last finished step (0 for a fresh run)."""
        if self.resume_from is None:
            return 0
        assert groups.actor is not None
        state = json.loads((self.resume_from / RUNNER_STATE).read_text())
        if groups.critic is not None and not (self.resume_from / "critic").is_dir():
            raise UserError(
                f"runner.resume_dir: {self.resume_from} was written without a critic; resume with the algorithm that wrote "
                "it, or convert it (searchr1 convert) and start from the model"
            )
        groups.actor.call("load", self.resume_from / "actor").wait(SAVE_TIMEOUT_S)
        if groups.critic is not None:
            groups.critic.call("load", self.resume_from / "critic").wait(SAVE_TIMEOUT_S)
        loader.load_state_dict(state["loader"])
        logger.info("going on after step %d from %s", state["step"], self.resume_from)
        return int(state["step"])

    def save(self, groups: Groups, loader: PromptLoader, step: int) -> None:
        """Write a checkpoint, or begin to (`runner.async_save`). It gets its final name only when it is complete."""
        self.finish_save()
        self._writing = self._write(groups, loader, step)
        next(self._writing, None)

    def finish_save(self) -> None:
        """Complete a checkpoint that is being written in the background."""
        if self._writing is not None:
            next(self._writing, None)
            self._writing = None

    def _write(self, groups: Groups, loader: PromptLoader, step: int) -> Iterator[None]:
        """Stops in the middle while actor and critic write in the background."""
        assert groups.actor is not None
        trained = [("actor", groups.actor), *([("critic", groups.critic)] if groups.critic is not None else [])]
        with new_checkpoint(self.path / "checkpoints", step) as folder:
            state = {"step": step, "loader": loader.state_dict()}
            (folder / RUNNER_STATE).write_text(json.dumps(state, indent=2) + "\n")
            for name, group in trained:
                group.call("save", folder / name, self.async_save).wait(SAVE_TIMEOUT_S)
            self.model_settings.write(folder / "actor" / HF_FOLDER)
            if self.async_save:
                yield
                for _, group in trained:
                    group.call("finish_save").wait(SAVE_TIMEOUT_S)
        if self.keep_checkpoints:
            prune_checkpoints(self.path / "checkpoints", self.keep_checkpoints)


def _resume_from(path: Path, resume_dir: str | None) -> Path | None:
    if resume_dir is None:
        return None
    if resume_dir == "auto":
        return latest_checkpoint(path / "checkpoints")
    folder = Path(resume_dir)
    if not (folder / RUNNER_STATE).is_file():
        raise UserError(
            f"runner.resume_dir: {folder} is no checkpoint ({RUNNER_STATE} is missing); give a folder named "
            "global_step_N, or auto"
        )
    return folder
