"""Memory, recall and speed of dense indexes beside exact search.

    python benchmarks/ann_index.py [--rows 1000000] [--dimension 768] [--types Flat,IVF,IVFPQ,...] [--out FILE]

The vectors are random with the structure of text embeddings: topics of uneven size, subtopics, a direction that all share,
and a spectrum that falls off. A query is a passage's vector with noise: its own passage is easy to find, the runners-up lie
close together, which makes recall@3 hard. All indexes search the same queries on the same cores in one run. Lossy indexes
score their candidates again with the exact vectors in a mapped half-precision file, as the server does.

Memory is the size of the index file; `from disk` are the bytes of the vector file that 2,000 queries touched (whole
pages), which the operating system may drop again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from searchr1.retrieval.index.dense import DenseIndex, build_faiss, load_faiss, set_search_parameters
from searchr1.retrieval.index.faiss_types import faiss_type
from searchr1.retrieval.index.flat import FlatSearch, Refiner
from searchr1.retrieval.index.index_check import open_vectors

QUERIES = 2000
TOPK = 3
BLOCK = 50_000
PAGE = 4096
OWN_FLAT = "Flat by FAISS"
"""FAISS' own exact search, in place of ours over the same index."""


def unit(vectors: np.ndarray) -> np.ndarray:
    """Length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def write_vectors(path: Path, rows: int, dimension: int) -> np.ndarray:
    """Write the passages' vectors; returns the queries'."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, dimension + 1, dtype=np.float32) ** -0.35

    def noise(count: int) -> np.ndarray:
        return unit(rng.standard_normal((count, dimension), dtype=np.float32) * spectrum)

    topics, subtopics = 300, 20_000
    shared, centres = noise(1), noise(topics)
    sizes = rng.pareto(1.0, topics) + 1
    parents = rng.choice(topics, subtopics, p=sizes / sizes.sum())
    centres = unit(centres[parents] + 0.9 * noise(subtopics))
    popularity = np.arange(1, subtopics + 1) ** -0.6
    popularity /= popularity.sum()
    vectors = np.memmap(path, dtype=np.float16, mode="w+", shape=(rows, dimension))
    for start in range(0, rows, BLOCK):
        count = min(BLOCK, rows - start)
        mine = rng.choice(subtopics, count, p=popularity)
        vectors[start : start + count] = unit(shared + centres[mine] + 0.8 * noise(count))
    vectors.flush()
    targets = np.sort(rng.choice(rows, QUERIES, replace=False))
    return unit(vectors[targets].astype(np.float32) + 0.5 * noise(QUERIES))


def per_second(index: DenseIndex, queries: np.ndarray, batch: int, seconds: float) -> tuple[float, float]:
    """(queries a second, 99th percentile of a batch's milliseconds)"""
    index.search_vectors(queries[:batch], TOPK)
    times: list[float] = []
    began, place = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        started = time.perf_counter()
        index.search_vectors(queries[place : place + batch], TOPK)
        times.append(time.perf_counter() - started)
        place = (place + batch) % (len(queries) - batch)
    return batch * len(times) / sum(times), float(np.percentile(times, 99) * 1000)


class NoEncoder:
    """The benchmark searches vectors."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    def encode(self, texts: Any, role: Any) -> Any:
        raise NotImplementedError


def measure(name: str, path: Path, vectors: np.ndarray, queries: np.ndarray, truth: np.ndarray, args: Any) -> dict[str, Any]:
    """Build, load as the server does, and measure one index."""
    rows, dimension = vectors.shape
    own = name == OWN_FLAT
    kind = faiss_type("Flat" if own else name, rows, dimension)
    started = time.perf_counter()
    built = build_faiss(vectors, kind)
    faiss.write_index(built, str(path))
    del built
    build_seconds = time.perf_counter() - started
    loaded = load_faiss(path, dimension)
    set_search_parameters(loaded, args.nprobe or kind.nprobe, kind.ef_search)
    refiner = Refiner(vectors) if kind.lossy else None
    index = DenseIndex(loaded, NoEncoder(dimension), refiner, args.refine_factor or kind.refine_factor)
    if own:
        index._flat = None
    found = np.concatenate([index.search_vectors(queries[i : i + 64], TOPK)[1] for i in range(0, QUERIES, 64)])
    recall = float(np.mean([len(set(a) & set(b)) / TOPK for a, b in zip(found.tolist(), truth.tolist(), strict=True)]))
    touched = 0
    if kind.lossy:
        candidates = min(TOPK * index._refine_factor, rows)
        looked_at = np.unique(loaded.search(queries, candidates)[1])
        row_bytes = vectors.dtype.itemsize * dimension
        first, last = looked_at * row_bytes // PAGE, ((looked_at + 1) * row_bytes - 1) // PAGE
        touched = len(np.unique(np.concatenate([first, last]))) * PAGE
    one, p99 = per_second(index, queries, 1, args.seconds)
    many, _ = per_second(index, queries, 64, args.seconds)
    size = path.stat().st_size
    path.unlink()
    return {
        "type": name,
        "factory": kind.factory,
        "build_s": build_seconds,
        "bytes": size,
        "share_of_flat": size / (rows * dimension * 4),
        "refined_from_disk_bytes": touched,
        "recall@3": recall,
        "per_second_batch_64": many,
        "per_second_batch_1": one,
        "p99_ms_batch_1": p99,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument(
        "--types", default=f"Flat;{OWN_FLAT};IVF;IVFPQ", help="separated by semicolons; HNSW takes long to build"
    )
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--nprobe", type=int)
    parser.add_argument("--refine_factor", type=int)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    faiss.omp_set_num_threads(cores)
    torch.set_num_threads(cores)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="searchr1-ann-") as folder:
        queries = write_vectors(Path(folder) / "vectors.f16", args.rows, args.dimension)
        vectors = open_vectors(Path(folder) / "vectors.f16", args.rows, args.dimension)
        truth = FlatSearch(vectors).search(queries, TOPK)[1]
        print(f"{args.rows:,} x {args.dimension}, {cores} cores\n")
        print(
            "| type | factory | build s | GiB | of Flat | from disk GiB | recall@3 | q/s, 64 at once | of Flat | q/s, one "
            "| p99 ms |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
        for name in args.types.split(";"):
            r = measure(name, Path(folder) / "index", vectors, queries, truth, args)
            results.append(r)
            flat = next((x["per_second_batch_64"] for x in results if x["type"] == "Flat"), float("nan"))
            r["speed_of_flat"] = r["per_second_batch_64"] / flat
            print(
                f"| {name} | {r['factory']} | {r['build_s']:.0f} | {r['bytes'] / 2**30:.2f} | {r['share_of_flat']:.3f} | "
                f"{r['refined_from_disk_bytes'] / 2**30:.2f} | {r['recall@3']:.3f} | {r['per_second_batch_64']:,.0f} | "
                f"{r['speed_of_flat']:.1f}x | {r['per_second_batch_1']:,.0f} | {r['p99_ms_batch_1']:.1f} |",
                flush=True,
            )
    if args.out:
        args.out.write_text(
            json.dumps({"rows": args.rows, "dimension": args.dimension, "results": results}, indent=2) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
