"""A BM25 index of a corpus of any size, in bounded memory, in the format of bm25s.

First pass: words become numbers, written to a scratch file with the length of every passage; the passages that each word
occurs in are counted. Second pass: every (word, passage, score) is put in its place in the posting lists, a range of words
at a time, so that memory holds one range. Scores are Lucene's BM25 as in bm25s (https://arxiv.org/abs/2407.03618):
idf(w) tf / (tf + k1 (1 - b + b length / mean length)), idf(w) = log(1 + (N - df + .5) / (df + .5)).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from searchr1.errors import UserError
from searchr1.retrieval.bm25_index import LARGEST_FILE, WORD, stemmer_of
from searchr1.retrieval.corpus import Corpus

K1, B = 1.5, 0.75
"""bm25s' defaults."""
PASSAGES = 20_000
"""Passages of a block of the first pass."""
POSTINGS = 32 << 20
"""Postings of a range of the second pass: about 1 GiB with their sorting."""


def build_bm25(
    corpus: Corpus, out: Path, stemmer: str | None = None, progress: Callable[[int], None] = lambda _: None
) -> None:
    """Write a BM25 index of the corpus into the folder `out`; `progress` is told of the passages read.

    Raises:
        UserError: unknown stemmer, no words at all, or the disk is full.
    """
    scratch = out / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        build_lists(corpus, out, scratch, stemmer_of(stemmer), progress)
    except OSError as error:
        raise UserError(f"--save_dir {out}: cannot write ({error}); make room and run the same command again") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def build_lists(corpus: Corpus, out: Path, scratch: Path, stemmer: Any, progress: Callable[[int], None]) -> None:
    """Both passes."""
    vocabulary, frequency, lengths = count_words(corpus, scratch, stemmer, progress)
    if not vocabulary:
        raise UserError(f"--corpus_path {corpus.path}: has no words")
    rows = len(lengths)
    indptr = np.concatenate([[0], np.cumsum(frequency, dtype=np.int64)])
    np.save(out / "indptr.csc.index.npy", indptr)
    data = np.lib.format.open_memmap(out / "data.csc.index.npy", "w+", np.float32, (int(indptr[-1]),))
    indices = np.lib.format.open_memmap(out / "indices.csc.index.npy", "w+", np.int32, (int(indptr[-1]),))
    idf = np.log(1 + (rows - frequency + 0.5) / (frequency + 0.5))
    damping = K1 * (1 - B + B * lengths / lengths.mean())
    largest = np.zeros(len(vocabulary), dtype=np.float32)
    for first, last in word_ranges(indptr):
        start, stop = int(indptr[first]), int(indptr[last])
        words, passages, counts = postings(scratch, first, last, stop - start)
        scores = (idf[words] * counts / (counts + damping[passages])).astype(np.float32)
        data[start:stop], indices[start:stop] = scores, passages
        largest[first:last] = np.maximum.reduceat(scores, indptr[first:last] - start)
    data.flush()
    indices.flush()
    np.save(out / LARGEST_FILE, largest)
    (out / "vocab.index.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    parameters = {
        "k1": K1, "b": B, "delta": 0.5, "method": "lucene", "idf_method": "lucene", "dtype": "float32", "int_dtype": "int32",
        "num_docs": rows, "backend": "numpy", "version": bm25s_version(),
    }  # fmt: skip
    (out / "params.index.json").write_text(json.dumps(parameters, indent=2))


def count_words(
    corpus: Corpus, scratch: Path, stemmer: Any, progress: Callable[[int], None]
) -> tuple[dict[str, int], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First pass: (number of each word, passages that have it, words of each passage).

    `scratch` gets a file per block with one row per (word, passage): word, passage, occurrences; sorted.
    """
    vocabulary: dict[str, int] = {}
    stems: dict[str, str] = {}
    frequency = np.zeros(0, dtype=np.int64)
    lengths = np.zeros(len(corpus), dtype=np.int64)
    texts = corpus.contents()
    done = 0
    while block := list(islice(texts, PASSAGES)):
        ids: list[int] = []
        for number, text in enumerate(block):
            words = WORD.findall(text.lower())
            if stemmer is not None:
                words = stem(words, stems, stemmer)
            lengths[done + number] = len(words)
            ids.extend([vocabulary.setdefault(word, len(vocabulary)) for word in words])
        passages = np.repeat(np.arange(done, done + len(block)), lengths[done : done + len(block)])
        keys, counts = np.unique(np.array(ids, dtype=np.int64) << 32 | passages, return_counts=True)
        words_of_keys = keys >> 32
        np.save(scratch / f"{done:012d}.npy", np.stack([words_of_keys, keys & 0xFFFFFFFF, counts]).astype(np.int32))
        frequency = np.pad(frequency, (0, len(vocabulary) - len(frequency)))
        frequency += np.bincount(words_of_keys, minlength=len(vocabulary))
        done += len(block)
        progress(len(block))
    return vocabulary, frequency, lengths


def stem(words: list[str], known: dict[str, str], stemmer: Any) -> list[str]:
    """Stems of words; each word is reduced once."""
    new = [word for word in dict.fromkeys(words) if word not in known]
    known.update(zip(new, stemmer.stemWords(new), strict=True))
    return [known[word] for word in words]


def word_ranges(indptr: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of words with at most `POSTINGS` postings each (or one word)."""
    first, words = 0, len(indptr) - 1
    while first < words:
        last = int(np.searchsorted(indptr, indptr[first] + POSTINGS, "right")) - 1
        last = max(last, first + 1)
        yield first, last
        first = last


def postings(scratch: Path, first: int, last: int, size: int) -> tuple[Any, Any, Any]:
    """(word, passage, occurrences) of a range of words, ordered by word, then passage."""
    found = np.empty((3, size), dtype=np.int32)
    place = 0
    for file in sorted(scratch.glob("*.npy")):
        block = np.load(file, mmap_mode="r")
        start, stop = np.searchsorted(block[0], [first, last])
        found[:, place : place + stop - start] = block[:, start:stop]
        place += int(stop - start)
    # Blocks are in the order of their passages, so a stable sort by word is all that is needed.
    order = np.argsort(found[0], kind="stable")
    return found[0][order], found[1][order], found[2][order]


def bm25s_version() -> str:
    """Of the library whose format this is."""
    import bm25s

    return str(bm25s.__version__)
