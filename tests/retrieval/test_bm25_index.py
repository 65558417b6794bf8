"""Our search against bm25s' own, on its own index."""

from __future__ import annotations

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1.errors import UserError
from searchr1.retrieval.index.bm25_index import Bm25Index

WORDS = ["river", "mountain", "the", "of", "été", "Straße", "東京", "x2", "a", "it's"]
texts = st.lists(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join), min_size=1, max_size=25)


def bm25s_search(retriever, query, rows):
    """All scores of bm25s, one query at a time."""
    tokens = bm25s.tokenize([query], stopwords=None, show_progress=False, return_ids=False)[0]
    known = [token for token in tokens if token in retriever.vocab_dict]
    scores = retriever.get_scores(known) if known else np.zeros(rows)
    order = np.lexsort((np.arange(rows), -scores))
    return [(int(row), float(scores[row])) for row in order if scores[row] > 0]


@settings(max_examples=60, deadline=None)
@given(texts, st.lists(st.lists(st.sampled_from([*WORDS, "unknown"]), max_size=8).map(" ".join), max_size=4))
def test_scores_are_those_of_bm25s(passages, queries):
    if not any(len(word) > 1 for text in passages for word in text.split()):
        return  # bm25s refuses a corpus without words
    index = Bm25Index.build(passages)
    for query, hits in zip(queries, index.search(queries, 100), strict=True):
        wanted = bm25s_search(index._retriever, query, len(passages))
        assert sorted(row for row, _ in hits) == sorted(row for row, _ in wanted)
        assert np.allclose([score for _, score in hits], [score for _, score in wanted], atol=1e-5)
        for topk in (1, 3):
            assert index.search([query], topk) == [hits[:topk]]


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_batches_change_nothing(tmp_path, threads):
    rng = np.random.default_rng(0)
    passages = [" ".join(f"w{word}" for word in rng.zipf(1.3, 30) % 500) for _ in range(400)]
    queries = [" ".join(f"w{word}" for word in rng.zipf(1.3, 6) % 600) for _ in range(200)]
    Bm25Index.build(passages).save(tmp_path)
    index = Bm25Index.load(tmp_path, threads=threads)
    together = index.search(queries, 5)
    assert together == [index.search([query], 5)[0] for query in queries]
    assert together == Bm25Index.build(passages).search(queries, 5)


def test_an_index_of_another_method_is_rejected(tmp_path):
    retriever = bm25s.BM25(method="robertson")
    retriever.index(bm25s.tokenize(["one two", "two three"], show_progress=False), show_progress=False)
    retriever.save(str(tmp_path), show_progress=False)
    with pytest.raises(UserError, match="its method is robertson"):
        Bm25Index.load(tmp_path)


def test_files_that_do_not_belong_together_are_rejected(tmp_path):
    for name, message in (("indices.csc.index.npy", "do not belong together"), ("largest.npy", "is of another index")):
        Bm25Index.build(["one two", "two three four"]).save(tmp_path)
        Bm25Index.load(tmp_path)
        np.save(tmp_path / name, np.load(tmp_path / name)[:-1])
        with pytest.raises(UserError, match=message):
            Bm25Index.load(tmp_path)


def test_texts_without_words_are_reported():
    with pytest.raises(UserError, match="has no words"):
        Bm25Index.build(["", "? !"])


def test_nowhere_to_keep_compiled_code_is_reported(monkeypatch):
    import sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name == "searchr1.retrieval.index.bm25_kernel":
                raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.delitem(sys.modules, "searchr1.retrieval.index.bm25_kernel", raising=False)
    monkeypatch.delattr("searchr1.retrieval.index.bm25_kernel", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Blocked(), *sys.meta_path])
    with pytest.raises(UserError, match="NUMBA_CACHE_DIR"):
        Bm25Index.build(["one two"])
