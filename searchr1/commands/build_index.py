"""`searchr1 build-index`: a BM25 or dense index of a corpus."""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from searchr1.errors import UserError
from searchr1.files.atomic import atomic_file
from searchr1.files.checksums import take
from searchr1.retrieval.encode.embed import EncoderFlags, embed_by_processes, embed_parts
from searchr1.retrieval.encode.embed import Progress as Report
from searchr1.retrieval.encode.embedding_file import copy_parts, embedding_name, open_embedding, save_embedding
from searchr1.retrieval.encode.embedding_folder import EmbeddingFolder, EmbeddingPlan
from searchr1.retrieval.encode.encoder import FAMILIES, Encoder
from searchr1.retrieval.encode.model_files import weights_hash
from searchr1.retrieval.index.bm25_build import build_bm25, tokenizer_for
from searchr1.retrieval.index.corpus import Corpus
from searchr1.retrieval.index.dense import build_faiss
from searchr1.retrieval.index.faiss_types import NAMES, FaissType, faiss_type
from searchr1.retrieval.index.flat import flat_header
from searchr1.retrieval.index.index_check import bar as byte_bar
from searchr1.retrieval.index.manifest import MANIFEST, Manifest, remove_files, write_manifest
from searchr1.retrieval.index.stamp import hash_file
from searchr1.retrieval.index.tokens import TOKENIZERS
from searchr1.retrieval.index.vector_file import open_vectors

ONLY_BM25 = {"stemmer", "tokenizer"}
BM25_FLAGS = ONLY_BM25 | {"corpus_path", "save_dir", "retriever_name", "overwrite"}


class RateColumn(TextColumn):
    """Passages per second."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        """The speed of the task so far."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} passages/s" if speed else "")


@contextmanager
def bar(what: str, total: int) -> Iterator[Report]:
    """A bar with the rate and the time left; gives the function that moves it on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    # A part may take minutes, and the rate is taken over several.
    with Progress(*columns, speed_estimate_period=3600) as progress:
        task = progress.add_task(what, total=total)
        yield lambda rows: progress.advance(task, rows)


def build_dense(args: argparse.Namespace, corpus: Corpus) -> None:
    """Embed the corpus, then make a FAISS index of the vectors. What is finished is kept when this is stopped.

    Raises:
        UserError: the encoder cannot be loaded, the disk is full, or FAISS refuses the type or the corpus.
    """
    flags = EncoderFlags(
        args.retriever_name, args.retriever_model, args.max_length, args.dtype, args.pooling_method,
        args.batch_size * args.max_length,
    )  # fmt: skip
    devices = args.devices.split(",") if args.devices else [args.device] * args.processes
    encoder = flags.load(devices[0])
    check_encoder(encoder, args)
    kind = faiss_type(args.faiss_type, len(corpus), encoder.dimension)
    check_factory(kind, encoder.dimension)
    given = open_embedding(args.embedding_path, corpus, encoder) if args.embedding_path else None
    plan = plan_of(args, corpus, encoder, kind)
    folder = EmbeddingFolder(args.save_dir, plan)
    file = args.save_dir / index_name(args)
    embedding = args.save_dir / embedding_name(args.retriever_name) if args.save_embedding else None
    clear(args, folder, [file, folder.vectors, *([embedding] if embedding else [])])
    # The index takes about as much as its vectors at most; a flat one is nothing else than its vectors.
    folder.open(more_bytes=(0 if is_flat(kind) else folder.bytes) + (folder.bytes if embedding else 0))
    missing = folder.missing()
    with bar("embedding", plan.rows) as report:
        report(plan.rows - sum(len(folder.rows_of(part)) for part in missing))
        if given is not None:
            copy_parts(folder, given, missing, report)
        elif len(devices) == 1:
            embed_parts(folder, corpus, encoder, missing, report)
        else:
            del encoder  # each process has its own
            embed_by_processes(folder, corpus, flags, devices, report)
    if is_flat(kind):
        folder.write_header(flat_header(plan.rows, plan.dimension))
    else:
        write_index(folder, file, kind, args.seed)
    if embedding is not None:
        save_embedding(folder, embedding)
    made = manifest_of(plan, Path(args.retriever_model).name, kind, file.name)
    finish(args.save_dir, replace(made, embedding=embedding.name if embedding else None))
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
        with byte_bar("checksums", sum(path.stat().st_size for path in paths)) as advance:
            sums = {path.name: take(path, advance) for path in paths}
        write_manifest(folder, replace(manifest, files=sums))
    except OSError as error:
        raise UserError(f"--save_dir {folder}: cannot finish ({error}); run the same command again") from error


def check_encoder(encoder: Encoder, args: argparse.Namespace) -> None:
    """Refuse an encoder that is not for passages, or not for such long ones.

    Raises:
        UserError: says which.
    """
    if encoder.reads == "query":
        raise UserError(f"--retriever_model {encoder.path}: encodes questions; an index needs the encoder of passages")
    if encoder.max_length < args.max_length:
        raise UserError(
            f"--max_length {args.max_length}: this encoder reads {encoder.max_length} tokens; "
            f"give --max_length {encoder.max_length}"
        )


def check_factory(kind: FaissType, dimension: int) -> None:
    """Before hours of embedding: does FAISS know this type?

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
    """Whether the index is only its vectors: then the embedding writes its file itself."""
    return kind.factory == "Flat"


def index_name(args: argparse.Namespace) -> str:
    """`e5_Flat.index`, as the published ones are called."""
    return f"{args.retriever_name}_{args.faiss_type.replace(',', '_')}.index"


def plan_of(args: argparse.Namespace, corpus: Corpus, encoder: Encoder, kind: FaissType) -> EmbeddingPlan:
    """What the vectors depend on, and how they are written.

    Beside a lossy index they stay, in half the space; a lossless one is made from exactly what the encoder gave.
    """
    dtype = "f16" if kind.lossy and not args.save_embedding else "f32"
    return EmbeddingPlan(
        corpus=corpus.fingerprint(),
        rows=len(corpus),
        encoder=encoder.name,
        weights=weights_hash(encoder.path),
        pooling=encoder.pooling,
        max_length=encoder.max_length,
        encoder_dtype=encoder.dtype,
        dimension=encoder.dimension,
        file=index_name(args) if is_flat(kind) else f"vectors.{dtype}",
        dtype=dtype,
        header_bytes=len(flat_header(0, 0)) if is_flat(kind) else 0,
        given=hash_file(args.embedding_path) if args.embedding_path else None,
    )


def manifest_of(plan: EmbeddingPlan, model: str, kind: FaissType, file: str) -> Manifest:
    """What was built."""
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
    with bar(f"indexing ({kind.factory})", folder.plan.rows) as report:
        index = build_faiss(vectors_RD, kind, seed, report)
    try:
        with atomic_file(file) as partial:
            faiss.write_index(index, str(partial))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{file}: cannot write ({error}); make room and run the same command again") from error


def clear(args: argparse.Namespace, folder: EmbeddingFolder, files: list[Path]) -> None:
    """With --overwrite, remove what earlier builds left; `files` will be written.

    Raises:
        UserError: without it, if a file is in the way that is not of this unfinished build.
    """
    if args.overwrite:
        remove_files(args.save_dir)
        folder.discard()
        return
    in_the_way = [path for path in files if path.exists()]
    if in_the_way and not folder.started():
        raise UserError(
            f"--save_dir {args.save_dir}: holds {in_the_way[0].name}, which is not of an unfinished build; "
            "give --overwrite to replace it, or another folder"
        )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """The folder, for this process only.

    Raises:
        UserError: it cannot be made, or another process builds in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"--save_dir {folder}: no folder to write to ({error.strerror})") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"--save_dir {folder}: another build-index is at work here ({error.strerror})") from error
        yield
    finally:
        os.close(descriptor)


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags; those of Search-R1's index builder are read too.

    Raises:
        UserError: flags that do not go together.
    """
    parser = argparse.ArgumentParser(prog="searchr1 build-index", description="Build an index of a corpus.")
    parser.add_argument(
        "--corpus_path",
        type=Path,
        required=True,
        help="jsonl, jsonl.gz (also a tar archive, as wiki-18.jsonl.gz is) or parquet",
    )
    parser.add_argument("--save_dir", type=Path, required=True, help="folder to write the index to")
    parser.add_argument("--retriever_name", "--retrieval_method", default="e5", choices=["bm25", *FAMILIES])
    parser.add_argument(
        "--retriever_model", "--model_path", help="folder of the encoder, or its name on the Hugging Face hub"
    )
    parser.add_argument("--faiss_type", default="Flat", help=f"{', '.join(NAMES)}, or a FAISS factory string")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a passage (default 256)")
    parser.add_argument("--pooling_method", help="mean, cls, pooler or decoder, in place of the family's")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="of the encoder (fp16 on a GPU, else fp32)")
    parser.add_argument("--use_fp16", dest="dtype", action="store_const", const="fp16", help="the same as --dtype fp16")
    parser.add_argument("--batch_size", type=int, default=64, help="passages of full length that are encoded together")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for the encoder")
    parser.add_argument("--devices", help="one process each, for instance cuda:0,cuda:1")
    parser.add_argument("--processes", type=int, default=1, help="processes that share --device")
    parser.add_argument(
        "--save_embedding", action="store_true",
        help="keep the vectors too, in emb_NAME.memmap: passages x dimension, fp32",
    )  # fmt: skip
    parser.add_argument("--embedding_path", type=Path, help="take the vectors from such a file, do not encode")
    parser.add_argument("--faiss_gpu", action="store_true", help="read, but without effect: the index is made on the CPU")
    parser.add_argument("--stemmer", help="bm25: reduce words to their stems, for instance --stemmer english")
    parser.add_argument(
        "--tokenizer", choices=["auto", *TOKENIZERS],
        help="bm25: words, or multilingual for scripts without spaces (default auto: by the corpus)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the sample that an index is trained on")
    parser.add_argument("--overwrite", action="store_true", help="replace an index, or start an unfinished one anew")
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.retriever_name == "bm25":
        unused = sorted(given - BM25_FLAGS)
        if unused:
            print(f"bm25 makes no use of {', '.join(f'--{name}' for name in unused)}", flush=True)
    else:
        check_dense(args, given)
    if min(args.processes, args.max_length, args.batch_size) < 1:
        raise UserError("--processes, --max_length and --batch_size must be at least 1")
    if args.devices and args.processes > 1:
        raise UserError(f"--processes {args.processes}: --devices gives one process for each; leave one of them out")
    return args


def check_dense(args: argparse.Namespace, given: set[str]) -> None:
    """Check the flags of a dense index.

    Raises:
        UserError: one is missing, is BM25's, or would destroy what another one names.
    """
    if args.retriever_model is None:
        raise UserError(f"--retriever_name {args.retriever_name} needs --retriever_model")
    if wrong := sorted(given & ONLY_BM25):
        raise UserError(f"--{wrong[0]}: is for --retriever_name bm25 only; leave it out")
    if args.faiss_gpu:
        print("--faiss_gpu: the index is made on the CPU, the file is the same; --device cuda encodes on a GPU", flush=True)
    if args.embedding_path and args.overwrite and args.embedding_path.resolve().parent == args.save_dir.resolve():
        raise UserError(f"--embedding_path {args.embedding_path}: --overwrite might remove it; move it out of --save_dir")
    if args.embedding_path and args.save_embedding:
        raise UserError("--save_embedding: the vectors are in --embedding_path already; leave it out")


def main(argv: list[str]) -> int:
    """Entry point of the sub-command."""
    args = parse(argv)
    with alone(args.save_dir):
        if (args.save_dir / MANIFEST).exists() and not args.overwrite:
            raise UserError(f"--save_dir {args.save_dir}: holds a finished index; give --overwrite to replace it")
        corpus = Corpus(args.corpus_path)
        if corpus.peculiarities():
            print(f"{args.corpus_path}: {corpus.peculiarities()}", flush=True)
        if args.retriever_name == "bm25":
            remove_files(args.save_dir)
            tokenizer = tokenizer_for(corpus, args.tokenizer)
            print(f"tokenizer: {tokenizer}", flush=True)
            with bar("reading", len(corpus)) as report:
                build_bm25(corpus, args.save_dir, args.stemmer, report, tokenizer)
            made = Manifest("bm25", len(corpus), corpus.fingerprint(), stemmer=args.stemmer, tokenizer=tokenizer)
            finish(args.save_dir, made)
        else:
            build_dense(args, corpus)
    size = sum(file.stat().st_size for file in args.save_dir.iterdir() if file.is_file())
    print(f"index of {len(corpus)} passages, {size / 2**20:,.0f} MiB -> {args.save_dir}")
    print(f"{shutil.disk_usage(args.save_dir).free / 2**30:,.0f} GiB are left on its disk")
    return 0
