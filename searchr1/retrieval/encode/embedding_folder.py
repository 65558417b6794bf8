"""The folder of an embedding's parts until all are finished: `<save_dir>/embedding`, and beside it the vector file."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from searchr1.errors import UserError
from searchr1.files.atomic import write_text

PART_ROWS = 4096
"""Passages that a kill costs at most, per process."""
DTYPES = {"f16": np.float16, "f32": np.float32}


@dataclass(frozen=True, slots=True)
class EmbeddingPlan:
    """What the vector file depends on. A folder with parts of another plan is not gone on with."""

    corpus: str
    """Fingerprint."""
    rows: int
    encoder: str
    weights: str
    pooling: str
    max_length: int
    encoder_dtype: str
    dimension: int
    file: str
    """Name of the vector file."""
    dtype: str
    """Format of its numbers: f16 or f32."""
    given: str | None = None
    """SHA-256 of the file that the vectors come from, in place of the encoder."""
    header_bytes: int = 0
    """Bytes that are left free before the vectors."""
    part_rows: int = PART_ROWS


class EmbeddingFolder:
    """The plan, a mark for every finished part, and the vector file."""

    def __init__(self, save_dir: Path, plan: EmbeddingPlan) -> None:
        """Name the places; nothing is read or written."""
        self.plan = plan
        self.vectors = save_dir / plan.file
        self._folder = save_dir / "embedding"
        self._known = self._folder / "plan.json"
        self._row_bytes = plan.dimension * np.dtype(DTYPES[plan.dtype]).itemsize
        self.bytes = plan.header_bytes + plan.rows * self._row_bytes

    def started(self) -> bool:
        """Return whether there are parts of this plan or another."""
        return self._known.is_file()

    def open(self, more_bytes: int) -> None:
        """Go on with the parts that are there, or start. `more_bytes` will be written beside the vectors later.

        Raises:
            UserError: the folder holds something else, parts of another plan, or the disk is too small.
        """
        if self.started():
            self._check_same(self._plan_before())
            if self.vectors.is_file() and self.vectors.stat().st_size == self.bytes:
                self._forget_changed()
                return
        elif self._folder.exists() and any(not file.name.endswith(".partial") for file in self._folder.iterdir()):
            raise UserError(f"{self._folder}: is not a folder of this command; give another --save_dir")
        free, wanted = shutil.disk_usage(self.vectors.parent).free, self.bytes + more_bytes
        if free < wanted:
            raise UserError(
                f"--save_dir {self.vectors.parent}: the index needs {wanted / 2**30:.1f} GiB of disk while it is built, "
                f"{free / 2**30:.1f} are free"
            )
        self._folder.mkdir(exist_ok=True)
        self._remove_marks()
        with self.vectors.open("wb") as file:
            file.truncate(self.bytes)
        write_text(self._known, json.dumps(asdict(self.plan), indent=2) + "\n")

    def _plan_before(self) -> dict[str, Any]:
        try:
            before = json.loads(self._known.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"--save_dir {self.vectors.parent}: its unfinished index is damaged ({self._known.name}: {error}); "
                f"remove {self._folder} to start anew"
            ) from error
        return before if isinstance(before, dict) else {}

    def _forget_changed(self) -> None:
        """Remove the marks of parts whose vectors are no longer those that were written."""
        with self.vectors.open("rb") as file:
            for part in sorted(set(range(self._parts())) - set(self.missing())):
                known = self._mark(part).read_text(encoding="ascii", errors="replace")
                file.seek(self._place(part))
                vectors = file.read(len(self.rows_of(part)) * self._row_bytes)
                if known and known != xxhash.xxh3_128_hexdigest(vectors):  # empty: of a version without checksums
                    print(f"{self.vectors}: part {part} has changed since it was written; it is made again", flush=True)
                    self._mark(part).unlink()

    def _check_same(self, before: dict[str, Any]) -> None:
        now = asdict(self.plan)
        changed = [
            f"{field.name} was {before.get(field.name)}, is {now[field.name]}"
            for field in fields(self.plan)
            if before.get(field.name) != now[field.name]
        ]
        if changed:
            raise UserError(
                f"--save_dir {self.vectors.parent}: holds an unfinished index made otherwise ({'; '.join(changed)}); "
                "give the same flags to go on, --overwrite to start anew, or another folder"
            )

    def missing(self) -> list[int]:
        """Return the parts without a mark."""
        return [part for part in range(self._parts()) if not self._mark(part).exists()]

    def _parts(self) -> int:
        return -(-self.plan.rows // self.plan.part_rows)

    def _mark(self, part: int) -> Path:
        return self._folder / f"part-{part:06d}"

    def rows_of(self, part: int) -> range:
        """Return the rows of a part."""
        start = part * self.plan.part_rows
        return range(start, min(start + self.plan.part_rows, self.plan.rows))

    def write(self, part: int, vectors_RD: Any) -> None:
        """Put a part in its place and mark it.

        Raises:
            UserError: the disk is full, or the vectors are no numbers.
        """
        block = np.ascontiguousarray(vectors_RD, dtype=DTYPES[self.plan.dtype])
        if not np.isfinite(block).all():
            row = self.rows_of(part).start + int(np.isfinite(block).all(axis=1).argmin())
            raise UserError(
                f"--dtype {self.plan.encoder_dtype}: the vector of passage {row} (counted from 0) has numbers that are not "
                "finite; try --dtype bf16 or fp32 (with --overwrite)"
            )
        content = block.tobytes()
        self._write_at(self._place(part), content)
        write_text(self._mark(part), xxhash.xxh3_128_hexdigest(content))

    def _place(self, part: int) -> int:
        return self.plan.header_bytes + self.rows_of(part).start * self._row_bytes

    def write_header(self, header: bytes) -> None:
        """Write the header, last: a file without it is not an index.

        Raises:
            UserError: the disk is full.
        """
        self._write_at(0, header)

    def _write_at(self, place: int, content: bytes) -> None:
        try:
            with self.vectors.open("r+b") as file:
                file.seek(place)
                file.write(content)
                file.flush()
                os.fdatasync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.vectors}: cannot write ({error}); make room and run the same command again") from error

    def discard(self) -> None:
        """Remove what an unfinished build left: its vector file, marks and plan."""
        if self.started():
            name = self._plan_before().get("file")
            if isinstance(name, str) and Path(name).name not in ("", ".."):
                (self.vectors.parent / Path(name).name).unlink(missing_ok=True)
            self.remove()

    def remove(self) -> None:
        """Forget plan and marks; the vector file stays."""
        self._remove_marks()  # first: with the plan there, a kill in between leaves a folder that is known as ours
        self._known.unlink()
        with suppress(OSError):  # somebody else's file is in it
            self._folder.rmdir()

    def _remove_marks(self) -> None:
        for mark in self._folder.glob("part-*"):
            mark.unlink()
