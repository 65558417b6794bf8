"""FAISS indexes searched as the server does, beside FAISS' own search and NumPy."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from searchr1.errors import UserError
from searchr1.retrieval.index.dense import DenseIndex, build_faiss, load_faiss, set_search_parameters
from searchr1.retrieval.index.faiss_types import NAMES, faiss_type, is_lossy, list_count
from searchr1.retrieval.index.flat import Refiner
from searchr1.retrieval.index.index_check import open_vectors

ROWS, DIMENSION = 3000, 32


class Vectors:
    """An encoder whose texts are numbers of rows."""

    dimension = DIMENSION

    def __init__(self, vectors):
        self.vectors = vectors

    def encode(self, texts, role):
        assert role == "query"
        return self.vectors[[int(text) for text in texts]]


def unit(array):
    return (array / np.linalg.norm(array, axis=1, keepdims=True)).astype("f4")


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, DIMENSION))
    found = unit(centres[rng.integers(0, 40, ROWS)] + 0.7 * rng.standard_normal((ROWS, DIMENSION)))
    path = tmp_path_factory.mktemp("vectors") / "vectors.f16"
    found.astype(np.float16).tofile(path)
    return open_vectors(path, ROWS, DIMENSION)


@pytest.fixture(scope="module")
def queries():
    return unit(np.random.default_rng(1).standard_normal((70, DIMENSION)))


def exact(vectors, queries, topk):
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :topk]
    return np.take_along_axis(scores, rows, 1), rows


def load(tmp_path, vectors, name, **parameters):
    kind = faiss_type(name, ROWS, DIMENSION)
    faiss.write_index(build_faiss(vectors, kind), str(tmp_path / "index"))
    index = load_faiss(tmp_path / "index", DIMENSION)
    set_search_parameters(index, parameters.get("nprobe", kind.nprobe), kind.ef_search)
    refiner = Refiner(vectors) if kind.lossy else None
    return DenseIndex(index, Vectors(unit(vectors.astype("f4"))), refiner, parameters.get("refine", kind.refine_factor))


@pytest.mark.parametrize("name", [*NAMES, "IVF16,SQ8", "PQ16x4fs", "OPQ16,IVF16,PQ16x4fs"])
def test_every_type_with_all_its_candidates_is_exact(tmp_path, vectors, queries, name):
    index = load(tmp_path, vectors, name, nprobe=10_000 if "IVF" in name else None, refine=ROWS)
    scores, rows = index.search_vectors(queries, 5)
    wanted_scores, wanted = exact(vectors, queries, 5)
    assert np.mean(rows == wanted) > (0.95 if name == "HNSW" else 0.999)
    if name != "HNSW":
        np.testing.assert_allclose(scores, wanted_scores, atol=1e-5)


@pytest.mark.parametrize("name", ["IVF", "IVFPQ"])
def test_lists_chosen_by_us_are_those_that_faiss_chooses(tmp_path, vectors, queries, name):
    index = load(tmp_path, vectors, name, nprobe=5, refine=4)
    found = index.search_vectors(queries, 3)
    assert index._lists is not None
    index._lists = None
    for ours, theirs in zip(found, index.search_vectors(queries, 3), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_default_settings_find_nearly_all(tmp_path, vectors, queries):
    index = load(tmp_path, vectors, "IVFPQ")
    found, wanted = index.search_vectors(queries, 3)[1], exact(vectors, queries, 3)[1]
    assert np.mean([len(set(a) & set(b)) / 3 for a, b in zip(found.tolist(), wanted.tolist(), strict=True)]) > 0.75
    assert index.search(["17", "3"], 1)[0][0][0] == 17
    assert index.search([], 3) == []
    assert len(index.search(["1"], 10 * ROWS)[0]) <= ROWS


def test_an_index_is_the_same_for_the_same_seed(vectors):
    kind = faiss_type("IVFPQ", ROWS, DIMENSION)
    one, two, other = (faiss.serialize_index(build_faiss(vectors, kind, seed)).tobytes() for seed in (0, 0, 1))
    assert one == two
    assert len(other) == len(one)


def test_rows_that_faiss_does_not_find_are_left_out(vectors):
    refiner = Refiner(vectors)
    scores, rows = refiner.refine(unit(np.ones((1, DIMENSION))), np.array([[4, -1, 9, -1]]), 3)
    assert set(rows[0, :2]) == {4, 9}
    assert rows[0, 2] == -1
    assert scores[0, 2] == -np.inf


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_refined_scores_are_exact(tmp_path, vectors, queries, dtype):
    path = tmp_path / ("vectors.f16" if dtype == np.float16 else "vectors.f32")
    vectors.astype(dtype).tofile(path)
    candidates = np.random.default_rng(2).integers(0, ROWS, (len(queries), 50))
    scores, rows = Refiner(open_vectors(path, ROWS, DIMENSION)).refine(queries, candidates, 7)
    for q in range(len(queries)):
        values = vectors[candidates[q]].astype(np.float64) @ queries[q]
        order = np.lexsort((candidates[q], -values))[:7]
        np.testing.assert_allclose(scores[q], values[order], atol=1e-5)
        assert rows[q, 0] == candidates[q, order[0]]


@pytest.mark.parametrize(("rows", "lists"), [(10, 1), (3000, 75), (1_000_000, 4096), (21_015_324, 16384)])
def test_number_of_lists(rows, lists):
    assert list_count(rows) == lists


@pytest.mark.parametrize(
    ("factory", "lossy"),
    [("Flat", False), ("IVF64,Flat", False), ("HNSW32,Flat", False), ("SQ8", True), ("IVF64,PQ8x4fs", True)],
)
def test_which_types_round_their_vectors(factory, lossy):
    assert is_lossy(factory) is lossy


def test_damaged_files_and_missing_gpus_are_reported(tmp_path, vectors):
    (tmp_path / "index").write_bytes(b"IxFI" + b"\x00" * 20)
    with pytest.raises(UserError, match="index: has 24 bytes, less than the header of a FAISS index"):
        load_faiss(tmp_path / "index", DIMENSION)
    faiss.write_index(build_faiss(vectors, faiss_type("Flat", ROWS, DIMENSION)), str(tmp_path / "index"))
    with pytest.raises(UserError, match="32 dimensions, --retriever_model gives 7"):
        load_faiss(tmp_path / "index", 7)
    if not hasattr(faiss, "StandardGpuResources"):
        with pytest.raises(UserError, match="--faiss_gpu: this FAISS is the CPU build"):
            load_faiss(tmp_path / "index", DIMENSION, gpu=True)
    with pytest.raises(UserError, match="--faiss_type PQ7"):
        build_faiss(vectors, faiss_type("PQ7", ROWS, DIMENSION))


@pytest.mark.parametrize(
    ("factory", "nprobe"),
    [("IVF16,Flat", 8), ("IVF4(PQ4),Flat", 4), ("IVF1024_HNSW32,SQ8", 36), ("OPQ16,IVF64k,PQ16x4fs", 2340), ("Flat", None)],
)
def test_lists_that_are_searched_for_any_factory_string(factory, nprobe):
    assert faiss_type(factory, ROWS, DIMENSION).nprobe == nprobe


@pytest.mark.parametrize("factory", ["HNSW32_SQ8", "PCA16,Flat", "SQbf16", "IVF64,RaBitQ", "OPQ16_64,IVF64,Flat"])
def test_more_types_that_round_their_vectors(factory):
    assert is_lossy(factory)
    assert faiss_type(factory, ROWS, DIMENSION).refine_factor > 1
