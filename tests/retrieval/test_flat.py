"""Exact search against numpy's, over blocks, types and ties."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1.retrieval.index import flat
from searchr1.retrieval.index.flat import FlatSearch


def expected(vectors, queries, topk):
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :topk]
    return np.take_along_axis(scores, rows, 1), rows


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 60),
    queries=st.integers(0, 9),
    topk=st.integers(1, 70),
    block=st.integers(1, 64),
    at_once=st.integers(1, 9),
)
def test_as_numpy_whatever_the_blocks(rows, queries, topk, block, at_once):
    rng = np.random.default_rng(rows * 1000 + queries)
    vectors, asked = rng.standard_normal((rows, 8)).astype("f4"), rng.standard_normal((queries, 8)).astype("f4")
    before = flat.BLOCK_ROWS, flat.QUERIES_AT_ONCE
    flat.BLOCK_ROWS, flat.QUERIES_AT_ONCE = block, at_once
    try:
        scores, found = FlatSearch(vectors).search(asked, topk)
    finally:
        flat.BLOCK_ROWS, flat.QUERIES_AT_ONCE = before
    wanted_scores, wanted = expected(vectors, asked, topk)
    assert found.tolist() == wanted.tolist()
    np.testing.assert_allclose(scores, wanted_scores, atol=1e-5)


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_mapped_files_of_both_types(tmp_path, dtype):
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((500, 16)).astype(dtype)
    vectors.tofile(tmp_path / "vectors")
    mapped = np.memmap(tmp_path / "vectors", dtype=dtype, mode="r", shape=(500, 16))
    asked = rng.standard_normal((3, 16)).astype("f4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, found = FlatSearch(mapped).search(asked, 5)
    assert found.tolist() == expected(vectors, asked, 5)[1].tolist()


def test_equal_scores_come_in_order_of_rows():
    vectors = np.ones((6, 4), dtype="f4")
    vectors[3] *= 2
    assert FlatSearch(vectors).search(np.ones((1, 4), dtype="f4"), 6)[1].tolist() == [[3, 0, 1, 2, 4, 5]]
