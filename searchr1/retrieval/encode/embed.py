"""A corpus -> a file of vectors, by several processes if wanted; goes on where it was stopped."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from searchr1.errors import UserError
from searchr1.files.atomic import atomic_file
from searchr1.files.checksums import damaged
from searchr1.progress import Advance
from searchr1.retrieval.encode.embedding_folder import DTYPES, EmbeddingFolder
from searchr1.retrieval.encode.encoder import Encoder
from searchr1.retrieval.index.corpus import Corpus
from searchr1.retrieval.index.manifest import DamagedIndex, index_error, open_manifest


@dataclass(frozen=True, slots=True)
class EncoderFlags:
    """How a process loads its encoder."""

    name: str
    path: str
    max_length: int
    dtype: str | None
    pooling: str | None
    batch_tokens: int

    def load(self, device: str) -> Encoder:
        """Return the encoder on a device.

        Raises:
            UserError: it cannot be loaded there.
        """
        return Encoder(
            self.name,
            self.path,
            max_length=self.max_length,
            device=device,
            dtype=self.dtype,
            pooling=self.pooling,
            batch_tokens=self.batch_tokens,
        )


def embed_parts(folder: EmbeddingFolder, corpus: Corpus, encoder: Encoder, parts: list[int], advance: Advance) -> None:
    """Encode and write parts, one after the other: memory holds one.

    Raises:
        UserError: the disk or the GPU is full, or the corpus was changed meanwhile.
    """
    import torch

    for part in parts:
        rows = folder.rows_of(part)
        try:
            vectors = encoder.encode(list(corpus.contents(rows.start, rows.stop)), "passage")
        except torch.OutOfMemoryError as error:
            raise UserError("--batch_size: too much for the GPU's memory; give a smaller one, and it goes on") from error
        folder.write(part, vectors)
        advance(len(rows))


def embed_by_processes(
    folder: EmbeddingFolder, corpus: Corpus, flags: EncoderFlags, devices: list[str], advance: Advance
) -> None:
    """Fill in all missing parts, one process per device; each takes every n-th part.

    Raises:
        UserError: an encoder cannot be loaded, the disk is full, or a process died. The others have ended then.
    """
    missing = folder.missing()
    context = multiprocessing.get_context("spawn")
    news: Any = context.Queue()
    threads = max((os.cpu_count() or 1) // len(devices), 1)
    processes = [
        context.Process(
            target=_work,
            args=(folder, corpus.path, flags, device, threads, missing[number :: len(devices)], news),
            daemon=True,
        )
        for number, device in enumerate(devices[: len(missing)])
    ]
    try:
        # Ctrl-C reaches the whole group. The processes inherit the block, and this one ends them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for process in processes:
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        _follow(processes, news, advance)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _work(
    folder: EmbeddingFolder, corpus: Path, flags: EncoderFlags, device: str, threads: int, parts: list[int], news: Any
) -> None:
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        passages = Corpus(corpus)
        if passages.fingerprint() != folder.plan.corpus:
            raise UserError(f"--corpus_path {corpus}: was changed while its passages were embedded; run the command again")
        embed_parts(folder, passages, flags.load(device), parts, news.put)
    except UserError as error:
        news.put(str(error))
    news.close()
    news.join_thread()


def _end_with_parent() -> None:
    """End with the parent, even a killed one: nobody may write into the folder of the next start."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _follow(processes: list[Any], news: Any, advance: Advance) -> None:
    while True:
        running = any(process.is_alive() for process in processes)
        try:
            while True:
                message = news.get(timeout=0.2 if running else 0.01)
                if isinstance(message, str):
                    raise UserError(message)
                advance(message)
        except queue.Empty:
            pass
        dead = [process for process in processes if process.exitcode not in (None, 0)]
        if dead:
            raise UserError(
                f"a process that embeds died (exit code {dead[0].exitcode}); run the same command again to go on"
            )
        if not running:
            return


BLOCK_ROWS = 1 << 14
SAMPLE = 16
"""Passages that are encoded to see whether a file belongs to the corpus and the encoder."""


def embedding_name(retriever: str) -> str:
    """Return the name of the file."""
    return f"emb_{retriever}.memmap"


def save_embedding(folder: EmbeddingFolder, path: Path) -> None:
    """Copy the finished vectors of a build into a file of their own.

    Raises:
        UserError: the disk is full.
    """
    plan = folder.plan
    vectors_RD: npt.NDArray[Any] = np.memmap(
        folder.vectors, DTYPES[plan.dtype], "r", plan.header_bytes, (plan.rows, plan.dimension)
    )
    try:
        with atomic_file(path) as partial, partial.open("wb") as file:
            for start in range(0, plan.rows, BLOCK_ROWS):
                file.write(vectors_RD[start : start + BLOCK_ROWS].astype(np.float32).tobytes())
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error}); make room and run the same command again") from error


def open_embedding(path: Path, corpus: Corpus, encoder: Encoder) -> npt.NDArray[np.float32]:
    """Map a file of embeddings.

    Raises:
        UserError: missing, of another size, or not what the encoder gives for these passages.
    """
    wanted = len(corpus) * encoder.dimension * 4
    size = path.stat().st_size if path.is_file() else None
    if size != wanted:
        raise UserError(
            f"--embedding_path {path}: {'no such file' if size is None else f'has {size} bytes'}; {wanted} bytes are "
            f"expected ({len(corpus)} passages x {encoder.dimension} numbers of fp32)"
        )
    reject_changed(path)
    vectors_RD = np.memmap(path, np.float32, "r", shape=(len(corpus), encoder.dimension))
    rows = np.unique(np.linspace(0, len(corpus) - 1, SAMPLE).astype(int))
    encoded = encoder.encode([text for row in rows for text in corpus.contents(row, row + 1)], "passage")
    given = np.asarray(vectors_RD[rows])
    scores = encoded @ (given / np.maximum(np.linalg.norm(given, axis=1, keepdims=True), 1e-12)).T
    # A passage that is there twice has two best rows. Encoding in fp16 or of fewer tokens changes little.
    own = np.mean(scores.diagonal() >= scores.max(axis=1) - 1e-3 * np.abs(scores).max())
    if not own > 0.5:
        raise UserError(
            f"--embedding_path {path}: is not of this corpus and encoder: {own:.0%} of {len(rows)} passages are nearest to "
            "their own vector; leave the flag out to embed them"
        )
    return vectors_RD


def reject_changed(path: Path) -> None:
    """Reject a file that has changed since --save_embedding wrote it, by the manifest beside it.

    Raises:
        UserError: it has changed, or the manifest is damaged.
    """
    try:
        manifest = open_manifest(path.parent)
    except DamagedIndex as error:
        raise index_error(error) from error
    known = manifest.files.get(path.name) if manifest and manifest.files else None
    if known is not None:
        for damage in damaged(path.parent, {path.name: known}):
            raise UserError(f"--embedding_path {damage.path}: {damage.problem}; copy it again, or leave the flag out")


def copy_parts(folder: EmbeddingFolder, vectors_RD: npt.NDArray[np.float32], parts: list[int], advance: Advance) -> None:
    """Write parts of a build from embeddings that are there already.

    Raises:
        UserError: the disk is full, or the vectors are no numbers.
    """
    for part in parts:
        rows = folder.rows_of(part)
        folder.write(part, vectors_RD[rows.start : rows.stop])
        advance(len(rows))
