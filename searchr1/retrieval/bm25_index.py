"""BM25 over title and text: bm25s' index files, mapped, and a search of our own that is exact and reads less of them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from searchr1.errors import UserError
from searchr1.retrieval.indexes import Hits
from searchr1.retrieval.tokens import get_tokenizer, without_accents

LARGEST_FILE = "largest.npy"
MIN_SHARE = 32
"""Queries that make a thread of their own worth while."""


class Bm25Index:
    """Search over posting lists. One search at a time: its workspaces are reused."""

    def __init__(
        self,
        retriever: Any,
        stemmer: str | None = None,
        threads: int = 1,
        folder: Path | None = None,
        tokenizer: str | None = None,
    ) -> None:
        """Wrap a bm25s index of its default method, Lucene's.

        Raises:
            UserError: another method, whose scores our search does not know, or an unknown stemmer or tokenizer.
        """
        largest_scores = kernel().largest_scores
        if retriever.method != "lucene":
            raise UserError(f"--index_path {folder}: its method is {retriever.method}; build it with searchr1 build-index")
        self._retriever = retriever
        self._vocabulary: dict[str, int] = retriever.vocab_dict
        self._stemmer = stemmer_of(stemmer)
        self._tokenizer = get_tokenizer(tokenizer)
        self._plain = plain_forms(self._vocabulary) if self._tokenizer.normalizes else {}
        scores = retriever.scores
        self._rows = int(scores["num_docs"])
        self._lists = data, indices, indptr = scores["data"], scores["indices"], scores["indptr"]
        # The kernel trusts the places that `indptr` gives.
        if not len(data) == len(indices) == indptr[-1] or max(self._vocabulary.values(), default=-1) >= len(indptr):
            raise UserError(f"--index_path {folder}: its files do not belong together; build it again")
        known = folder / LARGEST_FILE if folder else None
        self._largest = np.load(known) if known and known.is_file() else largest_scores(data, indptr)
        if len(self._largest) != len(indptr) - 1:
            raise UserError(f"--index_path {known}: is of another index; build it again")
        self._workspaces = [_Workspace(self.rows) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bm25") if threads > 1 else None
        self.search(["warm up"], 1)  # compiles, or loads what was compiled before

    @classmethod
    def build(
        cls, texts: Iterable[str], stemmer: str | None = None, threads: int = 1, tokenizer: str | None = None
    ) -> Bm25Index:
        """Index texts in memory; they are read once and only their words are kept.

        `stemmer`: a language that PyStemmer knows ("english"), or None to keep words as they are. `tokenizer`: see
        `searchr1.retrieval.tokens`.

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
        return cls(retriever, stemmer, threads, tokenizer=tokenizer)

    @classmethod
    def load(cls, folder: Path, stemmer: str | None = None, threads: int = 1, tokenizer: str | None = None) -> Bm25Index:
        """Map an index folder.

        Raises:
            UserError: files are missing or damaged.
        """
        import bm25s

        try:
            return cls(bm25s.BM25.load(str(folder), mmap=True), stemmer, threads, folder, tokenizer)
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(f"--index_path {folder}: not readable as a BM25 index ({error}); build it again") from error

    @property
    def rows(self) -> int:
        """Passages in the index."""
        return self._rows

    def save(self, folder: Path) -> None:
        """Write the index into `folder`."""
        self._retriever.save(str(folder), show_progress=False)
        np.save(folder / LARGEST_FILE, self._largest)

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        """At most `topk` passages that share a word with each query; the lower row first among equal scores.

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
        """Numbers of the words of a query that the index knows."""
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
    found: dict[str, list[int]] = {}
    for word, number in vocabulary.items():
        if not word.isascii() and (plain := without_accents(word)) != word:
            found.setdefault(plain, []).append(number)
    return found


def kernel() -> Any:
    """The compiled functions.

    Raises:
        UserError: numba finds no place to keep them.
    """
    try:
        from searchr1.retrieval import bm25_kernel
    except RuntimeError as error:
        raise UserError(f"{error}; set NUMBA_CACHE_DIR to a folder that can be written") from error
    return bm25_kernel


class _Workspace:
    """What one thread needs: eight bytes per passage."""

    def __init__(self, rows: int) -> None:
        self.scores: npt.NDArray[np.float32] = np.zeros(rows, dtype=np.float32)
        self.touched: npt.NDArray[np.int32] = np.empty(rows, dtype=np.int32)


def _shares(count: int, parts: int) -> list[slice]:
    """`count` things in `parts` slices of about the same size."""
    edges = [count * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def stemmer_of(language: str | None) -> Any:
    """PyStemmer's stemmer, or None.

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
