"""Queries a second of our BM25 search and of bm25s', on the same index and cores.

    python benchmarks/bm25_search.py [--rows 100000] [--topk 10] [--seconds 3] [--threads N] [--out FILE]

Passages have about 100 words of a Zipf vocabulary of 200,000; a query is 5 to 12 words of some passage, so that common
words are in it as often as in text. bm25s gets its arrays in memory and queries that are already split into words; ours
gets mapped files and the queries' text, as the server does. The answers are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bm25s
import numpy as np

from searchr1.retrieval.index.bm25_build import build_bm25
from searchr1.retrieval.index.bm25_index import Bm25Index
from searchr1.retrieval.index.corpus import Corpus

WORDS = 200_000
QUERIES = 2048
BATCHES = (1, 64, 512)
BLOCK = 10_000

Search = Callable[[int, int], Any]
"""Searches the queries from the first number up to the second."""


def texts(rng: np.random.Generator, rows: int) -> Iterator[str]:
    """Passages: about 100 words each, the word of rank r with a chance proportional to 1 / (r + 2)."""
    chances = np.cumsum(1 / (np.arange(WORDS) + 2))
    for start in range(0, rows, BLOCK):
        lengths = np.clip(rng.normal(100, 25, min(BLOCK, rows - start)), 20, 200).astype(int)
        words = np.searchsorted(chances, rng.random(lengths.sum()) * chances[-1])
        for passage in np.split(words, np.cumsum(lengths)[:-1]):
            yield " ".join(f"w{word:x}" for word in passage.tolist())


def write_world(folder: Path, rows: int) -> tuple[Corpus, list[str]]:
    """(corpus of `rows` passages, queries)"""
    rng = np.random.default_rng(0)
    sources = set(rng.choice(rows, min(QUERIES, rows), replace=False).tolist())
    queries = []
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for row, text in enumerate(texts(rng, rows)):
            file.write(json.dumps({"id": str(row), "contents": text}) + "\n")
            if row in sources:
                queries.append(" ".join(rng.choice(text.split(), int(rng.integers(5, 13)), replace=False)))
    return Corpus(folder / "corpus.jsonl"), queries


def per_second(search: Search, count: int, batch: int, seconds: float) -> float:
    """Queries a second, one batch after the other."""
    search(0, batch)
    began, place, done = time.perf_counter(), 0, 0
    while (elapsed := time.perf_counter() - began) < seconds:
        search(place, place + batch)
        done += batch
        place = place + batch if place + 2 * batch <= count else 0
    return done / elapsed


def searches(folder: Path, queries: list[str], topk: int, threads: int) -> dict[str, Search]:
    """What is compared, by name."""
    words = bm25s.tokenize(queries, stopwords=None, return_ids=False, show_progress=False)

    def theirs(backend: str, count: int) -> Search:
        index = bm25s.BM25.load(str(folder), backend=backend)
        flags = {"k": topk, "show_progress": False, "n_threads": count, "backend_selection": backend}
        return lambda start, stop: index.retrieve(words[start:stop], **flags)

    def ours(count: int) -> Search:
        index = Bm25Index.load(folder, threads=count)
        return lambda start, stop: index.search(queries[start:stop], topk)

    return {
        "bm25s numpy, 1 thread": theirs("numpy", 0),
        f"bm25s numpy, {threads} threads": theirs("numpy", threads),
        "bm25s numba, 1 thread": theirs("numba", 1),
        f"bm25s numba, {threads} threads": theirs("numba", threads),
        "ours, 1 thread": ours(1),
        f"ours, {threads} threads": ours(threads),
    }


def check_answers(found: dict[str, Search], queries: int) -> None:
    """Every searcher must give the same scores.

    Raises:
        AssertionError: they differ.
    """
    answers = [search(0, queries) for search in found.values()]
    wanted = np.array([[score for _, score in hits] for hits in answers[-1]])
    for answer in answers:
        scores = answer.scores if hasattr(answer, "scores") else [[score for _, score in hits] for hits in answer]
        np.testing.assert_allclose(scores, wanted, rtol=1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--topk", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        corpus, queries = write_world(Path(name), args.rows)
        index = Path(name) / "index"
        index.mkdir()
        began = time.perf_counter()
        build_bm25(corpus, index)
        built = args.rows / (time.perf_counter() - began)
        print(f"built at {built:,.0f} passages a second, one core")
        found = searches(index, queries, args.topk, args.threads)
        check_answers(found, 256)
        print(f"{args.rows:,} passages, topk {args.topk}; queries a second at batch " + ", ".join(map(str, BATCHES)))
        numbers: dict[str, list[float]] = {}
        for label, search in found.items():
            numbers[label] = [per_second(search, len(queries), batch, args.seconds) for batch in BATCHES]
            print(f"{label:24}" + "".join(f"{number:12,.0f}" for number in numbers[label]), flush=True)
    if args.out:
        settings = {"rows": args.rows, "topk": args.topk, "threads": args.threads, "batches": BATCHES}
        args.out.write_text(
            json.dumps({**settings, "build_per_second": built, "queries_per_second": numbers}, indent=2), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
