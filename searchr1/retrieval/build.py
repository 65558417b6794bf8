"""`searchr1 build-index`: a BM25 or dense index of a corpus."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from searchr1.errors import UserError
from searchr1.retrieval.bm25_index import Bm25Index
from searchr1.retrieval.corpus import Corpus
from searchr1.retrieval.encoder import FAMILIES, Encoder
from searchr1.retrieval.manifest import MANIFEST, Manifest, write_manifest

ENCODE_ROWS = 4096
TRAIN_ROWS = 100_000


class RateColumn(TextColumn):
    """Passages per second."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        """The speed of the task so far."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} passages/s" if speed else "")


def with_progress(corpus: Corpus, what: str) -> Iterator[str]:
    """The text of every passage, with a bar, the rate and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(what, total=len(corpus))
        for row, text in enumerate(corpus.contents(), start=1):
            yield text
            if row % 64 == 0 or row == len(corpus):
                progress.update(task, completed=row)


def build_bm25(corpus: Corpus, out: Path, stemmer: str | None) -> None:
    """Index the corpus and write the folder."""
    Bm25Index.build(with_progress(corpus, "reading"), stemmer).save(out)
    write_manifest(out, Manifest("bm25", len(corpus), corpus.fingerprint(), stemmer=stemmer))


def build_dense(corpus: Corpus, out: Path, name: str, model: str, factory: str, device: str) -> None:
    """Embed the corpus a part at a time and write a FAISS index.

    Raises:
        UserError: the encoder cannot be loaded, or FAISS refuses the factory string or the corpus.
    """
    import faiss

    encoder = Encoder(name, model, device=device)
    try:
        index = faiss.index_factory(encoder.dimension, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            rows = np.random.default_rng(0).choice(len(corpus), min(len(corpus), TRAIN_ROWS), replace=False)
            index.train(encoder.encode([corpus[int(row)]["contents"] for row in sorted(rows)], "passage"))
    except RuntimeError as error:
        raise UserError(
            f"--faiss_type {factory}: FAISS cannot make this index of {len(corpus)} passages: {error}"
        ) from error
    texts = with_progress(corpus, "embedding")
    while part := list(islice(texts, ENCODE_ROWS)):
        index.add(encoder.encode(part, "passage"))
    file = f"{name}_{factory.replace(',', '_')}.index"
    partial = out / f"{file}.partial"
    faiss.write_index(index, str(partial))
    os.replace(partial, out / file)
    write_manifest(
        out,
        Manifest(
            "dense",
            len(corpus),
            corpus.fingerprint(),
            encoder=name,
            model=Path(model).name,
            pooling=encoder.family.pooling,
            dimension=encoder.dimension,
            metric="inner product",
            factory=factory,
            file=file,
        ),
    )


def main(argv: list[str]) -> int:
    """Entry point of the sub-command."""
    parser = argparse.ArgumentParser(prog="searchr1 build-index", description="Build an index of a corpus.")
    parser.add_argument("--corpus_path", type=Path, required=True, help="jsonl, jsonl.gz or parquet")
    parser.add_argument("--save_dir", type=Path, required=True, help="folder to write the index to")
    parser.add_argument("--retriever_name", default="e5", choices=["bm25", *FAMILIES])
    parser.add_argument("--retriever_model", help="Hugging Face folder of the encoder")
    parser.add_argument("--faiss_type", default="Flat", help="FAISS factory string (default Flat)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for the encoder")
    parser.add_argument("--stemmer", help="bm25: reduce words to their stems, for instance --stemmer english")
    args = parser.parse_args(argv)
    if args.retriever_name != "bm25" and args.retriever_model is None:
        raise UserError(f"--retriever_name {args.retriever_name} needs --retriever_model")
    corpus = Corpus(args.corpus_path)
    args.save_dir.mkdir(parents=True, exist_ok=True)
    (args.save_dir / MANIFEST).unlink(missing_ok=True)
    if args.retriever_name == "bm25":
        build_bm25(corpus, args.save_dir, args.stemmer)
    else:
        build_dense(corpus, args.save_dir, args.retriever_name, args.retriever_model, args.faiss_type, args.device)
    print(f"index of {len(corpus)} passages -> {args.save_dir}")
    return 0
