"""`searchr1 build-index`: a BM25 or dense index of a corpus."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
from rich.progress import track

from searchr1.errors import UserError
from searchr1.retrieval.corpus import Corpus
from searchr1.retrieval.encoder import FAMILIES, Encoder
from searchr1.retrieval.indexes import Bm25Index, write_manifest

ENCODE_ROWS = 4096


def build_dense(corpus: Corpus, out: Path, name: str, model: str, factory: str, device: str) -> None:
    """Embed the corpus a part at a time and write a FAISS index."""
    import faiss

    encoder = Encoder(name, model, device=device)
    metric = faiss.METRIC_INNER_PRODUCT
    index = faiss.index_factory(encoder.dimension, factory, metric)
    if not index.is_trained:
        sample = np.random.default_rng(0).choice(len(corpus), min(len(corpus), 100_000), replace=False)
        index.train(encoder.encode([corpus[int(row)]["contents"] for row in sorted(sample)], "passage"))
    texts = corpus.contents()
    parts = (len(corpus) + ENCODE_ROWS - 1) // ENCODE_ROWS
    for _ in track(range(parts), description=f"embedding {len(corpus)} passages"):
        index.add(encoder.encode(list(islice(texts, ENCODE_ROWS)), "passage"))
    file = f"{name}_{factory.replace(',', '_')}.index"
    faiss.write_index(index, str(out / file))
    details = {"encoder": name, "pooling": encoder.family.pooling, "dimension": encoder.dimension, "file": file}
    write_manifest(out, corpus, "dense", {**details, "factory": factory, "metric": "inner product"})


def main(argv: list[str]) -> int:
    """Entry point of the sub-command."""
    parser = argparse.ArgumentParser(prog="searchr1 build-index", description="Build an index of a corpus.")
    parser.add_argument("--corpus_path", type=Path, required=True)
    parser.add_argument("--save_dir", type=Path, required=True, help="folder to write the index to")
    parser.add_argument("--retriever_name", default="e5", choices=["bm25", *FAMILIES])
    parser.add_argument("--retriever_model", help="Hugging Face folder of the encoder")
    parser.add_argument("--faiss_type", default="Flat", help="FAISS factory string (default Flat)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for the encoder")
    args = parser.parse_args(argv)
    corpus = Corpus(args.corpus_path)
    args.save_dir.mkdir(parents=True, exist_ok=True)
    if args.retriever_name == "bm25":
        Bm25Index.build(corpus, progress=True).save(args.save_dir)
        write_manifest(args.save_dir, corpus, "bm25", {})
    elif args.retriever_model is None:
        raise UserError(f"--retriever_name {args.retriever_name} needs --retriever_model")
    else:
        build_dense(corpus, args.save_dir, args.retriever_name, args.retriever_model, args.faiss_type, args.device)
    print(f"index of {len(corpus)} passages -> {args.save_dir}")
    return 0
