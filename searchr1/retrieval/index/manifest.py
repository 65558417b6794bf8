"""What an index folder was built from, so that it is not served with another corpus or encoder, and sums of its files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from searchr1.checkpoints.model_folder import hash_encoder
from searchr1.errors import UserError
from searchr1.files.checksums import Damage, FileSum, read_json, unseal, write_sealed
from searchr1.retrieval.index.corpus import Corpus

if TYPE_CHECKING:
    from searchr1.retrieval.encode.encoder import Encoder

MANIFEST = "manifest.json"
VERSION = 2
"""1 had no checksums."""
MAX_BYTES = 1 << 20
ADVICE = "copy the index again, or build it again with searchr1 build-index --overwrite"
BM25_FILES = (
    "data.csc.index.npy",
    "indices.csc.index.npy",
    "indptr.csc.index.npy",
    "largest.npy",
    "params.index.json",
    "vocab.index.json",
)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of `manifest.json`."""

    kind: str
    """"bm25" or "dense"."""
    rows: int
    corpus: str
    """Fingerprint of the corpus."""
    version: int = VERSION
    """Version of this format."""
    stemmer: str | None = None
    tokenizer: str | None = None
    """See `searchr1.retrieval.index.tokens`."""
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
    files: Mapping[str, FileSum] | None = None
    """Sizes and checksums by name; None in the first format."""

    def names(self) -> list[str]:
        """Return the names of the files that the index consists of."""
        return list(BM25_FILES) if self.kind == "bm25" else [name for name in self.dense_files() if name is not None]

    def dense_files(self) -> tuple[str | None, ...]:
        """Return the names of the files of a dense index; None for those that it does not have."""
        return (self.file, self.vectors, self.embedding)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it last: an index folder without a manifest is unfinished."""
    values = {key: value for key, value in asdict(manifest).items() if value is not None}
    write_sealed(folder / MANIFEST, values)


class DamagedIndex(ValueError):
    """A file of an index is not what it was, or was never what it should be."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} {problem}")
        self.damage = Damage(path, problem)


def index_error(error: DamagedIndex) -> UserError:
    """Return the message for the user."""
    return UserError(f"--index_path {error.damage.path}: {error.damage.problem}; {ADVICE}")


def open_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder; None if it has none.

    Raises:
        DamagedIndex: it cannot be read, has changed, or is not a manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        values = read_json(path, MAX_BYTES)
        version = values.get("version", 1) if isinstance(values, dict) else None
        if type(version) is int and version > VERSION:
            raise DamagedIndex(
                path, f"has format {version}, this searchr1 knows {VERSION}; update it, or build the index again"
            )
        return parse_manifest(values)
    except DamagedIndex:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedIndex(path, f"is damaged ({error})") from error


def parse_manifest(values: Any) -> Manifest:
    """Parse the JSON of a manifest.

    Raises:
        ValueError: it is none, or has changed since it was written.
    """
    if not isinstance(values, dict):
        raise ValueError("not an object")
    version = values.get("version", 1)
    if version not in (1, VERSION):
        raise ValueError(f"its format is {version!r:.80}")
    if version != 1:
        unseal(values)
    types = get_type_hints(Manifest)
    for key, value in values.items():
        if key not in types:
            raise ValueError(f"unknown entry {key}")
        if key != "files" and (isinstance(value, bool) or not isinstance(value, types[key])):
            raise ValueError(f"{key} is {value!r:.80}")
    needed = ["kind", "rows", "corpus", *(["file", "dimension"] if values.get("kind") == "dense" else [])]
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"has no entry {missing[0]}")
    if version != 1 and not isinstance(values.get("files"), dict):
        raise ValueError("has no checksums")
    if "files" in values:
        values["files"] = {plain(name): file_sum(value) for name, value in dict(values["files"]).items()}
    manifest = Manifest(**values)
    if manifest.kind not in ("bm25", "dense"):
        raise ValueError(f"kind is {manifest.kind!r:.80}")
    for name in manifest.names():
        plain(name)
        if manifest.files is not None and name not in manifest.files:
            raise ValueError(f"has no checksum of {name}")
    return manifest


def plain(name: Any) -> str:
    """Return the name of a file.

    Raises:
        ValueError: it leads out of the folder.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or "\0" in name:
        raise ValueError(f"{name!r:.80} is not a name of a file in the folder")
    return name


def file_sum(value: Any) -> FileSum:
    """Return an entry of `files`.

    Raises:
        ValueError: it is none.
    """
    size, digest = (value.get("bytes"), value.get("xxh3")) if isinstance(value, dict) else (None, None)
    if type(size) is not int or not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{32}", digest):
        raise ValueError(f"{value!r:.80} is not a size and checksum")
    return FileSum(size, digest)


def read_manifest(folder: Path, corpus: Corpus, retriever_name: str) -> Manifest | None:
    """Return the manifest of an index folder; None for an index published without one.

    Raises:
        UserError: damaged, or the index was built from another corpus or for another retriever.
    """
    try:
        manifest = open_manifest(folder)
    except DamagedIndex as error:
        raise index_error(error) from error
    if manifest is None:
        print(f"{folder}: has no {MANIFEST}; only the number of its vectors can be compared with the corpus", flush=True)
        return None
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
    """Reject an encoder whose vectors do not fit those that the index holds.

    Raises:
        UserError: other weights, another pooling, or DPR's encoder of passages in place of the one of questions.
    """
    if encoder.reads == "passage":
        raise UserError(f"--retriever_model {encoder.path}: encodes passages; a server needs the encoder of questions")
    if manifest.encoder != "dpr" and manifest.weights and manifest.weights != hash_encoder(encoder.path):
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
        manifest = open_manifest(folder)
        names = [name for name in manifest.dense_files() if name] if manifest else []
    except DamagedIndex:
        names = []  # nothing is known to be ours
    path.unlink()
    for name in names:
        (folder / name).unlink(missing_ok=True)
