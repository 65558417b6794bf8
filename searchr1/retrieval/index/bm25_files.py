"""The files of a BM25 index, in the format of bm25s: mapped, and looked through before compiled code follows them.

The search reads places that the files name without checking them again, so a damaged file would end the process, or read
somebody else's memory. What is checked here holds for every file, whoever made it; that nothing has changed since it was
written is what the checksums of the manifest are for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from searchr1.errors import UserError
from searchr1.retrieval.index.manifest import BM25_FILES, DamagedIndex

DATA_FILE, INDICES_FILE, INDPTR_FILE, LARGEST_FILE, PARAMETERS_FILE, VOCABULARY_FILE = BM25_FILES
NPY_HEADER = re.compile(
    rb"\{'descr': '(?P<dtype><[fi][48])', 'fortran_order': False, 'shape': \((?P<size>\d{1,18}),\), \} *\n"
)
"""Of one dimension, as NumPy writes it; NumPy's own reader evaluates it as Python."""
FLOATS, INTEGERS = ("<f4", "<f8"), ("<i4", "<i8")
PARAMETERS_BYTES = 1 << 20
RANGE_POSTINGS = 8 << 20
"""Postings that a thread checks at a time."""


@dataclass(frozen=True, slots=True)
class PostingLists:
    """A BM25 index: word w adds `data[e]` to passage `indices[e]` for e in `indptr[w]:indptr[w + 1]`."""

    data: npt.NDArray[Any]
    indices: npt.NDArray[Any]
    indptr: npt.NDArray[Any]
    vocabulary: dict[str, int]
    """Word -> number."""
    rows: int
    """Number of passages."""


def open_lists(folder: Path) -> PostingLists:
    """Map an index: its files have the right form and belong together; what is in the lists is not looked at.

    Raises:
        DamagedIndex: a file is missing or has no such form.
        UserError: of a method whose scores the search does not know.
    """
    parameters = read_json(folder / PARAMETERS_FILE, PARAMETERS_BYTES)
    for key in ("method", "idf_method"):
        if parameters.get(key) != "lucene":
            method = str(parameters.get(key))
            raise UserError(f"--index_path {folder}: its {key} is {method[:40]}; build it with searchr1 build-index")
    rows = parameters.get("num_docs")
    if type(rows) is not int or not 0 < rows < 1 << 31:
        raise DamagedIndex(folder / PARAMETERS_FILE, f"says that it is of {rows!r:.40} passages")
    indptr = open_array(folder / INDPTR_FILE, INTEGERS)
    data, indices = open_array(folder / DATA_FILE, FLOATS), open_array(folder / INDICES_FILE, INTEGERS)
    check_pointers(folder, indptr, len(data), len(indices))
    vocabulary = read_json(folder / VOCABULARY_FILE)
    vocabulary.pop("", None)  # bm25s adds it, with a number of its own
    check_vocabulary(folder / VOCABULARY_FILE, vocabulary, len(indptr) - 1)
    return PostingLists(data, indices, indptr, vocabulary, rows)


def open_array(path: Path, dtypes: tuple[str, ...]) -> npt.NDArray[Any]:
    """Map a file of numbers in one dimension.

    Raises:
        DamagedIndex: it is none, or its size is not what it says.
    """
    try:
        with path.open("rb") as file:
            magic, length = file.read(8), int.from_bytes(file.read(2), "little")
            header = NPY_HEADER.fullmatch(file.read(length)) if magic == b"\x93NUMPY\x01\x00" else None
        size = path.stat().st_size
    except OSError as error:
        raise DamagedIndex(path, f"cannot be read ({error.strerror})") from error
    if header is None or (dtype := header["dtype"].decode()) not in dtypes:
        raise DamagedIndex(path, f"is no array of {' or '.join(dtypes)} in one dimension")
    count, wanted = int(header["size"]), 10 + length + int(header["size"]) * np.dtype(dtype).itemsize
    if size != wanted or count == 0:
        raise DamagedIndex(path, f"has {size} bytes instead of {wanted}" if count else "is empty")
    return np.memmap(path, dtype, "r", 10 + length, (count,))


def read_json(path: Path, max_bytes: int | None = None) -> dict[str, Any]:
    """Return the object in a file.

    Raises:
        DamagedIndex: there is none.
    """
    try:
        size = path.stat().st_size
        values = orjson.loads(path.read_bytes()) if max_bytes is None or size <= max_bytes else None
    except OSError as error:
        raise DamagedIndex(path, f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DamagedIndex(path, f"is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise DamagedIndex(path, "does not hold what it should")
    return values


def check_pointers(folder: Path, indptr: npt.NDArray[Any], entries: int, rows: int) -> None:
    """Check that the lists lie one after the other in the two arrays of postings.

    Raises:
        DamagedIndex: they do not.
    """
    path = folder / INDPTR_FILE
    if entries != rows:
        raise DamagedIndex(
            folder / INDICES_FILE, f"has {rows} entries, {DATA_FILE} {entries}: its files do not belong together"
        )
    if len(indptr) < 2 or indptr[0] != 0 or indptr[-1] != entries:
        raise DamagedIndex(path, f"does not cover the {entries} entries of {DATA_FILE}: its files do not belong together")
    if (falls := np.flatnonzero(indptr[1:] < indptr[:-1])).size:
        raise DamagedIndex(path, f"is damaged: the list of word {falls[0]} ends before it begins")


def check_vocabulary(path: Path, vocabulary: dict[str, Any], words: int) -> None:
    """Check that every list has one word.

    Raises:
        DamagedIndex: some have none or two, or a number is none of a list.
    """
    if len(vocabulary) != words:
        raise DamagedIndex(path, f"has {len(vocabulary)} words for {words} lists: its files do not belong together")
    numbers = vocabulary.values()
    wrong = next((number for number in numbers if type(number) is not int or not 0 <= number < words), None)
    if wrong is not None:
        raise DamagedIndex(path, f"is damaged: {wrong!r:.40} is no number of a word")
    if len(set(numbers)) != words:
        raise DamagedIndex(path, "is damaged: two words have the same number")


def largest_of(folder: Path, lists: PostingLists) -> npt.NDArray[Any] | None:
    """Return the most that each word adds, as the index says; None if it does not.

    Raises:
        DamagedIndex: the file is damaged.
    """
    path = folder / LARGEST_FILE
    if not path.exists():
        return None
    largest = open_array(path, FLOATS)
    if len(largest) != len(lists.indptr) - 1:
        raise DamagedIndex(path, f"has {len(largest)} entries for {len(lists.indptr) - 1} words: it is of another index")
    return largest


def check_lists(folder: Path, lists: PostingLists, advance: Callable[[int], object] = lambda _: None) -> None:
    """Read all postings: passages exist and ascend, scores are such as BM25 gives, and the largest ones are known.

    `advance` is called with the bytes that were read.

    Raises:
        DamagedIndex: one is not so; names the first file with such a place.
    """
    compiled = kernel()
    path, largest = folder / LARGEST_FILE, largest_of(folder, lists)
    itemsize = lists.data.itemsize + lists.indices.itemsize

    def check(words: tuple[int, int]) -> int:
        first, last = words
        entry, reason = compiled.check_lists(lists.data, lists.indices, lists.indptr, lists.rows, first, last)
        if reason in (compiled.NO_PASSAGE, compiled.NOT_ASCENDING):
            problem = "names a passage that does not exist" if reason == compiled.NO_PASSAGE else "is out of order"
            raise DamagedIndex(folder / INDICES_FILE, f"is damaged: {problem} at entry {entry} ({lists.indices[entry]})")
        if reason == compiled.NO_SCORE:
            raise DamagedIndex(folder / DATA_FILE, f"is damaged: entry {entry} ({lists.data[entry]}) is no score of BM25")
        if largest is not None:
            actual = compiled.largest_scores(lists.data, lists.indptr[first : last + 1])
            if (wrong := np.flatnonzero(actual != largest[first:last])).size:
                word, score = first + int(wrong[0]), actual[wrong[0]]
                raise DamagedIndex(path, f"is damaged: the largest score of word {word} is {score}, not {largest[word]}")
        return int(lists.indptr[last] - lists.indptr[first]) * itemsize

    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="check") as pool:
        try:
            for count in pool.map(check, ranges(lists.indptr)):
                advance(count)
        except DamagedIndex:
            pool.shutdown(cancel_futures=True)
            raise


def ranges(indptr: npt.NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Yield ranges of words with at most `RANGE_POSTINGS` postings each, or one word."""
    first, words = 0, len(indptr) - 1
    while first < words:
        last = int(np.searchsorted(indptr, int(indptr[first]) + RANGE_POSTINGS, "right")) - 1
        last = min(max(last, first + 1), words)
        yield first, last
        first = last


def kernel() -> Any:
    """Return the compiled functions.

    Raises:
        UserError: numba finds no place to keep them.
    """
    try:
        from searchr1.retrieval.index import bm25_kernel
    except RuntimeError as error:
        raise UserError(f"{error}; set NUMBA_CACHE_DIR to a folder that can be written") from error
    return bm25_kernel
