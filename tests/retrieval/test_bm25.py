"""The streamed BM25 index: the same as bm25s', in blocks, never half-finished; and odd queries to it."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import namedtuple
from pathlib import Path

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1.errors import UserError
from searchr1.retrieval.index import bm25_build
from searchr1.retrieval.index.bm25_build import build_bm25
from searchr1.retrieval.index.bm25_index import Bm25Index

WORDS = ["river", "rivers", "the", "of", "été", "Straße", "İstanbul", "東京", "x2", "_y", "a", "it's", "?!", "👍", "\x00"]
passages = st.lists(st.sampled_from(WORDS), max_size=15).map(" ".join) | st.text(max_size=30)
FILES = {"data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy", "largest.npy", "params.index.json"}
FILES |= {"vocab.index.json"}


class Texts:
    """Passages as `Corpus` gives them."""

    path = Path("corpus.jsonl")

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def contents(self, start=0, stop=None):
        yield from self.texts[start:stop]


def zipf(rows, seed=0):
    rng = np.random.default_rng(seed)
    return Texts([" ".join(f"w{word}" for word in rng.zipf(1.3, 30) % 500) for _ in range(rows)])


def lists(index):
    """word -> (passages, scores)"""
    data, indices, indptr = (index.scores[name] for name in ("data", "indices", "indptr"))
    slices = {word: slice(indptr[number], indptr[number + 1]) for word, number in index.vocab_dict.items() if word}
    return {word: (indices[part].tolist(), data[part]) for word, part in slices.items()}


@settings(max_examples=80, deadline=None)
@given(
    st.lists(passages, min_size=1, max_size=30),
    st.sampled_from([None, "english"]),
    st.sampled_from([(20_000, 1 << 21, 1 << 25), (3, 1 << 21, 7), (20_000, 5, 1), (1, 1, 40)]),
)
def test_arrays_are_those_of_bm25s(texts, stemmer, limits):
    reducer = bm25_build.stemmer_of(stemmer)
    tokens = bm25s.tokenize(texts, stopwords=None, stemmer=reducer, show_progress=False)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        for constant, value in zip(("PASSAGES", "WORDS", "POSTINGS"), limits, strict=True):
            patch.setattr(bm25_build, constant, value)
        if not any(tokens.ids):
            with pytest.raises(UserError, match="has no words"):
                build_bm25(Texts(texts), Path(name), stemmer)
            assert not any(Path(name).iterdir())
            return
        build_bm25(Texts(texts), Path(name), stemmer)
        assert {file.name for file in Path(name).iterdir()} == FILES
        ours = bm25s.BM25.load(name, mmap=True)
        theirs = bm25s.BM25()
        theirs.index(tokens, show_progress=False)
        assert {key: getattr(ours, key) for key in ("k1", "b", "method")} == {"k1": 1.5, "b": 0.75, "method": "lucene"}
        assert ours.scores["num_docs"] == len(texts)
        assert ours.scores["indptr"].dtype == np.int64
        found, wanted = lists(ours), lists(theirs)
        assert found.keys() == wanted.keys()
        for word, (rows, scores) in wanted.items():
            assert found[word][0] == rows
            np.testing.assert_allclose(found[word][1], scores, rtol=1e-6)
        largest = np.load(Path(name) / "largest.npy")
        assert largest.tolist() == [found[word][1].max() for word in ours.vocab_dict]


def test_places_of_lists_beyond_two_billion_postings():
    heads = np.array([2**33, 2**34, 7])
    assert bm25_build.take_places(np.array([0, 0, 2], np.int32), heads).tolist() == [2**33, 2**33 + 1, 7]
    assert heads.tolist() == [2**33 + 2, 2**34, 8]


def test_blocks_are_bounded_by_words_and_progress_counts_every_passage(tmp_path, monkeypatch):
    monkeypatch.setattr(bm25_build, "WORDS", 100)
    monkeypatch.setattr(bm25_build, "PASSAGES", 7)
    told = []
    counted = bm25_build.count_words(Texts([*zipf(50).texts, *[""] * 20]), tmp_path, None, told.append)
    assert [max(told), sum(told)] == [7, 70]
    assert told[:12] == [4] * 12, "30 words each: four passages pass the limit of 100"
    assert all(np.load(path).shape[1] <= 4 * 30 for path in counted.blocks)


def test_a_killed_build_leaves_the_older_index_as_it_was(tmp_path):
    build_bm25(zipf(60), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    script = (
        "import os, signal, sys, numpy as np; from pathlib import Path; from searchr1.retrieval.index import bm25_build\n"
        "class Texts:\n"
        "    def __len__(self): return 100_000\n"
        "    def contents(self, start=0, stop=None): return ('one two' for _ in range(start, stop or 100_000))\n"
        "bm25_build.build_bm25(Texts(), Path(sys.argv[1]), None, lambda rows: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    child = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60, check=False)
    assert child.returncode == -signal.SIGKILL
    assert (tmp_path / "scratch").is_dir(), "it was killed in the middle"
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    build_bm25(zipf(60), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


class Stopped(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.mark.parametrize("renamed", range(len(FILES)))
def test_no_moment_of_the_renaming_leaves_a_mixed_folder(tmp_path, renamed):
    replace, left = os.replace, renamed

    def stop_after(source, target):
        nonlocal left
        if left == 0:
            raise Stopped
        left -= 1
        replace(source, target)

    build_bm25(zipf(60), tmp_path)
    with pytest.MonkeyPatch.context() as patch:  # for the build only: numba renames files too
        patch.setattr(os, "replace", stop_after)
        with pytest.raises(Stopped):
            build_bm25(zipf(80, seed=1), tmp_path)
    assert not (tmp_path / "scratch").exists()
    with pytest.raises(FileNotFoundError, match=r"params\.index\.json"):
        bm25s.BM25.load(str(tmp_path), mmap=True)
    build_bm25(zipf(80, seed=1), tmp_path)
    assert Bm25Index.load(tmp_path).rows == 80


def test_a_mapped_index_survives_being_replaced(tmp_path):
    build_bm25(zipf(3000), tmp_path)
    index = Bm25Index.load(tmp_path)
    assert all(isinstance(array, np.memmap) for array in index._lists), "copied, not mapped"
    queries = [f"w{number} w1 w2" for number in range(0, 500, 5)]
    before = index.search(queries, 5)
    build_bm25(zipf(20, seed=1), tmp_path)
    assert index.search(queries, 5) == before
    assert Bm25Index.load(tmp_path).rows == 20


def test_too_little_room_is_reported_before_the_work(tmp_path, monkeypatch):
    corpus = zipf(3000)
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2**20))
    monkeypatch.setattr(bm25_build, "count_words", lambda *_: pytest.fail("began in spite of it"))
    with pytest.raises(UserError, match=rf"--save_dir {tmp_path}: the index needs about 1 MiB .* 1 MiB are free"):
        build_bm25(corpus, tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_guess_is_near_the_truth(tmp_path, monkeypatch):
    corpus = zipf(5000)
    build_bm25(corpus, tmp_path)
    postings = np.load(tmp_path / "indptr.csc.index.npy")[-1]
    usage = namedtuple("Usage", "total used free")
    for share, enough in ((0.95, False), (1.05, True)):
        free = int(postings * bm25_build.POSTING_BYTES * share)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(0, 0, free))
        if enough:
            bm25_build.check_room(corpus, tmp_path)
        else:
            with pytest.raises(UserError, match="make room"):
                bm25_build.check_room(corpus, tmp_path)


@pytest.mark.parametrize(("limit", "where"), [(8_000, "write_block"), (200_000, "reserve")])
def test_a_write_that_the_system_rejects(tmp_path, monkeypatch, limit, where):
    """As on a full disk."""
    monkeypatch.setattr(bm25_build, "PASSAGES", 500)  # small blocks: of about 100 kB each
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .* make room") as caught:
            build_bm25(zipf(4000), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert where in [frame.name for frame in traceback.extract_tb(caught.value.__cause__.__traceback__)]
    assert not any(tmp_path.iterdir())


def test_lists_hold_their_space_before_they_are_written(tmp_path):
    array = bm25_build.reserve(tmp_path / "list.npy", np.float32, 1 << 20)
    assert (tmp_path / "list.npy").stat().st_blocks * 512 >= 4 << 20, "a mapped write to a full disk would kill the process"
    assert np.load(tmp_path / "list.npy", mmap_mode="r").shape == array.shape == (1 << 20,)


ODD = ["", " ", "\x00\x01\x1b[31m", "👍👍", "?!", "\ud800 alone", "w" * 4096, "w1 " * 1365, "nothing", "\u2028w1\u2029"]


def test_odd_queries(tmp_path):
    build_bm25(zipf(300), tmp_path)
    index = Bm25Index.load(tmp_path)
    found = dict(zip(ODD, index.search(ODD, 10_000), strict=True))
    known = index.search(["w1"], 10_000)[0]
    assert 0 < len(known) <= 300
    assert found["\u2028w1\u2029"] == known
    often = found["w1 " * 1365]
    assert [row for row, _ in often] == [row for row, _ in known]
    np.testing.assert_allclose([score for _, score in often], [1365 * score for _, score in known], rtol=1e-3)
    assert {query for query in ODD if found[query]} == {"w1 " * 1365, "\u2028w1\u2029"}


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters() | st.sampled_from("w0123 "), max_size=200), st.integers(1, 400))
def test_any_text_is_a_query(built, query, topk):
    hits = built.search([query], topk)[0]
    tokens = bm25s.tokenize([query], stopwords=None, return_ids=False, show_progress=False)[0]
    assert len(hits) <= topk
    assert bool(hits) == any(token in built._vocabulary for token in tokens)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bm25")
    build_bm25(zipf(300), folder)
    return Bm25Index.load(folder)
