"""A corpus -> a file of vectors, by several processes if wanted; goes on where it was stopped.

The file has its final size from the start. A process writes a part in its place, makes sure that it is on the disk, and only
then leaves a mark; a part without a mark is written again. So a kill at any moment costs at most one part per process, and
the finished file is the same.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from searchr1.errors import UserError
from searchr1.retrieval.corpus import Corpus
from searchr1.retrieval.encoder import Encoder, Pooling

PART_ROWS = 8192
DTYPES = {"f16": np.float16, "f32": np.float32}

Progress = Callable[[int], None]
"""Told of the rows that were finished."""


@dataclass(frozen=True, slots=True)
class EmbeddingPlan:
    """What the vectors depend on. A folder with parts of another plan is not gone on with."""

    corpus: str
    rows: int
    encoder: str
    weights: str
    pooling: str
    max_length: int
    encoder_dtype: str
    dimension: int
    dtype: str
    part_rows: int = PART_ROWS


@dataclass(frozen=True, slots=True)
class EncoderFlags:
    """How a process loads its encoder."""

    name: str
    path: str
    max_length: int
    dtype: str | None
    pooling: Pooling | None

    def load(self, device: str) -> Encoder:
        """The encoder on a device."""
        return Encoder(
            self.name, self.path, max_length=self.max_length, device=device, dtype=self.dtype, pooling=self.pooling
        )


class EmbeddingFolder:
    """`<save_dir>/embedding`: the plan, the marks, and beside it the vector file."""

    def __init__(self, save_dir: Path, plan: EmbeddingPlan, overwrite: bool) -> None:
        """Open or start a folder.

        Raises:
            UserError: it holds parts of another plan, or the disk is too small.
        """
        self.plan = plan
        self._folder = save_dir / "embedding"
        self.vectors = save_dir / f"vectors.{plan.dtype}"
        self._bytes = plan.rows * plan.dimension * np.dtype(DTYPES[plan.dtype]).itemsize
        if overwrite:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        known = self._folder / "plan.json"
        if known.is_file():
            self._check_same(json.loads(known.read_text()))
        if not self.vectors.is_file() or self.vectors.stat().st_size != self._bytes or not known.is_file():
            self._start(known)

    def _check_same(self, before: dict[str, Any]) -> None:
        now = asdict(self.plan)
        changed = [f"{field.name} was {before.get(field.name)}, is {now[field.name]}" for field in fields(self.plan)
                   if before.get(field.name) != now[field.name]]  # fmt: skip
        if changed:
            raise UserError(
                f"--save_dir {self._folder.parent}: holds an unfinished index made otherwise ({'; '.join(changed)}); "
                "give the same flags to go on, --overwrite to start anew, or another folder"
            )

    def _start(self, known: Path) -> None:
        for mark in self._folder.glob("part-*"):
            mark.unlink()
        self.vectors.unlink(missing_ok=True)
        free = shutil.disk_usage(self._folder).free
        if free < self._bytes:
            raise UserError(
                f"--save_dir {self._folder.parent}: the vectors need {self._bytes / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} are free"
            )
        with self.vectors.open("wb") as file:
            file.truncate(self._bytes)
        partial = known.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self.plan), indent=2) + "\n")
        os.replace(partial, known)

    @property
    def parts(self) -> int:
        """How many there are in all."""
        return -(-self.plan.rows // self.plan.part_rows)

    def missing(self) -> list[int]:
        """Parts without a mark."""
        return [part for part in range(self.parts) if not self._mark(part).exists()]

    def _mark(self, part: int) -> Path:
        return self._folder / f"part-{part:06d}"

    def rows_of(self, part: int) -> range:
        """Rows of a part."""
        start = part * self.plan.part_rows
        return range(start, min(start + self.plan.part_rows, self.plan.rows))

    def write(self, part: int, vectors: Any) -> None:
        """Put a part in its place and mark it.

        Raises:
            UserError: the disk is full.
        """
        block = np.ascontiguousarray(vectors, dtype=DTYPES[self.plan.dtype])
        try:
            with self.vectors.open("r+b") as file:
                file.seek(self.rows_of(part).start * self.plan.dimension * block.itemsize)
                file.write(block.tobytes())
                file.flush()
                os.fdatasync(file.fileno())
            self._mark(part).touch()
        except OSError as error:
            raise UserError(f"{self.vectors}: cannot write ({error}); make room and run the same command again") from error

    def finish(self) -> None:
        """Forget the marks; the vector file stays."""
        shutil.rmtree(self._folder)


def embed(folder: EmbeddingFolder, corpus: Corpus, flags: EncoderFlags, devices: list[str], progress: Progress) -> None:
    """Fill in all missing parts, one process per device (in this process if there is one).

    Raises:
        UserError: an encoder cannot be loaded, the disk is full, or a process died.
    """
    missing = folder.missing()
    progress(folder.plan.rows - sum(len(folder.rows_of(part)) for part in missing))
    if len(devices) == 1 or len(missing) < 2:
        embed_parts(folder, corpus, flags.load(devices[0]), missing, progress)
        return
    context = multiprocessing.get_context("spawn")
    news: Any = context.Queue()
    threads = max((os.cpu_count() or 1) // len(devices), 1)
    processes = [
        context.Process(
            target=_process,
            args=(folder, corpus.path, flags, device, threads, missing[number :: len(devices)], news),
            daemon=True,
        )
        for number, device in enumerate(devices)
    ]
    try:
        for process in processes:
            process.start()
        _follow(processes, news, progress)
    finally:
        for process in processes:
            process.kill()
            process.join()


def embed_parts(folder: EmbeddingFolder, corpus: Corpus, encoder: Encoder, parts: list[int], progress: Progress) -> None:
    """Encode and write parts, one after the other: memory holds one."""
    for part in parts:
        rows = folder.rows_of(part)
        folder.write(part, encoder.encode(list(corpus.contents(rows.start, rows.stop)), "passage"))
        progress(len(rows))


def _process(
    folder: EmbeddingFolder, corpus: Path, flags: EncoderFlags, device: str, threads: int, parts: list[int], news: Any
) -> None:
    import torch

    torch.set_num_threads(threads)
    try:
        embed_parts(folder, Corpus(corpus), flags.load(device), parts, news.put)
    except UserError as error:
        news.put(str(error))
    news.close()
    news.join_thread()


def _follow(processes: list[Any], news: Any, progress: Progress) -> None:
    while True:
        running = any(process.is_alive() for process in processes)
        try:
            while True:
                found = news.get(timeout=0.2 if running else 0.01)
                if isinstance(found, str):
                    raise UserError(found)
                progress(found)
        except queue.Empty:
            pass
        dead = [process for process in processes if process.exitcode not in (None, 0)]
        if dead:
            raise UserError(
                f"a process that embeds died (exit code {dead[0].exitcode}); run the same command again to go on"
            )
        if not running:
            return
