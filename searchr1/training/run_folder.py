"""A run's folder: where everything goes, whether it can be written, and where to go on from."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from searchr1.checkpoints.manifest import (
    HF_FOLDER,
    checkpoint_steps,
    latest_checkpoint,
    new_checkpoint,
    prune_checkpoints,
    verify_checkpoint,
)
from searchr1.cluster.launch import TrainingCluster
from searchr1.cluster.worker_group import TrainedGroup
from searchr1.config.difference import Difference, differences
from searchr1.config.load import save_config
from searchr1.config.schema import Config
from searchr1.data.loader import PromptLoader
from searchr1.data.model_settings import ModelSettings
from searchr1.errors import UserError, WorkerDied
from searchr1.files.atomic import atomic_file, write_bytes
from searchr1.files.checksums import FileSum, read_json, take_all
from searchr1.shutdown import Stopped
from searchr1.tracking.legs import FOLDER, LATEST, leg_file, legs_of, read_settings
from searchr1.tracking.loggers import METRICS_FILE, read_metrics
from searchr1.tracking.run_path import run_path

logger = logging.getLogger(__name__)

RUNNER_STATE = "runner.json"
SAVE_TIMEOUT_S = 3600.0


class _Dropped(Exception):
    """A checkpoint that has been written is not wanted."""


@dataclass(slots=True)
class RunFolder:
    """`{runner.output_dir}/{runner.experiment_name}`.

    `open` reads, `load` hands the checkpoint to the actor, and only `begin` writes: a run that is rejected, or whose worker
    groups do not start, leaves the folder as it was.
    """

    path: Path
    config: Config
    model_settings: ModelSettings
    """Written into every checkpoint, so that one that is copied elsewhere can still be converted with them."""
    resume_from: Path | None = None
    step: int = 0
    """The last finished step; 0 for a fresh run."""
    changed: list[Difference] = field(default_factory=list)
    """In which settings the run differs from the one that wrote the checkpoint."""
    earlier: dict[int, bytes] = field(default_factory=dict)
    """First step -> the configuration's text, of every leg up to the checkpoint."""
    _writing: Generator[None] | None = None

    @classmethod
    def open(cls, config: Config, loader: PromptLoader) -> RunFolder:
        """Decide what to resume, and put `loader` where it goes on. Nothing is written.

        Raises:
            UserError: the folder holds a run that nobody asked to resume, there is nothing to resume, or the checkpoint is
                of other questions, of another order, or of another algorithm.
        """
        path = run_path(config)
        resume_from = _resume_from(path, config.runner.resume_dir)
        settings = ModelSettings.of(config)
        used = (path / METRICS_FILE).exists() or (path / "checkpoints").exists()
        if used and config.runner.resume_dir is None and not config.runner.overwrite:
            raise UserError(
                f"runner.experiment_name: {path} already holds a run; give another name, set runner.resume_dir=auto to go "
                "on with it, or runner.overwrite=True to write over it"
            )
        folder = cls(path, config, settings, resume_from)
        if resume_from is not None:
            folder._resume(resume_from, loader)
        return folder

    def _resume(self, checkpoint: Path, loader: PromptLoader) -> None:
        state = _runner_state(checkpoint)
        self.step = state["step"]
        if self.config.critic.use_critic_model and not (checkpoint / "critic").is_dir():
            raise UserError(
                f"runner.resume_dir: {checkpoint} was written without a critic; resume with the algorithm that wrote "
                "it, or convert it (searchr1 convert) and start from the model"
            )
        loader.load_state_dict(state["loader"])
        run = _run_of(checkpoint)
        if self.path.resolve() not in checkpoint.resolve().parents and not self.config.runner.overwrite:
            _require_no_other_steps(self.path, self.step, checkpoint)
        legs = [leg for leg in legs_of(run) if leg.first_step <= self.step] if run is not None else []
        try:
            self.earlier = {leg.first_step: leg.path.read_bytes() for leg in legs}
        except OSError as error:
            raise UserError(
                f"{error.filename}: not readable ({error.strerror}); make it readable, or move it away"
            ) from error
        if legs:
            self.changed = differences(read_settings(legs[-1].path), dataclasses.asdict(self.config))

    def describe(self) -> str:
        """Return what a person should read before the run starts: where it goes on, and with which other settings."""
        if self.resume_from is None:
            if self.config.runner.resume_dir is None or not (self.path / METRICS_FILE).is_file():
                return ""
            return f"no checkpoint in {self.path} to go on from: beginning with step 1; what was logged there is replaced"
        lines = [f"going on after step {self.step} from {self.resume_from}"]
        if not self.earlier:
            lines.append("  the settings that wrote it are not recorded, so changes cannot be listed")
        settings = [difference for difference in self.changed if not difference.harmless]
        if settings:
            lines.append(f"  changed from step {self.step + 1} on:")
            lines += [f"    {difference}" for difference in settings]
        harmless = [difference for difference in self.changed if difference.harmless]
        if harmless:
            lines.append("  also changed, without effect on what is learned:")
            lines += [f"    {difference}" for difference in harmless]
        return "\n".join(lines)

    def load(self, cluster: TrainingCluster) -> None:
        """Load the checkpoint, if there is one to go on from, into actor and critic.

        Raises:
            UserError: it is damaged, or of another model.
        """
        if self.resume_from is None:
            return
        cluster.actor.load(self.resume_from / "actor").wait(SAVE_TIMEOUT_S)
        if cluster.critic is not None:
            cluster.critic.load(self.resume_from / "critic").wait(SAVE_TIMEOUT_S)

    def begin(self) -> None:
        """Make the folder the run's: remove what it writes anew, and record its configuration with its first step.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            own = self.resume_from is not None and self.path.resolve() in self.resume_from.resolve().parents
            if self.config.runner.overwrite and not own:
                # An earlier run's checkpoints must not be taken for this one's by a later resume.
                for name in ("checkpoints", "trajectories", "tensorboard"):
                    shutil.rmtree(self.path / name, ignore_errors=True)
                (self.path / METRICS_FILE).unlink(missing_ok=True)
            self.path.mkdir(parents=True, exist_ok=True)
            self._set_aside_later_checkpoints()
            self._record_leg()
        except OSError as error:
            raise UserError(f"runner.output_dir: cannot write {self.path}: {error.strerror}") from error

    def _record_leg(self) -> None:
        (self.path / FOLDER).mkdir(exist_ok=True)
        own = self.path / LATEST
        with atomic_file(own) as partial:
            save_config(self.config, partial)
            legs = self.earlier | {self.step + 1: partial.read_bytes()}
        for leg in legs_of(self.path):
            if leg.path != own and leg.first_step not in legs:
                leg.path.unlink()  # of steps that are taken again
        for first_step, text in legs.items():
            write_bytes(leg_file(self.path, first_step), text)

    def _set_aside_later_checkpoints(self) -> None:
        """Rename checkpoints of steps that are taken again: they are not this run's, and `auto` must not find them."""
        root = self.path / "checkpoints"
        later = [step for step in checkpoint_steps(root) if step > self.step]
        for step in later:
            aside = root / f"abandoned_step_{step}"
            if aside.exists():
                shutil.rmtree(aside)
            (root / f"global_step_{step}").rename(aside)
        if later:
            names = ", ".join(f"abandoned_step_{step}" for step in later)
            logger.warning("checkpoints after step %d are of steps that are taken again; they are now %s", self.step, names)

    def save(self, cluster: TrainingCluster, loader: PromptLoader, step: int) -> None:
        """Write a checkpoint, or begin to (`runner.async_save`), under a name that no resume takes.

        `finish_save` gives it its final name, `drop_save` deletes it: one of them must follow.
        """
        self.finish_save()
        self._writing = self._write(cluster, loader, step)
        next(self._writing)

    def finish_save(self) -> None:
        """Complete the checkpoint that has been written, if there is one, after what is still written of it."""
        if self._writing is not None:
            next(self._writing, None)
            self._writing = None

    def drop_save(self) -> None:
        """Delete the checkpoint that has been written, if there is one, after what is still written of it."""
        if self._writing is not None:
            with suppress(_Dropped):
                self._writing.throw(_Dropped())
            self._writing = None

    @contextmanager
    def explaining_how_to_go_on(self) -> Iterator[None]:
        """Put into what ends the run where it stands, and drop a checkpoint that it leaves half written.

        Its processes must have ended inside of the block: they may be writing.
        """
        try:
            yield
        except (Stopped, WorkerDied) as error:
            error.go_on = self.how_to_go_on()
            raise
        finally:
            if self._writing is not None:
                self._writing.close()
                self._writing = None

    def how_to_go_on(self) -> str:
        """Return the end of a sentence: after which step the run ends, and how to go on."""
        where = f" after step {self.step}" if self.step else " before its first step was finished"
        saved = checkpoint_steps(self.path / "checkpoints")
        if not saved:
            return f"{where}; nothing has been saved yet: begin again with runner.resume_dir=auto"
        return f"{where} (last checkpoint: step {saved[-1]}); go on with runner.resume_dir=auto"

    def _write(self, cluster: TrainingCluster, loader: PromptLoader, step: int) -> Generator[None]:
        """Write a checkpoint; stop in the middle, when it may not be complete yet and nobody may resume from it."""
        trained: list[tuple[str, TrainedGroup]] = [("actor", cluster.actor)]
        if cluster.critic is not None:
            trained.append(("critic", cluster.critic))
        sums: dict[str, FileSum] = {}
        with new_checkpoint(self.path / "checkpoints", step, sums) as folder, ThreadPoolExecutor(1) as beside:
            state = {"step": step, "loader": loader.state_dict()}
            (folder / RUNNER_STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            for name, group in trained:
                group.save(folder / name, self.config.runner.async_save).wait(SAVE_TIMEOUT_S)
            self.model_settings.write(folder / "actor" / HF_FOLDER)
            # In the background the ranks do it, when they have written.
            taken = None if self.config.runner.async_save else beside.submit(take_all, folder)
            dropped: _Dropped | None = None
            try:
                yield
            except _Dropped as error:
                dropped = error
            if self.config.runner.async_save:
                for _, group in trained:
                    group.finish_save().wait(SAVE_TIMEOUT_S)
            if dropped is not None:
                raise dropped
            if taken is not None:
                sums |= taken.result()
        if self.config.runner.keep_checkpoints:
            prune_checkpoints(self.path / "checkpoints", self.config.runner.keep_checkpoints)


def _resume_from(path: Path, resume_dir: str | None) -> Path | None:
    if resume_dir is None:
        return None
    if resume_dir == "auto":
        return latest_checkpoint(path / "checkpoints")
    folder = Path(resume_dir)
    if not (folder / RUNNER_STATE).is_file():
        raise UserError(
            f"runner.resume_dir: {folder} is not a checkpoint ({RUNNER_STATE} is missing); give a folder named "
            "global_step_N, or auto"
        )
    verify_checkpoint(folder)
    return folder


def _runner_state(checkpoint: Path) -> dict[str, Any]:
    """Return what the driver wrote into a checkpoint.

    Raises:
        UserError: it is not what a driver writes.
    """
    path = checkpoint / RUNNER_STATE
    try:
        state = read_json(path)
        order = state["loader"]
        order |= {name: int(order[name]) for name in ("epoch", "position")}
        return {"step": int(state["step"]), "loader": order}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path}: not readable ({error!r}): the checkpoint is damaged; set runner.resume_dir to an older one"
        ) from error


def _run_of(checkpoint: Path) -> Path | None:
    """Return the folder of the run that wrote a checkpoint; None if it was moved out of there."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" else None


def _require_no_other_steps(path: Path, step: int, checkpoint: Path) -> None:
    """Raise if rows up to `step` would stay and be taken for the checkpoint's own."""
    metrics = path / METRICS_FILE
    if metrics.is_file() and any(row["step"] <= step for row in read_metrics(metrics)):
        raise UserError(
            f"runner.experiment_name: {path} holds another run than {checkpoint} is of, with steps up to {step} of its own; "
            "give another name, or set runner.overwrite=True to write over it"
        )
