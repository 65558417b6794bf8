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
from searchr1.retrieval.index.bm25_files import LARGEST_FILE, PostingLists, check_lists, kernel, largest_of, open_lists
from searchr1.retrieval.index.manifest import DamagedIndex, index_error
from searchr1.retrieval.index.tokens import get_tokenizer, without_accents
from searchr1.retrieval.searcher import Hits

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
