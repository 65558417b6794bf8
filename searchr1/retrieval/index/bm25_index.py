"""BM25 over title and text: bm25s' files, mapped and checked, and an exact search that reads less of them."""

from __future__ import annotations

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from searchr1.errors import UserError
from searchr1.retrieval.index.manifest import BM25_FILES, DamagedIndex, index_error
from searchr1.retrieval.index.tokens import get_tokenizer, without_accents
from searchr1.retrieval.searcher import Hits

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
        raise DamagedIndex(path, f"is not an array of {' or '.join(dtypes)} in one dimension")
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
        raise DamagedIndex(path, f"is damaged: {wrong!r:.40} is not a number of a word")
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
            raise DamagedIndex(folder / DATA_FILE, f"is damaged: entry {entry} ({lists.data[entry]}) is not a score of BM25")
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


MIN_SHARE = 32
"""Queries that make a thread of their own worth while."""


class Bm25Index:
    """Search over posting lists. One search at a time: its workspaces are reused."""

    def __init__(
        self,
        lists: PostingLists,
        stemmer: str | None = None,
        threads: int = 1,
        tokenizer: str | None = None,
        largest: npt.NDArray[Any] | None = None,
    ) -> None:
        """Search in lists that are known to be sound. `largest`: the most that each word adds, if that is known.

        Raises:
            UserError: an unknown stemmer or tokenizer.
        """
        self._vocabulary = lists.vocabulary
        self._stemmer = stemmer_of(stemmer)
        self._tokenizer = get_tokenizer(tokenizer)
        self._plain = plain_forms(self._vocabulary) if self._tokenizer.normalizes else {}
        self._rows = lists.rows
        self._retriever: Any = None
        self._lists = lists.data, lists.indices, lists.indptr
        self._largest = kernel().largest_scores(lists.data, lists.indptr) if largest is None else largest
        self._workspaces = [_Workspace(self.rows) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bm25") if threads > 1 else None
        self.search(["warm up"], 1)  # compiles, or loads what was compiled before

    @classmethod
    def build(
        cls, texts: Iterable[str], stemmer: str | None = None, threads: int = 1, tokenizer: str | None = None
    ) -> Bm25Index:
        """Index texts in memory; they are read once and only their words are kept.

        `stemmer`: a language that PyStemmer knows ("english"), or None to keep words as they are. `tokenizer`: see
        `searchr1.retrieval.index.tokens`.

        Raises:
            UserError: unknown stemmer or tokenizer, or no words at all.
        """
        import bm25s
        from bm25s.tokenization import Tokenized

        reducer, split = stemmer_of(stemmer), get_tokenizer(tokenizer).passage
        vocabulary: defaultdict[str, int] = defaultdict()
        vocabulary.default_factory = vocabulary.__len__  # a new word gets the next number
        ids = []
        for text in texts:
            words = split(text)
            ids.append([vocabulary[word] for word in (words if reducer is None else reducer.stemWords(words))])
        if not vocabulary:
            raise UserError("--corpus_path: has no words")
        retriever = bm25s.BM25()
        retriever.index(Tokenized(ids=ids, vocab=dict(vocabulary)), show_progress=False)
        scores = retriever.scores
        lists = PostingLists(scores["data"], scores["indices"], scores["indptr"], dict(vocabulary), int(scores["num_docs"]))
        index = cls(lists, stemmer, threads, tokenizer)
        index._retriever = retriever
        return index

    @classmethod
    def load(
        cls,
        folder: Path,
        stemmer: str | None = None,
        threads: int = 1,
        tokenizer: str | None = None,
        checked: bool = False,
    ) -> Bm25Index:
        """Map an index folder; `checked`: its lists were read through before.

        Raises:
            UserError: files are missing or damaged.
        """
        try:
            lists = open_lists(folder)
            if not checked:
                check_lists(folder, lists)
            return cls(lists, stemmer, threads, tokenizer, largest_of(folder, lists))
        except DamagedIndex as error:
            raise index_error(error) from error

    @property
    def rows(self) -> int:
        """Passages in the index."""
        return self._rows

    def save(self, folder: Path) -> None:
        """Write the index into `folder`."""
        self._retriever.save(str(folder), show_progress=False)
        np.save(folder / LARGEST_FILE, self._largest)

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        """Return at most `topk` passages that share a word with each query; the lower row first among equal scores.

        A word that a query repeats counts as often. Scores do not depend on `topk` or on the other queries.
        """
        threads = min(len(self._workspaces), max(len(queries) // MIN_SHARE, 1))
        shares = [queries[share] for share in _shares(len(queries), threads)]
        topk = min(topk, self.rows)
        if self._pool is None or threads == 1:
            return [hits for share in shares for hits in self._search(share, topk, self._workspaces[0])]
        parts = self._pool.map(self._search, shares, [topk] * threads, self._workspaces[:threads])
        return [hits for part in parts for hits in part]

    def _search(self, queries: Sequence[str], topk: int, workspace: _Workspace) -> list[Hits]:
        ids = [self._ids(query) for query in queries]
        first = np.cumsum([0, *map(len, ids)])
        words = np.array([word for row in ids for word in row], dtype=np.int64)
        rows = np.empty((len(queries), topk), dtype=np.int32)
        scores = np.empty((len(queries), topk), dtype=np.float32)
        counts = np.empty(len(queries), dtype=np.int64)
        kernel().search_words(
            *self._lists, self._largest, words, first, topk, workspace.scores, workspace.touched, rows, scores, counts
        )
        return [
            list(zip(row[:count], score[:count], strict=True))
            for row, score, count in zip(rows.tolist(), scores.tolist(), counts.tolist(), strict=True)
        ]

    def _ids(self, query: str) -> list[int]:
        """Return the numbers of the words of a query that the index has."""
        words = self._tokenizer.query(query)
        if self._stemmer is not None:
            words = self._stemmer.stemWords(words)
        ids = []
        for word in words:
            if (number := self._vocabulary.get(word)) is not None:
                ids.append(number)
            elif self._tokenizer.normalizes:
                plain = without_accents(word)
                number = self._vocabulary.get(plain)
                ids += self._plain.get(plain, []) if number is None else [number]
        return ids


def plain_forms(vocabulary: dict[str, int]) -> dict[str, list[int]]:
    """Map words without their accents to the numbers of the words that have them."""
    numbers: dict[str, list[int]] = {}
    for word, number in vocabulary.items():
        if not word.isascii() and (plain := without_accents(word)) != word:
            numbers.setdefault(plain, []).append(number)
    return numbers


class _Workspace:
    """What one thread needs: eight bytes per passage."""

    def __init__(self, rows: int) -> None:
        self.scores: npt.NDArray[np.float32] = np.zeros(rows, dtype=np.float32)
        self.touched: npt.NDArray[np.int32] = np.empty(rows, dtype=np.int32)


def _shares(count: int, parts: int) -> list[slice]:
    """Return `count` items as `parts` slices of about the same size."""
    edges = [count * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def stemmer_of(language: str | None) -> Any:
    """Return PyStemmer's stemmer, or None.

    Raises:
        UserError: unknown language.
    """
    if language is None:
        return None
    import Stemmer

    try:
        return Stemmer.Stemmer(language)
    except KeyError as error:
        known = ", ".join(Stemmer.algorithms())
        raise UserError(f"--stemmer {language}: unknown; use one of {known}") from error
