"""Build an index of a corpus: BM25, or dense by embedding the passages and making a FAISS index of their vectors."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from searchr1.checkpoints.model_folder import hash_encoder
from searchr1.errors import UserError
from searchr1.files.atomic import atomic_file
from searchr1.files.checksums import take
from searchr1.files.folder_lock import folder_lock
from searchr1.progress import ProgressBar
from searchr1.retrieval.encode.embed import (
    EncoderFlags,
    copy_parts,
    embed_by_processes,
    embed_parts,
    embedding_name,
    open_embedding,
    save_embedding,
)
from searchr1.retrieval.encode.embedding_folder import EmbeddingFolder, EmbeddingPlan
from searchr1.retrieval.encode.encoder import Encoder
from searchr1.retrieval.index.bm25_build import build_bm25, tokenizer_for
from searchr1.retrieval.index.corpus import Corpus
from searchr1.retrieval.index.dense import build_faiss
from searchr1.retrieval.index.faiss_types import FaissType, faiss_type
from searchr1.retrieval.index.file_identity import hash_file
from searchr1.retrieval.index.flat import flat_header
from searchr1.retrieval.index.index_check import BAR_BYTES, open_vectors
from searchr1.retrieval.index.manifest import MANIFEST, Manifest, remove_files, write_manifest


@dataclass(frozen=True)
class BuildOptions:
    """The flags of `searchr1 build-index` by their names; see its help."""

    corpus_path: Path
    save_dir: Path
    retriever_name: str = "e5"
    retriever_model: str | None = None
    faiss_type: str = "Flat"
    max_length: int = 256
    pooling_method: str | None = None
    dtype: str | None = None
    batch_size: int = 64
    device: str = "cpu"
    devices: str | None = None
    processes: int = 1
    save_embedding: bool = False
    embedding_path: Path | None = None
    faiss_gpu: bool = False
    stemmer: str | None = None
    tokenizer: str | None = None
    seed: int = 0
    overwrite: bool = False


def build_index(options: BuildOptions) -> None:
    """Build an index in `save_dir`, and print what was made.

    Raises:
        UserError: the folder is in use, or holds a finished index; the corpus, the encoder or a flag is wrong; the disk is
            full.
    """
    with folder_lock(options.save_dir, "--save_dir", "searchr1 build-index"):
        if (options.save_dir / MANIFEST).exists() and not options.overwrite:
            raise UserError(f"--save_dir {options.save_dir}: holds a finished index; give --overwrite to replace it")
        corpus = Corpus(options.corpus_path)
        if corpus.peculiarities():
            print(f"{options.corpus_path}: {corpus.peculiarities()}", flush=True)
        if options.retriever_name == "bm25":
            build_lexical(options, corpus)
        else:
            build_dense(options, corpus)
    size = sum(file.stat().st_size for file in options.save_dir.iterdir() if file.is_file())
    print(f"index of {len(corpus)} passages, {size / 2**20:,.0f} MiB -> {options.save_dir}")
    print(f"{shutil.disk_usage(options.save_dir).free / 2**30:,.0f} GiB are left on its disk")


def build_lexical(options: BuildOptions, corpus: Corpus) -> None:
    """Build a BM25 index.

    Raises:
        UserError: the stemmer is unknown, the corpus has no words, or the disk is full.
    """
    remove_files(options.save_dir)
    tokenizer = tokenizer_for(corpus, options.tokenizer)
    print(f"tokenizer: {tokenizer}", flush=True)
    with ProgressBar("reading", len(corpus), "passages") as bar:
        build_bm25(corpus, options.save_dir, options.stemmer, bar.advance, tokenizer)
    made = Manifest("bm25", len(corpus), corpus.fingerprint(), stemmer=options.stemmer, tokenizer=tokenizer)
    finish(options.save_dir, made)


def build_dense(options: BuildOptions, corpus: Corpus) -> None:
    """Embed the corpus, then make a FAISS index of the vectors. What is finished is kept when this is stopped.

    Raises:
        UserError: the encoder cannot be loaded, the disk is full, or FAISS refuses the type or the corpus.
    """
    model = str(options.retriever_model)
    flags = EncoderFlags(
        options.retriever_name, model, options.max_length, options.dtype, options.pooling_method,
        options.batch_size * options.max_length,
    )  # fmt: skip
    devices = options.devices.split(",") if options.devices else [options.device] * options.processes
    encoder = flags.load(devices[0])
    check_encoder(encoder, options)
    kind = faiss_type(options.faiss_type, len(corpus), encoder.dimension)
    check_factory(kind, encoder.dimension)
    given = open_embedding(options.embedding_path, corpus, encoder) if options.embedding_path else None
    plan = plan_of(options, corpus, encoder, kind)
    folder = EmbeddingFolder(options.save_dir, plan)
    file = options.save_dir / index_name(options)
    embedding = options.save_dir / embedding_name(options.retriever_name) if options.save_embedding else None
    clear(options, folder, [file, folder.vectors, *([embedding] if embedding else [])])
    # The index takes about as much as its vectors at most; a flat one is nothing else than its vectors.
    folder.open(more_bytes=(0 if is_flat(kind) else folder.bytes) + (folder.bytes if embedding else 0))
    missing = folder.missing()
    done = plan.rows - sum(len(folder.rows_of(part)) for part in missing)
    with ProgressBar("embedding", plan.rows, "passages", done=done) as bar:
        if given is not None:
            copy_parts(folder, given, missing, bar.advance)
        elif len(devices) == 1:
            embed_parts(folder, corpus, encoder, missing, bar.advance)
        else:
            del encoder  # each process has its own
            embed_by_processes(folder, corpus, flags, devices, bar.advance)
    if is_flat(kind):
        folder.write_header(flat_header(plan.rows, plan.dimension))
    else:
        write_index(folder, file, kind, options.seed)
    if embedding is not None:
        save_embedding(folder, embedding)
    made = manifest_of(plan, Path(model).name, kind, file.name)
    finish(options.save_dir, replace(made, embedding=embedding.name if embedding else None))
    if not is_flat(kind) and not kind.lossy:
        folder.vectors.unlink()
    folder.remove()


def finish(folder: Path, manifest: Manifest) -> None:
    """Take the checksums of the files and write the manifest.

    Raises:
        UserError: a file cannot be read, or the disk is full.
    """
    paths = [folder / name for name in manifest.names()]
    try:
        with ProgressBar("checksums", sum(path.stat().st_size for path in paths), least=BAR_BYTES) as bar:
            sums = {path.name: take(path, bar.advance) for path in paths}
        write_manifest(folder, replace(manifest, files=sums))
    except OSError as error:
        raise UserError(f"--save_dir {folder}: cannot finish ({error}); run the same command again") from error


def check_encoder(encoder: Encoder, options: BuildOptions) -> None:
    """Reject an encoder that is not for passages, or not for such long ones.

    Raises:
        UserError: it is such an encoder.
    """
    if encoder.reads == "query":
        raise UserError(f"--retriever_model {encoder.path}: encodes questions; an index needs the encoder of passages")
    if encoder.max_length < options.max_length:
        raise UserError(
            f"--max_length {options.max_length}: this encoder reads {encoder.max_length} tokens; "
            f"give --max_length {encoder.max_length}"
        )


def check_factory(kind: FaissType, dimension: int) -> None:
    """Check before hours of embedding that FAISS can make this type.

    Raises:
        UserError: it does not.
    """
    import faiss

    try:
        faiss.index_factory(dimension, kind.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"--faiss_type {kind.factory}: FAISS cannot make this index: {reason}") from error


def is_flat(kind: FaissType) -> bool:
    """Return whether the index is only its vectors: then the embedding writes its file itself."""
    return kind.factory == "Flat"


def index_name(options: BuildOptions) -> str:
    """Return the name of the FAISS file, such as `e5_Flat.index`, as the published ones are called."""
    return f"{options.retriever_name}_{options.faiss_type.replace(',', '_')}.index"


def plan_of(options: BuildOptions, corpus: Corpus, encoder: Encoder, kind: FaissType) -> EmbeddingPlan:
    """Return what the vectors depend on, and how they are written.

    Beside a lossy index they stay, in half the space; a lossless one is made from exactly what the encoder gave.
    """
    dtype = "f16" if kind.lossy and not options.save_embedding else "f32"
    return EmbeddingPlan(
        corpus=corpus.fingerprint(),
        rows=len(corpus),
        encoder=encoder.name,
        weights=hash_encoder(encoder.path),
        pooling=encoder.pooling,
        max_length=encoder.max_length,
        encoder_dtype=encoder.dtype,
        dimension=encoder.dimension,
        file=index_name(options) if is_flat(kind) else f"vectors.{dtype}",
        dtype=dtype,
        header_bytes=len(flat_header(0, 0)) if is_flat(kind) else 0,
        given=hash_file(options.embedding_path) if options.embedding_path else None,
    )


def manifest_of(plan: EmbeddingPlan, model: str, kind: FaissType, file: str) -> Manifest:
    """Return the manifest of what was built."""
    return Manifest(
        "dense",
        plan.rows,
        plan.corpus,
        encoder=plan.encoder,
        model=model,
        weights=plan.weights,
        encoder_dtype=plan.encoder_dtype,
        pooling=plan.pooling,
        max_length=plan.max_length,
        dimension=plan.dimension,
        metric="inner product",
        factory=kind.factory,
        file=file,
        vectors=plan.file if kind.lossy else None,
        nprobe=kind.nprobe,
        ef_search=kind.ef_search,
        refine_factor=kind.refine_factor if kind.lossy else None,
    )


def write_index(folder: EmbeddingFolder, file: Path, kind: FaissType, seed: int) -> None:
    """Make the FAISS index of the finished vectors.

    Raises:
        UserError: FAISS refuses the vectors, or the disk is full.
    """
    import faiss

    vectors_RD = open_vectors(folder.vectors, folder.plan.rows, folder.plan.dimension)
    with ProgressBar(f"indexing ({kind.factory})", folder.plan.rows, "passages") as bar:
        index = build_faiss(vectors_RD, kind, seed, bar.advance)
    try:
        with atomic_file(file) as partial:
            faiss.write_index(index, str(partial))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{file}: cannot write ({error}); make room and run the same command again") from error


def clear(options: BuildOptions, folder: EmbeddingFolder, files: list[Path]) -> None:
    """Remove what earlier builds left, if --overwrite asks for it; `files` will be written.

    Raises:
        UserError: without it, if a file is in the way that is not of this unfinished build.
    """
    if options.overwrite:
        remove_files(options.save_dir)
        folder.discard()
        return
    in_the_way = [path for path in files if path.exists()]
    if in_the_way and not folder.started():
        raise UserError(
            f"--save_dir {options.save_dir}: holds {in_the_way[0].name}, which is not of an unfinished build; "
            "give --overwrite to replace it, or another folder"
        )
