"""The kernel against adding up every posting list in NumPy."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1.retrieval.index.bm25_kernel import largest_scores, search_words


def postings(seed, rows, words, spread):
    """Lists of very different lengths, as of common and rare words; scores on a coarse grid, so that there are ties."""
    rng = np.random.default_rng(seed)
    lists = [np.flatnonzero(rng.random(rows) < rng.random() ** spread) for _ in range(words)]
    indptr = np.cumsum([0, *map(len, lists)])
    indices = np.concatenate([np.empty(0, int), *lists]).astype(np.int32)
    weights = np.repeat(rng.integers(1, 9, words), np.diff(indptr))
    return (weights * rng.integers(1, 9, len(indices)) / 8).astype(np.float32), indices, indptr


def run(data, indices, indptr, rows, queries, topk):
    first = np.cumsum([0, *map(len, queries)])
    words = np.array([word for query in queries for word in query], dtype=np.int64)
    scores, touched = np.zeros(rows, np.float32), np.full(rows, -7, np.int32)
    best_rows, best = np.empty((len(queries), topk), np.int32), np.empty((len(queries), topk), np.float32)
    counts = np.empty(len(queries), np.int64)
    largest = largest_scores(data, indptr)
    search_words(data, indices, indptr, largest, words, first, topk, scores, touched, best_rows, best, counts)
    assert not scores.any(), "the workspace was not cleaned"
    return [list(zip(best_rows[q, :n].tolist(), best[q, :n].tolist(), strict=True)) for q, n in enumerate(counts)]


def expected(data, indices, indptr, rows, query, topk):
    scores = np.zeros(rows)
    for word in query:
        part = slice(indptr[word], indptr[word + 1])
        np.add.at(scores, indices[part], data[part].astype(float))
    order = np.lexsort((np.arange(rows), -scores))
    return [(int(row), float(scores[row])) for row in order[:topk] if scores[row] > 0]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 300),
    st.integers(1, 12),
    st.sampled_from([0.3, 1, 4]),
    st.integers(1, 320),
    st.data(),
)
def test_the_best_and_their_order(seed, rows, words, spread, topk, data):
    arrays = postings(seed, rows, words, spread)
    queries = data.draw(st.lists(st.lists(st.integers(0, words - 1), max_size=10), max_size=4))
    found = run(*arrays, rows, queries, topk)
    assert found == [expected(*arrays, rows, query, topk) for query in queries]


def test_few_of_many_with_common_words():
    arrays = postings(1, 20_000, 30, 3)
    queries = np.random.default_rng(2).integers(0, 30, (50, 9)).tolist()
    for topk in (1, 3, 50):
        assert run(*arrays, 20_000, queries, topk) == [expected(*arrays, 20_000, query, topk) for query in queries]
