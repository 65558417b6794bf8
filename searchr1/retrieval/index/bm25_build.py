"""A BM25 index of a corpus of any size, in bounded memory, in the format of bm25s.

First pass: words become numbers, written to scratch files with the length of every passage; the passages that each word
occurs in are counted. Second pass: every (word, passage, score) is put in its place in the posting lists, a range of words
at a time, so that what is written at once stays in memory. Scores are Lucene's BM25 as in bm25s
(https://arxiv.org/abs/2407.03618): idf(w) tf / (tf + k1 (1 - b + b length / mean length)),
idf(w) = log(1 + (N - df + .5) / (df + .5)).

Memory: a block of the first pass (about 200 MiB), the vocabulary, and 16 bytes per passage. Disk: 12 bytes per posting
(a word of a passage, however often it is in it) until the end, and 8 that stay.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from searchr1.errors import UserError
from searchr1.progress import Advance
from searchr1.retrieval.index.bm25_index import (
    DATA_FILE,
    INDICES_FILE,
    INDPTR_FILE,
    LARGEST_FILE,
    PARAMETERS_FILE,
    VOCABULARY_FILE,
    stemmer_of,
)
from searchr1.retrieval.index.corpus import Corpus
from searchr1.retrieval.index.tokens import Split, choose_tokenizer, get_tokenizer, split_as_bm25s

K1, B = 1.5, 0.75
"""bm25s' defaults."""
PASSAGES = 20_000
"""Passages of a block of the first pass."""
WORDS = 2 << 20
"""Words after which a block ends before it has so many passages."""
POSTINGS = 32 << 20
"""Postings of a range of the second pass: 256 MiB of the index."""
STEMS = 1 << 20
"""Words whose stems are remembered."""
SAMPLE = 1_000
"""Passages that the size of the index is guessed from, and its tokenizer chosen by."""
POSTING_BYTES = 20
"""On disk at the most: word, passage, occurrences of the first pass; passage and score of the second."""


def build_bm25(
    corpus: Corpus,
    out: Path,
    stemmer: str | None = None,
    advance: Advance = lambda _: None,
    tokenizer: str | None = None,
) -> None:
    """Write a BM25 index of the corpus into the folder `out`; `advance` gets the number of passages of every block read.

    The files get their names when all of them are finished: until then an older index stays as it is, also under a server
    that has it mapped.

    Raises:
        UserError: unknown stemmer or tokenizer, no words at all, or the disk is full.
    """
    reducer, split = stemmer_of(stemmer), get_tokenizer(tokenizer).passage
    scratch = out / "scratch"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        (scratch / "blocks").mkdir(parents=True)
        check_room(corpus, out, split)
        counted = count_words(corpus, scratch / "blocks", reducer, advance, split)
        write_lists(counted, scratch)
        publish(scratch, out)
    except OSError as error:
        raise UserError(f"--save_dir {out}: cannot write ({error}); make room and run the same command again") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True)
class Counted:
    """The result of the first pass.

    `blocks`: a file each, in the order of the passages, with [3, postings] int32: word, passage, occurrences; sorted.
    """

    vocabulary: dict[str, int]
    frequency: npt.NDArray[np.int64]
    """[words] passages that have the word."""
    lengths: npt.NDArray[np.int32]
    """[passages] words."""
    blocks: list[Path]


def sample(corpus: Corpus) -> Iterator[str]:
    """Yield about `SAMPLE` passages from all over the corpus."""
    for row in range(0, len(corpus), max(len(corpus) // SAMPLE, 1)):
        yield from corpus.contents(row, row + 1)


def tokenizer_for(corpus: Corpus, wanted: str | None) -> str:
    """Return the tokenizer that is wanted, or (None, `auto`) the one that suits the corpus."""
    return choose_tokenizer(sample(corpus)) if wanted in (None, "auto") else str(wanted)


def check_room(corpus: Corpus, out: Path, split: Split = split_as_bm25s) -> None:
    """Guess the space from passages all over the corpus, rather than fail when half of it is written.

    Raises:
        UserError: there is less.
    """
    distinct = [len(set(split(text))) for text in sample(corpus)]
    needed = sum(distinct) / max(len(distinct), 1) * len(corpus) * POSTING_BYTES
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"--save_dir {out}: the index needs about {needed / 2**20:,.0f} MiB while it is made,"
            f" {free / 2**20:,.0f} MiB are free; make room or take another disk"
        )


def count_words(corpus: Corpus, folder: Path, stemmer: Any, advance: Advance, split: Split = split_as_bm25s) -> Counted:
    """Run the first pass.

    Raises:
        UserError: the corpus has no words.
    """
    vocabulary: defaultdict[str, int] = defaultdict()
    vocabulary.default_factory = vocabulary.__len__  # a new word gets the next number
    stems: dict[str, str] = {}
    frequency = np.zeros(0, dtype=np.int64)
    lengths = np.zeros(len(corpus), dtype=np.int32)
    blocks: list[Path] = []
    ids: list[int] = []
    first = 0
    for row, text in enumerate(corpus.contents()):
        words = split(text)
        if stemmer is not None:
            words = stem(words, stems, stemmer)
        lengths[row] = len(words)
        ids.extend(map(vocabulary.__getitem__, words))
        after = row + 1
        if len(ids) >= WORDS or after - first == PASSAGES or after == len(corpus):
            blocks.append(folder / f"{first:012d}.npy")
            frequency = with_room(frequency, len(vocabulary))
            write_block(ids, lengths[first:after], first, frequency, blocks[-1])
            ids.clear()
            advance(after - first)
            first = after
    if not vocabulary:
        raise UserError(f"--corpus_path {corpus.path}: has no words")
    return Counted(dict(vocabulary), frequency[: len(vocabulary)], lengths, blocks)


def stem(words: list[str], known: dict[str, str], stemmer: Any) -> list[str]:
    """Return the stems of words; a word is reduced once, as long as it is remembered."""
    if len(known) > STEMS:
        known.clear()
    new = [word for word in dict.fromkeys(words) if word not in known]
    known.update(zip(new, stemmer.stemWords(new), strict=True))
    return [known[word] for word in words]


def with_room(counts: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """Return the same counts with room for at least `size`, twice as much when the array has to move."""
    return counts if len(counts) >= size else np.concatenate([counts, np.zeros(2 * size - len(counts), dtype=np.int64)])


def write_block(
    ids: list[int], lengths: npt.NDArray[np.int32], first: int, frequency: npt.NDArray[np.int64], path: Path
) -> None:
    """Write the postings of the passages from `first` on, and add them to `frequency`.

    Args:
        ids: words of these passages, one passage after the other.
        lengths: [passages] how many each has.
        first: number of the first passage.
        frequency: [words] passages that have the word.
        path: the file.
    """
    passages = np.repeat(np.arange(first, first + len(lengths)), lengths)
    keys, counts = np.unique(np.array(ids, dtype=np.int64) << 32 | passages, return_counts=True)
    block = np.empty((3, len(keys)), dtype=np.int32)
    block[0], block[1], block[2] = keys >> 32, keys & 0xFFFFFFFF, counts
    starts = run_starts(block[0])
    frequency[block[0][starts]] += np.diff(starts, append=len(keys))
    np.save(path, block)


def run_starts(words: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Return the places in a sorted array where another number begins."""
    return np.flatnonzero(np.diff(words, prepend=-1))


def write_lists(counted: Counted, folder: Path) -> None:
    """Run the second pass, which writes the files of the index."""
    rows, frequency = len(counted.lengths), counted.frequency
    indptr = np.concatenate([[0], np.cumsum(frequency, dtype=np.int64)])
    np.save(folder / INDPTR_FILE, indptr)
    data = reserve(folder / DATA_FILE, np.float32, int(indptr[-1]))
    indices = reserve(folder / INDICES_FILE, np.int32, int(indptr[-1]))
    idf = np.log(1 + (rows - frequency + 0.5) / (frequency + 0.5))
    damping = K1 * (1 - B + B * counted.lengths / counted.lengths.mean())
    largest = np.zeros(len(frequency), dtype=np.float32)
    for first, last in word_ranges(indptr):
        heads = indptr[first:last].copy()
        for path in counted.blocks:
            words, passages, counts = postings(path, first, last)
            places = take_places(words - first, heads)
            data[places] = idf[words] * counts / (counts + damping[passages])
            indices[places] = passages
        start = int(indptr[first])
        largest[first:last] = np.maximum.reduceat(data[start : int(indptr[last])], indptr[first:last] - start)
    data.flush()
    indices.flush()
    np.save(folder / LARGEST_FILE, largest)
    (folder / VOCABULARY_FILE).write_text(json.dumps(counted.vocabulary, ensure_ascii=False), encoding="utf-8")
    parameters = {
        "k1": K1, "b": B, "delta": 0.5, "method": "lucene", "idf_method": "lucene", "dtype": "float32", "int_dtype": "int32",
        "num_docs": rows, "backend": "numpy", "version": bm25s_version(),
    }  # fmt: skip
    (folder / PARAMETERS_FILE).write_text(json.dumps(parameters, indent=2), encoding="utf-8")


def reserve(path: Path, dtype: type[np.generic], size: int) -> np.memmap[Any, Any]:
    """Map an array in a new file whose space is taken at once: a mapped write to a full disk kills the process.

    Raises:
        OSError: the disk is full.
    """
    array: np.memmap[Any, Any] = np.lib.format.open_memmap(path, "w+", dtype, (size,))
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def word_ranges(indptr: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield ranges of words with at most `POSTINGS` postings each (or one word)."""
    first, words = 0, len(indptr) - 1
    while first < words:
        last = int(np.searchsorted(indptr, indptr[first] + POSTINGS, "right")) - 1
        last = max(last, first + 1)
        yield first, last
        first = last


def postings(path: Path, first: int, last: int) -> npt.NDArray[np.int32]:
    """Return [3, postings]: word, passage and occurrences of a range of words in a block."""
    block = np.load(path, mmap_mode="r")
    start, stop = np.searchsorted(block[0], [first, last])
    return np.array(block[:, start:stop])


def take_places(words: npt.NDArray[np.int32], heads: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return where each posting goes: the next free place in the list of its word; `heads` moves on.

    Args:
        words: [postings] sorted.
        heads: [words] the next free place of each list.
    """
    starts = run_starts(words)
    lengths = np.diff(starts, append=len(words))
    present = words[starts]
    places: npt.NDArray[np.int64] = np.repeat(heads[present] - starts, lengths) + np.arange(len(words))
    heads[present] += lengths
    return places


def publish(folder: Path, out: Path) -> None:
    """Give finished files their names, the parameters last: no moment of it leaves a folder that bm25s would load."""
    (out / PARAMETERS_FILE).unlink(missing_ok=True)
    names = {file.name for file in folder.iterdir() if file.is_file()}
    for name in [*sorted(names - {PARAMETERS_FILE}), PARAMETERS_FILE]:
        os.replace(folder / name, out / name)


def bm25s_version() -> str:
    """Return the version of the library whose format this is."""
    import bm25s

    return str(bm25s.__version__)
