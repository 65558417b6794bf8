"""Finished questions on disk: a JSON line per rollout, appended as they finish; an evaluation that was killed goes on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from searchr1.agent.trajectory import Trajectory
from searchr1.errors import UserError
from searchr1.evaluation.manifest import Manifest, differences
from searchr1.files.atomic import write_text
from searchr1.rewards.answers import answer_of, scored_text
from searchr1.tracking.token_text import TokenText
from searchr1.tracking.trajectory_log import eval_file, trajectory_row

MANIFEST = "evaluation.json"


class Ledger:
    """The rows of one method in one folder, which this process has for itself (`folder_lock`).

    `open` only reads, so that an evaluation that is refused leaves the folder as it was; `begin` starts to write. As a
    context manager it begins and closes.
    """

    def __init__(self, folder: Path, manifest: Manifest, token_text: TokenText | None) -> None:
        """Use `open`."""
        self._folder, self._manifest, self._token_text = folder, manifest, token_text
        self._untagged: str = manifest.get("untagged", "reject")
        self._path = eval_file(folder, 0)
        self._file: BinaryIO | None = None
        self._end = 0
        self.begun = False
        """Whether `begin` was called."""
        self.finished: set[int] = set()
        """Numbers of the questions whose rollouts are all there."""
        self.spoiled: set[int] = set()
        """Numbers of the questions that are to be asked again because a tool failed."""

    @classmethod
    def open(cls, folder: Path, manifest: Manifest, token_text: TokenText | None = None, *, anew: bool = False) -> Ledger:
        """Look what the folder holds; nothing is written.

        Questions during which a tool call failed count as not finished: a server that dies takes some questions down with it
        before the evaluation stops, or all that were left if that is soon.

        Args:
            folder: of one method.
            manifest: what the answers depend on.
            token_text: if given, the tokens' log-probabilities are written too.
            anew: begin without what the folder holds.

        Raises:
            UserError: the folder holds answers of another model, other questions or other settings; a damaged line;
                it cannot be written.
        """
        ledger = cls(folder, manifest, token_text)
        path = ledger._path
        try:
            if not anew:
                _check_manifest(folder, manifest, has_rows=path.exists() and path.stat().st_size > 0)
            ledger._file = path.open("r+b") if path.exists() else None
        except OSError as error:
            raise UserError(f"runner.output_dir: cannot write {folder}: {error.strerror}") from error
        try:
            if ledger._file is not None and not anew:
                ledger._scan_rows(ledger._file)
        except BaseException:
            ledger.close()
            raise
        return ledger

    def _scan_rows(self, file: BinaryIO) -> None:
        finished, self.spoiled, self._end = _scan(file, self._path, self._manifest["attempts"])
        self.finished = finished - self.spoiled

    def begin(self) -> None:
        """Start to write: the manifest of a new evaluation; a line that a kill cut short is taken off.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if not (self._folder / MANIFEST).exists():
                write_text(self._folder / MANIFEST, json.dumps(self._manifest, indent=2) + "\n")
            if self._file is None or not self._path.exists():
                self.close()  # of a file that was removed to begin anew
                self._file = self._path.open("w+b")
            self._file.truncate(self._end)
            self._file.seek(self._end)
        except OSError as error:
            raise UserError(f"runner.output_dir: cannot write {self._folder}: {error.strerror}") from error
        self.begun = True

    def append(self, trajectories: Sequence[Trajectory]) -> None:
        """Write rollouts, those at one question next to each other; a kill after this returns takes none of them.

        Raises:
            UserError: the disk is full.
        """
        assert self.begun
        assert self._file is not None
        try:
            self._file.write(b"".join(_line(trajectory, self._token_text, self._untagged) for trajectory in trajectories))
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._path}: not writable ({error.strerror}); free some space") from error

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield every row."""
        with self._path.open("rb") as file:
            for line in file:
                yield json.loads(line)

    def close(self) -> None:
        """Hand the file back."""
        if self._file is None:
            return
        with contextlib.suppress(ValueError, OSError):  # closed before; a full disk was reported when it happened
            if self.begun:
                os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Ledger:
        try:
            self.begin()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _line(trajectory: Trajectory, token_text: TokenText | None, untagged: str) -> bytes:
    scored = scored_text([turn.policy_text for turn in trajectory.turns], untagged)
    row = {"number": trajectory.sample.index, **trajectory_row(trajectory, token_text), "answer": answer_of(scored)}
    return (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n").encode("utf-8", "backslashreplace")


def _check_manifest(folder: Path, manifest: Manifest, has_rows: bool) -> None:
    """Compare with what the folder's answers were made with, if there are any."""
    path = folder / MANIFEST
    advice = "give another runner.experiment_name, or set runner.overwrite=True to begin anew"
    if not path.exists():
        if has_rows:
            raise UserError(f"{folder} holds answers, but not what they were made with ({MANIFEST}); {advice}")
        return
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable ({error}); {advice}") from error
    # As JSON holds it: what is compared must have made the same way.
    ours = json.loads(json.dumps(manifest))
    if changed := list(differences(ours, theirs if isinstance(theirs, dict) else {})):
        listed = "".join(f"\n  - {difference}" for difference in changed)
        raise UserError(f"{folder} holds an evaluation that this one cannot go on with; {advice}. What differs:{listed}")


def _scan(file: BinaryIO, path: Path, rollouts: int) -> tuple[set[int], set[int], int]:
    """Return the finished questions, those of them in which a tool failed, and where the last whole one ends.

    Rollouts of one question follow each other; of a question that was asked twice the last time counts.
    """
    finished: set[int] = set()
    failed: set[int] = set()
    parts: dict[int, dict[int, bool]] = {}
    position = end = 0
    for line_number, line in enumerate(file, start=1):
        position += len(line)
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            number, rollout_id = int(row["number"]), int(row["replica"])
            went_wrong = row["stop"] == "error" or any(turn["tool_error"] is not None for turn in row["turns"])
        except (ValueError, KeyError, TypeError) as error:
            if not file.read(1):
                break  # the last line: a kill can leave a hole before its end
            raise UserError(f"{path}:{line_number}: not a logged answer ({error}); remove the line") from error
        seen = parts.setdefault(number, {})
        seen[rollout_id] = went_wrong
        if len(seen) == rollouts:
            finished.add(number)
            (failed.add if any(seen.values()) else failed.discard)(number)
            end = position
            del parts[number]
    return finished, failed, end
