"""What an index folder was built from, so that it is never served with another corpus or encoder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from searchr1.errors import UserError
from searchr1.retrieval.corpus import Corpus

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of `manifest.json`."""

    kind: str
    """"bm25" or "dense"."""
    rows: int
    corpus: str
    """Fingerprint of the corpus."""
    stemmer: str | None = None
    encoder: str | None = None
    """Family of the encoder (e5, bge, dpr), as --retriever_name."""
    model: str | None = None
    """Name of the encoder's folder, for people."""
    pooling: str | None = None
    dimension: int | None = None
    metric: str | None = None
    factory: str | None = None
    file: str | None = None
    """The FAISS file."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it last: an index folder without a manifest is unfinished."""
    values = {key: value for key, value in asdict(manifest).items() if value is not None}
    (folder / MANIFEST).write_text(json.dumps(values, indent=2) + "\n")


def read_manifest(folder: Path, corpus: Corpus, retriever_name: str) -> Manifest | None:
    """The manifest of an index folder; None for an index published without one.

    Raises:
        UserError: damaged, or the index was built from another corpus or for another retriever.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = Manifest(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); build the index again with searchr1 build-index") from error
    built_for = manifest.encoder or manifest.kind
    if built_for != retriever_name:
        raise UserError(f"--index_path {folder}: is a {built_for} index; start with --retriever_name {built_for}")
    if manifest.rows != len(corpus) or manifest.corpus != corpus.fingerprint():
        raise UserError(
            f"--index_path {folder}: was built from another corpus ({manifest.rows} passages; {corpus.path} has "
            f"{len(corpus)}); build it again with searchr1 build-index"
        )
    return manifest
