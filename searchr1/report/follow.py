"""Files of a run that is still being written, read as far as they are new."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from searchr1.errors import UserError
from searchr1.report.overview import RunView, ends_of
from searchr1.report.run_files import LoggedFile, Row, brief, logged_files, parse_row
from searchr1.tracking.json_lines import parse_json
from searchr1.tracking.legs import Leg, SettingsChange, legs_of, settings_changes
from searchr1.tracking.loggers import METRICS_FILE

Stamp = tuple[int, int, int]
TAIL = 200
"""Bytes before what is new that must be as they were, or the file is another one."""


def stamp_of(path: Path) -> Stamp | None:
    """Return a file's inode, size and time in nanoseconds, which change when it is written; None without a file."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns


class GrowingMetrics:
    """The rows of a metrics.jsonl that another process appends to, and replaces when it is resumed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: Stamp | None = None
        self._read, self._line, self._tail = 0, 0, b""
        self.rows: list[Row] = []
        self.problem = ""
        """The first line that is not a row of metrics; such lines are skipped."""

    def refresh(self) -> bool:
        """Read what was appended; everything if the file was replaced or cut. Returns whether anything changed."""
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return False
        try:
            new = self._unread() if stamp is not None else None
        except OSError:
            new = None
        if new is None:
            self._start_over()
            self._stamp = None
            return True
        # A line without its end is still being written.
        whole, end, _ = new.rpartition(b"\n")
        if end:
            self._read += len(whole) + 1
            self._tail = (self._tail + whole + end)[-TAIL:]
            for line in whole.split(b"\n"):
                self._add(line)
        self._stamp = stamp
        return True

    def _unread(self) -> bytes:
        """Return what follows the part that was read; the whole file if that part is not there any more."""
        with self._path.open("rb") as file:
            file.seek(self._read - len(self._tail))
            if file.read(len(self._tail)) != self._tail:
                self._start_over()
                file.seek(0)
            return file.read()

    def _start_over(self) -> None:
        self._read, self._line, self._tail = 0, 0, b""
        self.rows, self.problem = [], ""

    def _add(self, line: bytes) -> None:
        self._line += 1
        if not line.strip():
            return
        try:
            row: Any = parse_json(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            self.rows.append(row)
        elif not self.problem:
            self.problem = f"{self._path}:{self._line}: no row of metrics; passed over"


class Indexed:
    """A trajectory file's rows in brief and where each begins; of a file that grows only what is new is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: Stamp | None = None
        self._read = self._lines = 0
        self.places: list[tuple[int, int]] = []
        """(offset, line number) of each row."""
        self.briefs: list[list[Any]] = []

    def refresh(self) -> None:
        """Read what is new; everything if the file was replaced or cut. A line without its end is left for later.

        Raises:
            UserError: a damaged line, or the file is gone.
        """
        stamp = stamp_of(self._path)
        if stamp is not None and stamp == self._stamp:
            return
        if stamp is None or self._stamp is None or stamp[0] != self._stamp[0] or stamp[1] < self._stamp[1]:
            self._read, self._lines, self.places, self.briefs = 0, 0, [], []
        self._stamp = None
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
        except OSError as error:
            raise UserError(f"{self._path}: not readable ({error.strerror})") from error
        for line in new.split(b"\n")[:-1]:
            if line.strip():
                self.briefs.append(brief(parse_row(self._path, self._lines + 1, line)))
                self.places.append((self._read, self._lines + 1))
            self._read += len(line) + 1
            self._lines += 1
        self._stamp = stamp

    def bodies(self, start: int, count: int) -> list[Row]:
        """Return rows `start` to `start + count`, read from where their lines begin.

        Raises:
            UserError: the file is gone or was written again.
        """
        try:
            with self._path.open("rb") as file:
                rows = []
                for place, number in self.places[start : start + count]:
                    file.seek(place)
                    rows.append(parse_row(self._path, number, file.readline()))
                return rows
        except OSError as error:
            raise UserError(f"{self._path}: not readable ({error.strerror})") from error


class WatchedRun:
    """One run's folder, which need not exist yet. Not safe for threads: the caller holds a lock."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self._metrics = GrowingMetrics(folder / METRICS_FILE)
        self._files: dict[LoggedFile, Stamp] = {}
        self._indexed: dict[LoggedFile, Indexed] = {}
        self._legs: dict[Leg, Stamp | None] = {}
        self._changes: list[SettingsChange] = []
        self._changes_problem = ""

    def refresh(self) -> bool:
        """Look for what is new. Returns whether anything changed."""
        changed = self._metrics.refresh()
        files = {file: stamp for file in logged_files(self.folder) if (stamp := stamp_of(file.path)) is not None}
        if files != self._files:
            self._files, changed = files, True
            self._indexed = {file: index for file, index in self._indexed.items() if file in files}
        legs = {leg: stamp_of(leg.path) for leg in legs_of(self.folder)}
        if legs != self._legs:
            self._legs, changed = legs, True
            self._read_changes()
        return changed

    def _read_changes(self) -> None:
        try:
            self._changes, self._changes_problem = settings_changes(self.folder), ""
        except UserError as error:
            self._changes, self._changes_problem = [], str(error)

    @property
    def files(self) -> dict[LoggedFile, Stamp]:
        """The trajectory files and their stamps, which change when a file is written again."""
        return self._files

    @property
    def problem(self) -> str:
        """A problem that a person should know of, "" without one."""
        if not self.folder.is_dir():
            return f"There is no folder {self.folder} yet. This page will show the run as soon as it starts."
        if not self._metrics.rows and not self._files:
            return f"{self.folder} holds no run yet. This page will show the first evaluation or step when it is finished."
        return self._metrics.problem or self._changes_problem

    def view(self) -> RunView:
        """Return the run as it was at the last refresh; evaluations that cannot be read count as unknown."""
        ends = []
        for file in ends_of(list(self._files)):
            try:
                ends.append(self.index(file).briefs if file else [])
            except UserError:
                ends.append([])
        first, last = ends
        return RunView(self.name, self._metrics.rows, list(self._files), first, last, self._changes)

    def index(self, file: LoggedFile) -> Indexed:
        """Return a file's rows as they are now.

        Raises:
            UserError: a damaged line, or the file is gone.
        """
        indexed = self._indexed.setdefault(file, Indexed(file.path))
        indexed.refresh()
        return indexed

    def holds(self, file: LoggedFile, question: str) -> bool:
        """Return whether a file has a row with this id, from its text, without parsing every row."""
        quoted = json.dumps(question, ensure_ascii=False).encode("utf-8", "backslashreplace")
        try:
            content = file.path.read_bytes()
        except OSError:
            return False
        # Quotes within a string are escaped, so this occurs nowhere else.
        return any(b'"id":' + blank + quoted + b"," in content for blank in (b"", b" "))
