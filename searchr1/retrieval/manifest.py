"""What an index folder was built from, so that it is never served with another corpus or encoder."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from searchr1.errors import UserError
from searchr1.retrieval.corpus import Corpus
from searchr1.retrieval.encoder import Encoder
from searchr1.retrieval.model_files import weights_hash

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of `manifest.json`."""

    kind: str
    """"bm25" or "dense"."""
    rows: int
    corpus: str
    """Fingerprint of the corpus."""
    version: int = VERSION
    """Of this format."""
    stemmer: str | None = None
    tokenizer: str | None = None
    """See `searchr1.retrieval.tokens`."""
    encoder: str | None = None
    """Family of the encoder (e5, bge, ...), as --retriever_name."""
    model: str | None = None
    """Name of the encoder's folder, for people."""
    weights: str | None = None
    """SHA-256 of the encoder's weights; of DPR's passage encoder, which is not the one that a server needs."""
    encoder_dtype: str | None = None
    """Number format that the passages were encoded in."""
    pooling: str | None = None
    max_length: int | None = None
    """Tokens of a passage, at most."""
    dimension: int | None = None
    metric: str | None = None
    factory: str | None = None
    file: str | None = None
    """The FAISS file."""
    vectors: str | None = None
    """The exact vectors, beside an index that rounds them."""
    embedding: str | None = None
    """The vectors once more, as --save_embedding writes them."""
    nprobe: int | None = None
    ef_search: int | None = None
    refine_factor: int | None = None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it last: an index folder without a manifest is unfinished."""
    values = {key: value for key, value in asdict(manifest).items() if value is not None}
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / MANIFEST)


def read_manifest(folder: Path, corpus: Corpus, retriever_name: str) -> Manifest | None:
    """The manifest of an index folder; None for an index published without one.

    Raises:
        UserError: damaged, or the index was built from another corpus or for another retriever.
    """
    path = folder / MANIFEST
    if not path.is_file():
        print(f"{folder}: has no {MANIFEST}; only the number of its vectors can be compared with the corpus", flush=True)
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.get("version", 1)
        if version != VERSION:
            raise UserError(
                f"{path}: has format {version}, this searchr1 knows {VERSION}; update it, or build the index again"
            )
        manifest = Manifest(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); build the index again with searchr1 build-index") from error
    built_for = manifest.encoder or manifest.kind
    if built_for != retriever_name:
        raise UserError(f"--index_path {folder}: is a {built_for} index; start with --retriever_name {built_for}")
    if manifest.rows != len(corpus) or manifest.corpus != corpus.fingerprint():
        raise UserError(
            f"--index_path {folder}: was built from another corpus ({manifest.rows} passages; {corpus.path} has "
            f"{len(corpus)}); build it again with searchr1 build-index --overwrite, "
            "or give the corpus that it was built from"
        )
    return manifest


def check_encoder(manifest: Manifest, encoder: Encoder, folder: Path) -> None:
    """Refuse an encoder whose vectors do not fit those that the index holds.

    Raises:
        UserError: other weights, another pooling, or DPR's encoder of passages in place of the one of questions.
    """
    if encoder.reads == "passage":
        raise UserError(f"--retriever_model {encoder.path}: encodes passages; a server needs the encoder of questions")
    if manifest.encoder != "dpr" and manifest.weights and manifest.weights != weights_hash(encoder.path):
        raise UserError(
            f"--index_path {folder}: was built with other weights ({manifest.model}) than --retriever_model {encoder.path} "
            "has; give that encoder, or build the index again"
        )
    if manifest.pooling and manifest.pooling != encoder.pooling:
        raise UserError(
            f"--index_path {folder}: was built with --pooling_method {manifest.pooling}, the server was started with "
            f"{encoder.pooling}"
        )


def remove_files(folder: Path) -> None:
    """Remove a finished dense index, manifest first; files that the manifest does not name stay."""
    path = folder / MANIFEST
    if not path.is_file():
        return
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        names = [values[key] for key in ("file", "vectors", "embedding") if key in values]
    except (ValueError, TypeError):
        names = []  # damaged: nothing is known to be ours
    path.unlink()
    for name in names:
        (folder / Path(name).name).unlink(missing_ok=True)
