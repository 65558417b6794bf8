"""Damaged and hostile BM25 indexes: named before compiled code follows them."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from support.bit_flips import flip
from support.older_index import without_sums

from searchr1.commands import build_index as build
from searchr1.commands import retrieval_server as server_cli
from searchr1.errors import UserError
from searchr1.files.checksums import seal
from searchr1.retrieval.index import index_check
from searchr1.retrieval.index.bm25_index import Bm25Index
from searchr1.retrieval.index.corpus import Corpus
from searchr1.retrieval.index.index_check import check_index, files_of, state_of
from searchr1.retrieval.index.manifest import BM25_FILES, DamagedIndex, index_error, open_manifest
from searchr1.retrieval.index.verify import check_index as verify
from searchr1.retrieval.index.verify import checked_by
from searchr1.retrieval.server.load import load_index
from searchr1.retrieval.server.options import ServerOptions

DATA, INDICES, INDPTR, LARGEST, PARAMETERS, VOCABULARY = BM25_FILES
QUERIES = ["w1 w2 w3", "title w7", "w40 w41 w42 w43", "nothing", "w5 w5 w11", " ".join(f"w{n}" for n in range(1, 200))]
ROWS = 300


def write_corpus(path, rows=ROWS):
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for row in range(rows):
            text = " ".join(f"w{word}" for word in rng.zipf(1.3, 30) % 400)
            file.write(json.dumps({"id": str(row), "contents": f'"Title {row}"\n{text}'}) + "\n")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(corpus, index folder)"""
    folder = tmp_path_factory.mktemp("made")
    corpus = write_corpus(folder / "corpus.jsonl")
    assert build.main(["--corpus_path", str(corpus), "--save_dir", str(folder / "index"), "--retriever_name", "bm25"]) == 0
    return corpus, folder / "index"


@pytest.fixture
def index(tmp_path, made):
    """A copy that may be damaged."""
    shutil.copytree(made[1], tmp_path / "index")
    return tmp_path / "index"


def flags(**values):
    return ServerOptions(**{"retriever_name": "bm25", "threads": 1} | values)


def start(folder):
    """What a server does before it uses an index."""
    try:
        return check_index(folder, open_manifest(folder), "bm25")
    except DamagedIndex as error:
        raise index_error(error) from error


def test_every_flipped_bit_is_named(index):
    chance = random.Random(0)
    names = [*BM25_FILES, "manifest.json"]
    start(index)
    for number in range(200):
        path = index / names[number % len(names)]
        before = path.read_bytes()
        flip(path, chance.randrange(8 * len(before)))
        assert [damage.path for damage in verify(index)] == [path]
        with pytest.raises(UserError, match=rf"--index_path .*/{path.name}: .*; copy the index again, or build it again"):
            start(index)
        path.write_bytes(before)
    assert list(verify(index)) == []


FLIPS_IN_A_PROCESS = """
import json, random, sys
from pathlib import Path
from searchr1.errors import UserError
from searchr1.retrieval.index.bm25_index import Bm25Index

folder, queries, rows = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
wanted = Bm25Index.load(folder).search(queries, 50)
chance, refused, changed = random.Random(1), 0, 0
for number in range(200):
    path = sorted(folder.iterdir())[number % len(list(folder.iterdir()))]
    before = path.read_bytes()
    content = bytearray(before)
    # Every second one at the beginning, where the headers are.
    bit = chance.randrange(8 * (len(before) if number % 2 else min(len(before), 120)))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    try:
        found = Bm25Index.load(folder).search(queries, 50)
        assert all(0 <= row < rows and score > 0 for hits in found for row, score in hits)
        changed += found != wanted
    except UserError as error:
        assert path.name in str(error) or "its method is" in str(error) or "its idf_method is" in str(error), (path, error)
        refused += 1
    path.write_bytes(before)
print(json.dumps([refused, changed]))
"""


def test_without_checksums_a_flipped_bit_never_ends_the_process(index):
    (index / "manifest.json").unlink()
    command = [sys.executable, "-c", FLIPS_IN_A_PROCESS, str(index), json.dumps(QUERIES), str(ROWS)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    refused, changed = json.loads(ended.stdout)
    assert refused > 100
    assert refused + changed < 200, "no harmless flip: the answers cannot have been compared"


def array(folder, name, change):
    """Write a changed array; the header is that of NumPy."""
    values = np.load(folder / name)
    np.save(folder / name, change(values))


def put(place, value):
    def change(values):
        values[place] = value
        return values

    return change


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        (INDICES, put(5, ROWS), "names a passage that does not exist at entry 5 (300)"),
        (INDICES, put(0, -1), "names a passage that does not exist at entry 0 (-1)"),
        (INDICES, put(-1, 2**31 - 1), "names a passage that does not exist"),
        (INDICES, lambda values: values[::-1].copy(), "is out of order"),
        (INDICES, lambda values: values[:-1], "its files do not belong together"),
        (INDICES, lambda values: values.astype(np.int16), "is not an array of <i4 or <i8 in one dimension"),
        (INDICES, lambda values: values.astype(">i4"), "is not an array of <i4 or <i8 in one dimension"),
        (INDICES, lambda values: values.reshape(1, -1), "is not an array of <i4 or <i8 in one dimension"),
        (INDICES, lambda values: np.asfortranarray(np.stack([values, values])), "is not an array of <i4 or <i8"),
        (INDICES, lambda values: values[:0], "is empty"),
        (DATA, put(7, np.nan), "entry 7 (nan) is not a score of BM25"),
        (DATA, put(7, np.inf), "entry 7 (inf) is not a score of BM25"),
        (DATA, put(7, 0), "entry 7 (0.0) is not a score of BM25"),
        (DATA, put(7, -1), "entry 7 (-1.0) is not a score of BM25"),
        (DATA, put(7, 1000), "entry 7 (1000.0) is not a score of BM25"),
        (DATA, lambda values: values.astype(object), "is not an array of <f4 or <f8"),
        (INDPTR, put(3, 10**12), "the list of word 3 ends before it begins"),
        (INDPTR, put(3, -5), "the list of word 2 ends before it begins"),
        (INDPTR, put(0, 1), "does not cover"),
        (INDPTR, put(-1, 1), "does not cover"),
        (INDPTR, lambda values: np.append(values, values[-1] + 100), "does not cover"),
        (LARGEST, put(4, 0.001), "the largest score of word 4 is"),
        (LARGEST, put(4, np.nan), "the largest score of word 4 is"),
        (LARGEST, lambda values: values[:-1], "it is of another index"),
    ],
)
def test_arrays_that_lead_astray(index, name, change, problem):
    array(index, name, change)
    with pytest.raises(UserError) as caught:
        Bm25Index.load(index)
    assert problem in str(caught.value)
    assert f"--index_path {index / name}: " in str(caught.value)
    without_sums(index)
    assert [damage.path.name for damage in verify(index)] == [name]


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ("{'descr': '<i4', 'fortran_order': False, 'shape': (999999999999999999,), }\n", "bytes instead of"),
        ("{'descr': '<i4', 'fortran_order': False, 'shape': (" + "9" * 4000 + ",), }\n", "is not an array"),
        ("{'descr': '<i4', 'fortran_order': False, 'shape': (-1,), }\n", "is not an array"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (3,), }\n", "is not an array"),
        ("__import__('os').system('touch /tmp/run')\n", "is not an array"),
        ("(" * 9000, "is not an array"),
        ("", "is not an array"),
    ],
)
def test_headers_that_lie(index, header, problem):
    (index / INDICES).write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 12)
    with pytest.raises(UserError, match=problem):
        Bm25Index.load(index)


def words(**changed):
    return lambda vocabulary: vocabulary | changed


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda vocabulary: dict(list(vocabulary.items())[1:]), "words for .* lists"),
        (words(another=3), "words for .* lists"),
        (words(w1=10**6), "1000000 is not a number of a word"),
        (words(w1=-1), "-1 is not a number of a word"),
        (words(w1=True), "True is not a number of a word"),
        (words(w1=1.0), "1.0 is not a number of a word"),
        (words(w1=10**40), "is not a number of a word"),
        (words(w1="0"), "'0' is not a number of a word"),
        (words(w1=[[]]), "is not a number of a word"),
        (lambda vocabulary: vocabulary | {"w1": vocabulary["w2"]}, "two words have the same number"),
        (lambda vocabulary: list(vocabulary), "does not hold what it should"),
    ],
)
def test_vocabularies_that_lead_astray(index, change, problem):
    path = index / VOCABULARY
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=problem):
        Bm25Index.load(index)


@pytest.mark.parametrize("name", [VOCABULARY, PARAMETERS, "manifest.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"{",
        b"",
        b"null",
        b"[]",
        b"3",
        b'{"num_docs": ' + b"9" * 5000 + b"}",
        b'{"a": "' + b"x" * (10 << 20) + b'"}',
        b"\xff\xfe",
        b"\x80\x04\x95",
    ],
    ids=["deep list", "deep object", "cut", "empty", "null", "list", "number", "giant number", "10 MB", "UTF-16", "pickle"],
)
def test_json_that_is_none_of_ours(index, name, content):
    (index / name).write_bytes(content)
    with pytest.raises(UserError, match=r"--index_path .*") as caught:
        start(index)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 600
    if name != "manifest.json":
        with pytest.raises(UserError, match=r"--index_path .*"):
            Bm25Index.load(index)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"num_docs": ROWS + 1}, r"params.index.json: has 301 passages, its manifest says 300"),
        ({"num_docs": ROWS - 1}, r"params.index.json: has 299 passages, its manifest says 300"),
        ({"num_docs": 2**40}, "says that it is of 1099511627776 passages"),
        ({"num_docs": 0}, "says that it is of 0 passages"),
        ({"num_docs": "300"}, "says that it is of '300' passages"),
        ({"num_docs": None}, "says that it is of None passages"),
        ({"method": "bm25+"}, r"its method is bm25\+"),
        ({"idf_method": "robertson"}, "its idf_method is robertson"),
    ],
)
def test_parameters_that_lead_astray(index, changed, problem):
    path = index / PARAMETERS
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    without_sums(index)
    with pytest.raises(UserError, match=problem):
        start(index)


def test_fewer_passages_than_the_lists_name(index):
    path = index / PARAMETERS
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_docs": ROWS - 1}))
    with pytest.raises(UserError, match=r"names a passage that does not exist|is not a score of BM25"):
        Bm25Index.load(index)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"files": {"../corpus.jsonl": {"bytes": 1, "xxh3": "0" * 32}}}, "'../corpus.jsonl' is not a name of a file"),
        ({"files": {"/etc/passwd": {"bytes": 1, "xxh3": "0" * 32}}}, "'/etc/passwd' is not a name of a file"),
        ({"files": {"..": {"bytes": 1, "xxh3": "0" * 32}}}, "is not a name of a file"),
        ({"files": {}}, "has no checksum of data.csc.index.npy"),
        ({"files": {name: {"bytes": "1", "xxh3": "0" * 32} for name in BM25_FILES}}, "is not a size and checksum"),
        ({"files": {name: {"bytes": 1, "xxh3": "zz"} for name in BM25_FILES}}, "is not a size and checksum"),
        ({"files": 3}, "has no checksums"),
        ({"kind": "dense", "file": "../../etc/passwd", "dimension": 3}, "is not a name of a file"),
        ({"kind": "dense", "file": "a\0b", "dimension": 3}, "is not a name of a file"),
        ({"kind": "dense", "file": "x.index"}, "has no entry dimension"),
        ({"kind": "other"}, "kind is 'other'"),
        ({"rows": True}, "rows is True"),
        ({"rows": "300"}, "rows is '300'"),
        ({"stemmer": ["english"]}, "stemmer is"),
        ({"version": "2"}, "its format is '2'"),
        ({"version": 2.0}, "version is 2.0"),
        ({"version": -1}, "its format is -1"),
        ({"surprise": 1}, "unknown entry surprise"),
    ],
)
def test_manifests_that_lie(index, changed, problem):
    """Even with a checksum that fits: whoever changes the contents can make one."""
    path = index / "manifest.json"
    values = json.loads(path.read_text()) | changed
    del values["xxh3"]
    path.write_text(json.dumps(values | {"xxh3": seal(values)}))
    with pytest.raises(UserError, match=problem):
        start(index)


@pytest.mark.parametrize("name", BM25_FILES)
def test_pointers_of_git_lfs(index, name):
    (index / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 12\n")
    for strip in (lambda _: None, without_sums):
        strip(index)
        with pytest.raises(UserError, match=rf"{name}: is a Git LFS pointer, not the file: run git lfs pull"):
            start(index)
        assert [damage.path.name for damage in verify(index)] == [name]


def test_large_files_are_left_to_verify_and_named(index, capsys, monkeypatch):
    start(index)
    assert "the checksums of its 6 files hold" in capsys.readouterr().out
    monkeypatch.setattr(
        index_check, "START_BYTES", (index / VOCABULARY).stat().st_size + (index / PARAMETERS).stat().st_size
    )
    start(index)
    said = capsys.readouterr().out
    assert all(name in said for name in (DATA, INDICES, INDPTR))
    assert PARAMETERS not in said
    assert f"searchr1 verify {index} compares them" in said
    array(index, DATA, lambda values: values * np.float32(0.999))
    (index / LARGEST).unlink()
    with pytest.raises(UserError, match=r"largest\.npy: is missing"):
        start(index)
    assert {damage.path.name for damage in verify(index)} == {DATA, LARGEST}


def test_an_index_of_the_first_format_is_served_with_a_line_that_says_so(index, made, capsys):
    without_sums(index)
    corpus = Corpus(made[0])
    found = load_index(flags(index_path=index), corpus).search(QUERIES, 3)
    assert found == load_index(flags(index_path=made[1]), corpus).search(QUERIES, 3)
    assert "was built before checksums were kept; only the structure of its files is checked" in capsys.readouterr().out
    assert checked_by(index) == "its structure; it has no checksums"
    assert checked_by(made[1]) == "checksums"
    assert list(verify(index)) == []


def test_what_the_parent_has_checked_is_not_checked_again_unless_it_changed(index, made, capsys):
    corpus, args = Corpus(made[0]), flags(index_path=index)
    checked = start(index)
    assert checked == state_of(files_of(index, open_manifest(index), "bm25"))
    assert "hold" in capsys.readouterr().out
    load_index(args, corpus, checked)
    assert "hold" not in capsys.readouterr().out
    flip(index / DATA, 90_000)
    with pytest.raises(UserError, match=f"{DATA}: has changed since it was written"):
        load_index(args, corpus, checked)


def test_a_folder_that_is_no_index(tmp_path):
    assert "is not a finished index" in str(next(verify(tmp_path)))


def test_several_workers_are_reported_once(index, made, monkeypatch, capsys):
    passed = []
    monkeypatch.setattr(
        server_cli, "serve_in_workers", lambda listener, worker, count, ready: passed.append(worker.run) or 0
    )
    words = ["--index_path", str(index), "--corpus_path", str(made[0]), "--retriever_name", "bm25", "--port", "0"]
    assert server_cli.main([*words, "--host", "127.0.0.1", "--workers", "2"]) == 0
    assert capsys.readouterr().out.count("the checksums of its 6 files hold") == 1
    assert passed[0].args[1] == state_of(index / name for name in BM25_FILES)
    flip(index / VOCABULARY, 100)
    with pytest.raises(UserError, match=VOCABULARY):
        server_cli.main([*words, "--host", "127.0.0.1", "--workers", "2"])
