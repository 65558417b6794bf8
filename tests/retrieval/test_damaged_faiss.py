"""Damaged and hostile FAISS files and vectors: named, or harmless, and never the end of the process."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
import sys

import faiss
import numpy as np
import pytest
from support.bit_flips import flip
from support.older_index import without_sums

from searchr1.commands import build_index as build
from searchr1.commands.retrieval_server import parse
from searchr1.errors import UserError
from searchr1.retrieval.encode.embed import open_embedding
from searchr1.retrieval.index import build as index_build
from searchr1.retrieval.index import faiss_files
from searchr1.retrieval.index.corpus import Corpus
from searchr1.retrieval.index.dense import DenseIndex, build_faiss
from searchr1.retrieval.index.faiss_files import probe, read_faiss
from searchr1.retrieval.index.faiss_types import FaissType
from searchr1.retrieval.index.flat import Refiner
from searchr1.retrieval.index.index_check import check_index
from searchr1.retrieval.index.manifest import DamagedIndex, Manifest, open_manifest
from searchr1.retrieval.index.manifest import index_error as user_error
from searchr1.retrieval.index.verify import check_index as verify
from searchr1.retrieval.searcher import SearchFailed
from searchr1.retrieval.server.load import load_index

ROWS, DIMENSION = 600, 16
FACTORIES = ("Flat", "HNSW8,Flat", "IVF8,Flat", "IVF8,SQ8", "IVF8,PQ8x4fs")


class Vectors:
    """An encoder whose texts are numbers of rows."""

    dimension = DIMENSION

    def __init__(self, vectors):
        self.vectors = vectors

    def encode(self, texts, role):
        return self.vectors[[int(text) for text in texts]]


def vectors():
    found = np.random.default_rng(0).standard_normal((ROWS, DIMENSION))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with an index of each kind."""
    folder = tmp_path_factory.mktemp("made")
    for number, factory in enumerate(FACTORIES):
        out = folder / str(number)
        out.mkdir()
        lossy = factory.endswith(("SQ8", "fs"))
        faiss.write_index(build_faiss(vectors(), FaissType(factory, lossy)), str(out / "e5.index"))
        if lossy:
            vectors().astype(np.float16).tofile(out / "vectors.f16")
        manifest = Manifest(
            "dense", ROWS, "0" * 64, encoder="e5", dimension=DIMENSION, metric="inner product", factory=factory,
            file="e5.index", vectors="vectors.f16" if lossy else None, refine_factor=4 if lossy else None,
        )  # fmt: skip
        index_build.finish(out, manifest)
    return folder


def copy(made, tmp_path, factory):
    shutil.copytree(made / str(FACTORIES.index(factory)), tmp_path / "index")
    return tmp_path / "index"


def start(folder):
    """What a server does before it uses an index."""
    try:
        return check_index(folder, open_manifest(folder), "e5")
    except DamagedIndex as error:
        raise user_error(error) from error


@pytest.mark.parametrize("factory", FACTORIES)
def test_every_flipped_bit_is_named(made, tmp_path, factory):
    folder, chance = copy(made, tmp_path, factory), random.Random(0)
    names = sorted(file.name for file in folder.iterdir())
    for number in range(60):
        path = folder / names[number % len(names)]
        before = path.read_bytes()
        flip(path, chance.randrange(8 * len(before)))
        assert [damage.path for damage in verify(folder)] == [path]
        with pytest.raises(UserError, match=rf"--index_path .*/{path.name}: .*; copy the index again, or build it again"):
            start(folder)
        path.write_bytes(before)
    assert list(verify(folder)) == []
    start(folder)


FLIPS_IN_A_PROCESS = """
import json, random, sys
from pathlib import Path
import faiss
import numpy as np
from searchr1.retrieval.index.dense import DenseIndex
from searchr1.retrieval.index.faiss_files import read_faiss
from searchr1.retrieval.index.manifest import DamagedIndex
from searchr1.retrieval.index.flat import Refiner
from searchr1.retrieval.searcher import SearchFailed
from searchr1.retrieval.index.index_check import open_vectors

faiss.omp_set_num_threads(1)
rows, dimension = int(sys.argv[1]), int(sys.argv[2])
queries = np.random.default_rng(3).standard_normal((20, dimension)).astype(np.float32)

def search(folder):
    index = read_faiss(folder / "e5.index")
    if index.d != dimension or index.ntotal != rows:
        raise DamagedIndex(folder, "is of another shape, which the server refuses")
    vectors = folder / "vectors.f16"
    refiner = Refiner(open_vectors(vectors, rows, dimension)) if vectors.exists() else None
    return DenseIndex(index, None, refiner, 4).search_vectors(queries, 9)

def flip_all(folder):
    wanted = search(folder)[1].tolist()
    chance, refused, changed = random.Random(2), 0, 0
    paths = [path for path in sorted(folder.iterdir()) if path.suffix != ".json"]
    for number in range(150):
        path = paths[number % len(paths)]
        before = path.read_bytes()
        size = 8 * len(before)
        # A third each: at the beginning, at the end (headers, and what belongs to the search), anywhere.
        bit = (chance.randrange(1600), size - 1 - chance.randrange(1600), chance.randrange(size))[number % 3]
        content = bytearray(before)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            scores, found = search(folder)
            assert ((found >= -1) & (found < rows)).all()
            assert np.isfinite(scores[found >= 0]).all()
            changed += found.tolist() != wanted
        except (DamagedIndex, SearchFailed):
            refused += 1
        except RuntimeError as error:
            assert "faiss" in str(error), error
            refused += 1
        path.write_bytes(before)
    return refused, changed

print(json.dumps([flip_all(Path(name)) for name in sys.argv[3:]]))
"""


def test_without_checksums_a_flipped_bit_never_ends_the_process(made, tmp_path):
    folders = [shutil.copytree(made / str(number), tmp_path / str(number)) for number in range(len(FACTORIES))]
    command = [sys.executable, "-c", FLIPS_IN_A_PROCESS, str(ROWS), str(DIMENSION), *map(str, folders)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    for refused, changed in json.loads(ended.stdout.splitlines()[-1]):
        assert refused > 5
        assert refused + changed < 150, "no harmless flip: the answers cannot have been compared"


def written(index, path):
    faiss.write_index(index, str(path))
    return path


def ivf(ids):
    index = faiss.index_factory(DIMENSION, "IVF8,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors())
    index.add_with_ids(vectors(), np.asarray(ids))
    return index


def with_ids(ids):
    index = faiss.index_factory(DIMENSION, "IDMap,Flat", faiss.METRIC_INNER_PRODUCT)
    index.add_with_ids(vectors(), np.asarray(ids))
    return index


def hnsw(**parameters):
    index = build_faiss(vectors(), FaissType("HNSW8,Flat", False))
    for name, value in parameters.items():
        setattr(index.hnsw, name, value)
    return index


def another_quantizer():
    index = ivf(range(ROWS))
    index.quantizer.reset()
    index.quantizer.add(vectors()[:5])
    return index


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        (lambda: ivf([*range(ROWS - 1), ROWS]), r"list \d has the rows \d+ to 600, of 600"),
        (lambda: ivf([*range(ROWS - 1), 2**62]), r"list \d has the rows"),
        (lambda: ivf([-2, *range(1, ROWS)]), r"list \d has the rows -2 to"),
        (lambda: with_ids([*range(ROWS - 1), ROWS]), "its row numbers go from 0 to 600"),
        (lambda: with_ids([-7, *range(1, ROWS)]), "its row numbers go from -7"),
        (lambda: hnsw(efSearch=0), "its efSearch is 0"),
        (lambda: hnsw(efSearch=-5), "its efSearch is -5"),
        (lambda: hnsw(efSearch=2**30), "its efSearch is 1073741824"),
        (lambda: hnsw(entry_point=ROWS), "not readable as a FAISS index"),
        (another_quantizer, "a part of it has 5 vectors x 16 instead of 8 x 16"),
        (lambda: faiss.index_factory(DIMENSION, "IVF8,Flat"), "it is not trained"),
        (lambda: faiss.index_factory(DIMENSION, "SQ8"), "it is not trained"),
    ],
)
def test_files_that_faiss_reads_but_would_go_astray_in(tmp_path, index, problem):
    path = written(index(), tmp_path / "e5.index")
    with pytest.raises(DamagedIndex, match=problem):
        read_faiss(path)
    assert next(iter(verify(tmp_path))).path == path


def header(rows, dimension, numbers, metric=0):
    return struct.pack("<4siqqqBiQ", b"IxFI", dimension, rows, 1 << 20, 1 << 20, 1, metric, numbers)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (header(2**40, 16, 2**44) + b"\0" * 64, "has 109 bytes instead of"),
        (header(2**62, 16, 2**63) + b"\0" * 64, "is damaged: its header says"),
        (header(1, 16, 17) + b"\0" * 68, "is damaged: its header says 1 vectors x 16, and 17 numbers"),
        (header(-1, 16, 2**64 - 16) + b"\0" * 64, "is damaged: its header says -1 vectors"),
        (header(1, -16, 2**64 - 16) + b"\0" * 64, "is damaged: its header says 1 vectors x -16"),
        (header(1, 2**30, 2**30) + b"\0" * 64, "is damaged: its header says"),
        (header(2, 16, 32) + b"\0" * 127, "has 172 bytes instead of 173"),
        (header(2, 16, 32) + b"\0" * 129, "has 174 bytes instead of 173"),
        (header(0, 0, 0)[:20], "less than the header"),
        (b"", "is not readable as a FAISS index"),
        (b"IwFl" + b"\xff" * 500, "is not readable as a FAISS index"),
        (b"null", "is damaged: a part is missing|is not readable as a FAISS index"),
        (b"\x80\x04\x95" * 40, "is not readable as a FAISS index"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 12\n", "is a Git LFS pointer"),
        (b"PK\x03\x04" + b"\0" * 4000, "is not readable as a FAISS index"),
    ],
)
def test_files_that_are_none(tmp_path, content, problem):
    path = tmp_path / "e5_Flat.index"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"--index_path .*e5_Flat.index: .*({problem})"):
        check_index(path, None, "e5")
    assert [damage.path for damage in verify(tmp_path)] == [path]


def test_lists_that_claim_more_than_the_file_take_no_memory(tmp_path):
    path = written(ivf(range(ROWS)), tmp_path / "e5.index")
    content = path.read_bytes()
    place = content.index(b"ilar") + 4 + 8 + 8 + 4 + 8  # nlist, code_size, "full", how many sizes
    assert sum(struct.unpack_from("<8Q", content, place)) == ROWS
    for size in (2**20, 2**40, 2**63):
        path.write_bytes(content[:place] + struct.pack("<8Q", *[size] * 8) + content[place + 64 :])
        with pytest.raises(DamagedIndex, match="is not readable as a FAISS index"):
            probe(path)


def test_a_process_that_dies_or_hangs_over_a_file(tmp_path, monkeypatch):
    path = written(hnsw(), tmp_path / "e5.index")
    probe(path)
    program = tmp_path / "program"
    monkeypatch.setattr(faiss_files.sys, "executable", str(program))
    monkeypatch.setattr(faiss_files, "PROBE_S", 0.3)
    for script, problem in (
        ("kill -SEGV $$", "a process that read and searched it died of SIGSEGV"),
        ("kill -KILL $$", "died of SIGKILL"),
        ("exec sleep 60", "did not finish reading and searching it in 0 s"),
        ("echo no memory >&2; exit 1", r"could not be read in a process of its own \(no memory\)"),
    ):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        with pytest.raises(DamagedIndex, match=problem):
            probe(path)


def test_vectors_that_are_no_numbers_are_never_found_and_reported_once(tmp_path, capsys):
    spoiled = vectors()
    spoiled[3], spoiled[500, 2] = np.nan, np.inf
    flat = faiss.IndexFlatIP(DIMENSION)
    flat.add(spoiled)
    index = DenseIndex(read_faiss(written(flat, tmp_path / "e5.index")), Vectors(vectors()))
    exact = vectors() @ vectors()[[1, 3, 500]].T
    exact[[3, 500]] = -np.inf
    for hits, scores in zip(index.search(["1", "3", "500"], ROWS), exact.T, strict=True):
        assert [row for row, _ in hits] == np.argsort(-scores, kind="stable")[: ROWS - 2].tolist()
    assert [row for row, _ in index.search(["1"], 3)[0]] == np.argsort(-exact[:, 0], kind="stable")[:3].tolist()
    said = capsys.readouterr().out
    assert said.count("has no finite score, so it is not found") == 1


def test_a_query_without_a_finite_vector_finds_nothing(tmp_path, capsys):
    queries = vectors()
    queries[3] = np.nan
    flat = faiss.IndexFlatIP(DIMENSION)
    flat.add(vectors())
    index = DenseIndex(read_faiss(written(flat, tmp_path / "e5.index")), Vectors(queries))
    found = index.search(["1", "3"], 5)
    assert found[0][0][0] == 1
    assert found[1] == []
    assert "the encoder gives no finite vector for a query" in capsys.readouterr().out


def test_exact_vectors_that_are_no_numbers_are_never_found():
    spoiled = vectors().astype(np.float16)
    spoiled[3] = np.nan
    scores, rows = Refiner(spoiled).refine(vectors()[[1, 3]], np.tile(np.arange(9), (2, 1)), 9)
    assert (rows[scores == -np.inf] == 3).all()
    assert np.isfinite(scores[:, :8]).all()


def test_a_row_that_does_not_exist_is_an_error(tmp_path):
    index = DenseIndex(read_faiss(written(hnsw(), tmp_path / "e5.index")), Vectors(vectors()))

    class Astray:
        ntotal = ROWS

        def search(self, queries, count):
            return np.zeros((len(queries), count), np.float32), np.full((len(queries), count), ROWS)

    index._index = Astray()
    with pytest.raises(SearchFailed, match="the index is damaged: it finds passage 600 of 600; run searchr1 verify"):
        index.search(["1"], 3)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, encoder_path):
    """(corpus, index folder) with its embeddings"""
    folder = tmp_path_factory.mktemp("embedded")
    with (folder / "corpus.jsonl").open("w") as file:
        file.writelines(json.dumps({"id": str(row), "contents": f"w{row} w{row + 1}"}) + "\n" for row in range(40))
    assert build.main([*command(folder, folder / "index", encoder_path), "--save_embedding"]) == 0
    return folder / "corpus.jsonl", folder / "index"


def command(folder, out, encoder_path):
    words = ["--corpus_path", str(folder / "corpus.jsonl"), "--save_dir", str(out), "--retriever_name", "e5"]
    return [*words, "--retriever_model", encoder_path]


def test_an_index_that_is_no_longer_searched_by_inner_product(embedded, tmp_path, encoder_path):
    corpus, folder = embedded
    shutil.copytree(folder, tmp_path / "index")
    without_sums(tmp_path / "index")
    with (tmp_path / "index" / "e5_Flat.index").open("r+b") as file:
        file.seek(33)
        file.write(struct.pack("<i", 1))
    words = ["--index_path", str(tmp_path / "index"), "--corpus_path", str(corpus), "--retriever_name", "e5"]
    with pytest.raises(UserError, match="is not searched by inner product, as built"):
        load_index(parse([*words, "--retriever_model", encoder_path]), Corpus(corpus))


def test_an_embedding_that_was_moved_away_is_not_needed_to_serve(embedded, tmp_path):
    shutil.copytree(embedded[1], tmp_path / "index")
    (tmp_path / "index" / "emb_e5.memmap").unlink()
    start(tmp_path / "index")
    assert [damage.path.name for damage in verify(tmp_path / "index")] == ["emb_e5.memmap"]


def test_modules_of_the_working_directory_are_not_run(made, tmp_path, monkeypatch):
    folder = copy(made, tmp_path, "HNSW8,Flat")
    for name in ("faiss", "numpy", "json", "resource", "searchr1"):
        (folder / f"{name}.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(folder)
    start(folder)
    assert not (folder / "ran").exists()


def test_embeddings_that_changed_since_they_were_saved(embedded, tmp_path):
    corpus, folder = embedded

    class Encoder:
        dimension = 32

    shutil.copytree(folder, tmp_path / "index")
    flip(tmp_path / "index" / "emb_e5.memmap", 1000)
    with pytest.raises(UserError, match=r"--embedding_path .*emb_e5.memmap: has changed since it was written"):
        open_embedding(tmp_path / "index" / "emb_e5.memmap", Corpus(corpus), Encoder())


def test_an_unfinished_build_goes_on_only_from_what_is_still_there(embedded, tmp_path, encoder_path, monkeypatch, capsys):
    corpus, folder = embedded
    words = command(corpus.parent, tmp_path / "index", encoder_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index_build, "write_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build.main(words)
    flip(tmp_path / "index" / "e5_Flat.index", 8 * 1000)
    capsys.readouterr()
    assert build.main(words) == 0
    assert "part 0 has changed since it was written; it is made again" in capsys.readouterr().out
    assert (tmp_path / "index" / "e5_Flat.index").read_bytes() == (folder / "e5_Flat.index").read_bytes()


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "\0", ""])
def test_an_unfinished_build_whose_plan_is_damaged(embedded, tmp_path, encoder_path, content):
    (tmp_path / "index" / "embedding").mkdir(parents=True)
    (tmp_path / "index" / "embedding" / "plan.json").write_text(content)
    for more in ([], ["--overwrite"]):
        with pytest.raises(
            UserError, match=r"its unfinished index is damaged \(plan.json: .*remove .*embedding to start anew"
        ):
            build.main([*command(embedded[0].parent, tmp_path / "index", encoder_path), *more])
