"""`searchr1 build-index`: a BM25 or dense index of a corpus."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from searchr1.errors import UserError
from searchr1.retrieval.bm25_build import build_bm25
from searchr1.retrieval.corpus import Corpus
from searchr1.retrieval.dense import build_faiss
from searchr1.retrieval.embed import EmbeddingFolder, EmbeddingPlan, EncoderFlags, embed
from searchr1.retrieval.embed import Progress as Report
from searchr1.retrieval.encoder import FAMILIES, weights_hash
from searchr1.retrieval.faiss_types import NAMES, faiss_type
from searchr1.retrieval.manifest import MANIFEST, Manifest, write_manifest
from searchr1.retrieval.refine import open_vectors


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
    with Progress(*columns) as progress:
        task = progress.add_task(what, total=total)
        yield lambda rows: progress.advance(task, rows)


def build_dense(args: argparse.Namespace, corpus: Corpus) -> Manifest:
    """Embed the corpus, then make a FAISS index of the vectors. What is finished is kept when this is stopped.

    Raises:
        UserError: the encoder cannot be loaded, the disk is full, or FAISS refuses the type or the corpus.
    """
    import faiss

    flags = EncoderFlags(args.retriever_name, args.retriever_model, args.max_length, args.dtype, args.pooling_method)
    devices = args.devices.split(",") if args.devices else [args.device] * args.processes
    encoder = flags.load(devices[0])
    kind = faiss_type(args.faiss_type, len(corpus), encoder.dimension)
    weights = weights_hash(args.retriever_model)
    # Beside a lossy index the vectors stay, in half the space; a lossless one is made from what the encoder gave.
    plan = EmbeddingPlan(
        corpus.fingerprint(), len(corpus), args.retriever_name, weights, encoder.family.pooling, args.max_length,
        args.dtype or "default", encoder.dimension, "f16" if kind.lossy else "f32",
    )  # fmt: skip
    pooling, dimension = encoder.family.pooling, encoder.dimension
    del encoder
    folder = EmbeddingFolder(args.save_dir, plan, args.overwrite)
    with bar("embedding", len(corpus)) as report:
        embed(folder, corpus, flags, devices, report)
    vectors = open_vectors(folder.vectors, len(corpus), dimension)
    with bar(f"indexing ({kind.factory})", len(corpus)) as report:
        index = build_faiss(vectors, kind, args.seed, report)
    file = args.save_dir / f"{args.retriever_name}_{args.faiss_type.replace(',', '_')}.index"
    partial = file.with_name(f"{file.name}.partial")
    try:
        faiss.write_index(index, str(partial))
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{file}: cannot write ({error}); make room and run the same command again") from error
    if not kind.lossy:
        folder.vectors.unlink()
    folder.finish()
    return Manifest(
        "dense",
        len(corpus),
        corpus.fingerprint(),
        encoder=args.retriever_name,
        model=Path(args.retriever_model).name,
        weights=weights,
        pooling=pooling,
        max_length=args.max_length,
        dimension=dimension,
        metric="inner product",
        factory=kind.factory,
        file=file.name,
        vectors=folder.vectors.name if kind.lossy else None,
        nprobe=kind.nprobe,
        ef_search=kind.ef_search,
        refine_factor=kind.refine_factor if kind.lossy else None,
    )


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags; those of Search-R1's index builder are read too.

    Raises:
        UserError: flags that do not go together.
    """
    parser = argparse.ArgumentParser(prog="searchr1 build-index", description="Build an index of a corpus.")
    parser.add_argument("--corpus_path", type=Path, required=True, help="jsonl, jsonl.gz or parquet")
    parser.add_argument("--save_dir", type=Path, required=True, help="folder to write the index to")
    parser.add_argument("--retriever_name", "--retrieval_method", default="e5", choices=["bm25", *FAMILIES])
    parser.add_argument("--retriever_model", "--model_path", help="Hugging Face folder of the encoder")
    parser.add_argument("--faiss_type", default="Flat", help=f"{', '.join(NAMES)}, or a FAISS factory string")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a passage (default 256)")
    parser.add_argument("--pooling_method", help="mean, cls, pooler or decoder, in place of the family's")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="of the encoder (fp16 on a GPU, else fp32)")
    parser.add_argument("--use_fp16", dest="dtype", action="store_const", const="fp16", help="the same as --dtype fp16")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for the encoder")
    parser.add_argument("--devices", help="one process each, for instance cuda:0,cuda:1")
    parser.add_argument("--processes", type=int, default=1, help="processes that share --device")
    parser.add_argument("--stemmer", help="bm25: reduce words to their stems, for instance --stemmer english")
    parser.add_argument("--seed", type=int, default=0, help="of the sample that an index is trained on")
    parser.add_argument("--overwrite", action="store_true", help="replace an index, or start an unfinished one anew")
    args = parser.parse_args(argv)
    if args.retriever_name != "bm25" and args.retriever_model is None:
        raise UserError(f"--retriever_name {args.retriever_name} needs --retriever_model")
    if args.processes < 1 or args.max_length < 1:
        raise UserError("--processes and --max_length must be at least 1")
    if (args.save_dir / MANIFEST).exists() and not args.overwrite:
        raise UserError(f"--save_dir {args.save_dir}: holds a finished index; give --overwrite to replace it")
    return args


def main(argv: list[str]) -> int:
    """Entry point of the sub-command."""
    args = parse(argv)
    corpus = Corpus(args.corpus_path)
    args.save_dir.mkdir(parents=True, exist_ok=True)
    (args.save_dir / MANIFEST).unlink(missing_ok=True)
    if args.retriever_name == "bm25":
        with bar("reading", len(corpus)) as report:
            build_bm25(corpus, args.save_dir, args.stemmer, report)
        manifest = Manifest("bm25", len(corpus), corpus.fingerprint(), stemmer=args.stemmer)
    else:
        manifest = build_dense(args, corpus)
    write_manifest(args.save_dir, manifest)
    size = sum(file.stat().st_size for file in args.save_dir.iterdir() if file.is_file())
    print(f"index of {len(corpus)} passages, {size / 2**20:,.0f} MiB -> {args.save_dir}")
    print(f"{shutil.disk_usage(args.save_dir).free / 2**30:,.0f} GiB are left on its disk")
    return 0
