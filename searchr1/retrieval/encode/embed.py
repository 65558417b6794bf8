"""A corpus -> a file of vectors, by several processes if wanted; goes on where it was stopped.

The file has its final size from the start. A process writes a part in its place, makes sure that it is on the disk, and only
then leaves a mark; a part without a mark is written again. So a kill at any moment costs at most one part per process, and
the finished file is the same.
"""

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

from searchr1.errors import UserError
from searchr1.progress import Advance
from searchr1.retrieval.encode.embedding_folder import EmbeddingFolder
from searchr1.retrieval.encode.encoder import Encoder
from searchr1.retrieval.index.corpus import Corpus


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
