"""What lies beside a corpus is used only with the contents that it was made from, whatever the times of the files say."""

from __future__ import annotations

import gzip
import json
import os
import shutil

import pytest

from searchr1.commands import build_index as build
from searchr1.commands import retrieval_server as server_flags
from searchr1.errors import UserError
from searchr1.retrieval.index import file_identity, rows, unpack
from searchr1.retrieval.index.corpus import Corpus, Pages
from searchr1.retrieval.server.load import load_index

BEFORE = b'{"id": "0", "contents": "one two"}\n{"id": "1", "contents": "x"}\n'
AFTER = b'{"id": "0", "contents": "one"}\n{"id": "1", "contents": "two x"}\n'
assert len(BEFORE) == len(AFTER)


def replace(path, content, how):
    """Other contents of the same size with the same time of modification."""
    times = path.stat()
    if how == "in place":
        with path.open("r+b") as file:
            file.write(content)
    else:
        other = path.with_name("other")
        other.write_bytes(content)
        os.replace(other, path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)


@pytest.fixture
def aged(monkeypatch):
    """Files count as written long ago, so that an identity is believed."""
    monkeypatch.setattr(file_identity, "SAME_MOMENT_NS", -(10**18))


@pytest.mark.parametrize("how", ["in place", "replaced"])
@pytest.mark.parametrize("old", [True, False])
def test_a_table_of_other_contents_is_made_again_and_said(tmp_path, capsys, request, how, old):
    if old:
        request.getfixturevalue("aged")
    path = tmp_path / "c.jsonl"
    path.write_bytes(BEFORE)
    before = Corpus(path)
    replace(path, AFTER, how)
    corpus = Corpus(path)
    assert list(corpus.contents()) == ["one", "two x"]
    assert corpus.fingerprint() != before.fingerprint()
    assert "c.jsonl.passages: is not of the present contents of c.jsonl; made again" in capsys.readouterr().out


def test_an_unchanged_file_is_neither_scanned_nor_hashed(tmp_path, monkeypatch, aged):
    path = tmp_path / "c.jsonl"
    path.write_bytes(BEFORE)
    Corpus(path)
    for module, name in ((rows.Rows, "_scan"), (file_identity, "hash_file"), (unpack, "hash_file")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("read again"))
    assert list(Corpus(path).contents()) == ["one two", "x"]


@pytest.mark.parametrize("change", ["touched", "copied", "moved"])
def test_the_same_contents_elsewhere_are_hashed_once_and_not_scanned(tmp_path, monkeypatch, capsys, aged, change):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a/c.jsonl"
    path.write_bytes(BEFORE)
    Corpus(path)
    if change == "touched":
        os.utime(path, (1, 1))
    elif change == "copied":
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        path = tmp_path / "b/c.jsonl"
    else:
        (tmp_path / "a").rename(tmp_path / "b")
        path = tmp_path / "b/c.jsonl"
    monkeypatch.setattr(rows.Rows, "_scan", lambda *_: pytest.fail("scanned again"))
    hashed = []
    hash_file = file_identity.hash_file
    monkeypatch.setattr(file_identity, "hash_file", lambda path: hashed.append(path) or hash_file(path))
    for _ in range(2):
        assert list(Corpus(path).contents()) == ["one two", "x"]
    assert hashed == ([] if change == "moved" else [path])
    assert "made again" not in capsys.readouterr().out


def test_the_table_of_an_earlier_version_is_made_again(tmp_path, capsys):
    path = tmp_path / "c.jsonl"
    path.write_bytes(BEFORE)
    Corpus(path)
    summary = tmp_path / "c.jsonl.passages/summary.json"
    found = path.stat()
    old = {"format": 1, "bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "rows": 9, "sha256": "0" * 64}
    summary.write_text(json.dumps(old))
    assert len(Corpus(path)) == 2
    assert "made again" in capsys.readouterr().out


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "c.jsonl"
    path.write_bytes(BEFORE)
    lines = rows._lines

    def changing(*args):
        yield from lines(*args)
        with path.open("ab") as file:
            file.write(b"\n")

    monkeypatch.setattr(rows, "_lines", changing)
    with pytest.raises(UserError, match="was changed while it was read"):
        Corpus(path)
    assert [file.name for file in tmp_path.iterdir()] == ["c.jsonl"]


@pytest.mark.parametrize("old", [True, False])
def test_what_was_unpacked_from_another_archive_is_unpacked_again(tmp_path, capsys, request, old):
    if old:
        request.getfixturevalue("aged")
    path = tmp_path / "c.jsonl.gz"
    first, second = (gzip.compress(content, mtime=0) for content in (BEFORE, AFTER))
    size = max(len(first), len(second)) + 4
    first, second = (packed + b"\0" * (size - len(packed)) for packed in (first, second))  # of the same size
    path.write_bytes(first)
    Corpus(path)
    assert "unpacking into c.jsonl.gz.unpacked.jsonl, once" in capsys.readouterr().out
    assert list(Corpus(path).contents()) == ["one two", "x"]
    assert capsys.readouterr().out == ""
    replace(path, second, "replaced")
    assert list(Corpus(path).contents()) == ["one", "two x"]
    said = capsys.readouterr().out
    assert "c.jsonl.gz.unpacked.jsonl: is not known to be the contents of c.jsonl.gz; written again" in said
    replace(tmp_path / "c.jsonl.gz.unpacked.jsonl", BEFORE, "in place")
    assert list(Corpus(path).contents()) == ["one", "two x"], "the archive is the user's, not what was unpacked"


def test_what_somebody_else_unpacked_is_not_believed(tmp_path):
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(AFTER))
    for name in ("c.jsonl.gz.unpacked.jsonl", "c.jsonl"):
        (tmp_path / name).write_bytes(BEFORE)
        os.utime(tmp_path / name, (2**31, 2**31))
    assert list(Corpus(path).contents()) == ["one", "two x"]
    assert (tmp_path / "c.jsonl").read_bytes() == BEFORE


def test_rows_that_download_has_unpacked_are_used(tmp_path, monkeypatch):
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(AFTER))
    unpack.unpack(path, tmp_path / "c.jsonl", "--save_path")
    monkeypatch.setattr(unpack, "unpack", lambda *_: pytest.fail("unpacked twice"))
    assert list(Corpus(path).contents()) == ["one", "two x"]


def test_pages_go_the_same_way(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"url": "http://w/a", "contents": "A"}\n{"url": "http://w/bb", "contents": "B"}\n')
    Pages(path)
    replace(path, b'{"url": "http://w/aa", "contents": "A"}\n{"url": "http://w/b", "contents": "B"}\n', "in place")
    pages = Pages(path)
    assert pages.get("http://w/a") is None
    assert pages.get("http://w/b").contents == "B"


@pytest.mark.parametrize("index_path", [True, False])
def test_an_index_of_a_corpus_with_other_contents_is_rejected(tmp_path, index_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(BEFORE)
    words = ["--retriever_name", "bm25", "--corpus_path", str(path)]
    build.main([*words, "--save_dir", str(tmp_path / "index")])
    replace(path, AFTER, "in place")
    flags = [*words, "--index_path", str(tmp_path / "index")] if index_path else words
    if index_path:
        with pytest.raises(UserError, match=r"was built from another corpus .* build-index --overwrite"):
            load_index(server_flags.parse(flags), Corpus(path))
    else:
        assert load_index(server_flags.parse(flags), Corpus(path)).search(["two"], 9)[0][0][0] == 1
