"""Embeddings as Search-R1 keeps them: `emb_<retriever>.memmap`, [passages, dimension] fp32 and nothing else."""

from __future__ import annotations

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
