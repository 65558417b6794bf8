"""Corpora as others publish them: a gzipped tar, titles beside texts, rows without id, url or text."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from searchr1.commands import build_index as build
from searchr1.commands import retrieval_server as server_flags
from searchr1.errors import UserError
from searchr1.retrieval.index.bm25_index import Bm25Index
from searchr1.retrieval.index.corpus import Corpus
from searchr1.retrieval.server.batcher import Batcher
from searchr1.retrieval.server.load import load_backend, load_index
from searchr1.retrieval.server.metrics import Metrics

CASES = Path(__file__).resolve().parents[3] / "shared/cases"
ROWS = [{"id": str(number), "contents": f'"Place {number}"\nA harbour, number {number}.'} for number in range(300)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def member(name, content=b"", kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, target
    return info, content


def archive(*members, compress=True, form=tarfile.PAX_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(buffer.getvalue()) if compress else buffer.getvalue()


DEEP = "data00/someone/indexes/" + "deep/" * 30 + "wiki_dump.jsonl"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("wiki-18.jsonl.gz", archive(member(DEEP, LINES))),
        ("wiki-18.jsonl.gz", archive(member(DEEP, LINES), form=tarfile.GNU_FORMAT)),
        ("wiki-18.jsonl", archive(member("wiki_dump.jsonl", LINES), compress=False)),  # after gzip -d
        ("wiki-18.jsonl", archive(member("wiki_dump.jsonl", LINES))),
        ("wiki-18.jsonl", gzip.compress(LINES)),
        ("wiki-18.tar.gz", archive(member("wiki_dump.jsonl", LINES))),
        ("wiki-18.tgz", archive(member("wiki_dump.json", LINES))),
        ("wiki-18.tar", archive(member("wiki_dump.jsonl", LINES), compress=False)),
        (
            "wiki-18.jsonl.gz",
            archive(
                member("data", kind=tarfile.DIRTYPE),
                member("data/._wiki.jsonl", b"from a Mac"),
                member("data/README.txt", b"words"),
                member("../../escape", kind=tarfile.SYMTYPE, target="/etc/passwd"),
                member("/../../tmp/wiki.jsonl", LINES),
                member("data/LICENSE", b"words"),
            ),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_archive_is_read_as_its_rows(tmp_path, name, content):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_bytes(content)
    corpus = Corpus(folder / name)
    assert [corpus[row] for row in (0, 299)] == [ROWS[row] | {"url": ""} for row in (0, 299)]
    assert len(corpus) == 300
    assert corpus.fingerprint() == Corpus(write_plain(tmp_path / "plain.jsonl", LINES)).fingerprint()
    unpacked = f"{name}.unpacked.jsonl"
    assert {file.name for file in folder.iterdir()} == {
        name, unpacked, f"{unpacked}.source.json", f"{unpacked}.passages"
    }  # fmt: skip
    assert (folder / unpacked).read_bytes() == LINES
    assert {file.name for file in tmp_path.iterdir()} == {"data", "plain.jsonl", "plain.jsonl.passages"}


def write_plain(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (archive(member("a.jsonl", LINES), member("b.jsonl", LINES)), r"several files of rows, 'a.jsonl' and 'b.jsonl'"),
        (archive(member("a.txt", LINES)), r"holds no .jsonl file, only 'a.txt'"),
        (archive(member("a.jsonl", kind=tarfile.SYMTYPE, target="/etc/passwd")), r"holds no .jsonl file"),
        (archive(member("a.jsonl", kind=tarfile.LNKTYPE, target="../x")), r"holds no .jsonl file"),
        (archive(member("d", kind=tarfile.DIRTYPE)), r"only nothing"),
        (gzip.compress(archive(member("a.jsonl", LINES), compress=False)[:5000]), r"cannot unpack"),
        (archive(member("a.jsonl", LINES))[:-9], r"cannot unpack"),
        (archive(member("a.jsonl", LINES))[:200] + b"?" * 50 + archive(member("a.jsonl", LINES))[250:], r"cannot unpack"),
        (b"words", r"neither compressed nor an archive"),
    ],
)
def test_an_archive_that_cannot_be_read_is_named_and_leaves_nothing(tmp_path, content, problem):
    (tmp_path / "c.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match=rf"--corpus_path .*c\.jsonl\.gz: .*{problem}"):
        Corpus(tmp_path / "c.jsonl.gz")
    assert [file.name for file in tmp_path.iterdir()] == ["c.jsonl.gz"]


def test_the_published_packing_through_build_index_and_server(tmp_path):
    path = CASES / "wiki18/wiki-18.jsonl.gz"
    if not path.is_file():
        pytest.skip("the cases are not beside this checkout")
    (tmp_path / "wiki-18.jsonl.gz").write_bytes(path.read_bytes())
    words = ["--retriever_name", "bm25", "--corpus_path", str(tmp_path / "wiki-18.jsonl.gz")]
    build.main([*words, "--save_dir", str(tmp_path / "index")])
    corpus = Corpus(tmp_path / "wiki-18.jsonl.gz")
    index = load_index(server_flags.parse([*words, "--index_path", str(tmp_path / "index")]), corpus)
    best = corpus[index.search(["lighthouse number 17"], 1)[0][0][0]]
    assert best["id"] == "17"
    assert best["contents"].startswith('"Place 17"\n')


@pytest.mark.parametrize(
    ("row", "contents"),
    [
        ({"_id": "a1", "title": "Tin Harbour", "text": "A port."}, '"Tin Harbour"\nA port.'),
        ({"id": "a1", "title": " Tin Harbour ", "contents": "A port."}, '"Tin Harbour"\nA port.'),
        ({"id": "a1", "title": "Tin Harbour", "contents": "Tin Harbour\nA port."}, "Tin Harbour\nA port."),
        ({"id": "a1", "title": "Tin", "contents": '"Tin (port)"\nA port.'}, '"Tin (port)"\nA port.'),
        ({"id": "a1", "title": "Tin", "text": "x", "contents": "Tin\nA port."}, "Tin\nA port."),
        ({"id": "a1", "title": "", "text": "A port."}, "A port."),
        ({"id": "a1", "title": None, "text": "A port.", "metadata": {}}, "A port."),
        ({"docid": "a1", "text": "A port."}, "A port."),
        ({"doc_id": "a1", "title": 'The "Tin"', "text": "line\nline"}, '"The "Tin""\nline\nline'),
    ],
)
def test_titles_beside_texts(tmp_path, row, contents):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(row))
    corpus = Corpus(path)
    assert corpus[0] == row | {"id": "a1", "contents": contents, "url": ""}
    assert list(corpus.contents()) == [contents]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row | {"metadata": "m"}]), tmp_path / "c.parquet")
    assert list(Corpus(tmp_path / "c.parquet").contents()) == [contents]


@pytest.mark.parametrize(
    "row", [{"id": 1, "contents": None}, {"id": 1, "title": "x"}, {"text": 3}, ["text"], {"query": "x", "answer": "y"}]
)
def test_a_row_without_text_is_named(tmp_path, row):
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n' + json.dumps(row))
    with pytest.raises(UserError, match=r"line 2: .*not a passage; expected .*title"):
        Corpus(tmp_path / "c.jsonl")


def test_rows_without_id_url_or_text_are_counted_and_served(tmp_path, capsys):
    rows = [
        {"id": None, "contents": '"Tin"\nA port.', "url": None},
        {"contents": "  \n"},
        {"id": 0, "contents": ""},
        {"contents": '"Mire Hill"\nA port of peat.'},
    ]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):  # also when the table is there already
        corpus = Corpus(path)
        assert [(corpus[row]["id"], corpus[row]["url"]) for row in range(4)] == [("0", ""), ("1", ""), (0, ""), ("3", "")]
        assert corpus.peculiarities() == (
            "3 passages without an id, which have their number, counted from 0; "
            "1 passages whose url is null, which have an empty one; 2 empty passages, which are never found"
        )
    words = ["--retriever_name", "bm25", "--corpus_path", str(path)]
    build.main([*words, "--save_dir", str(tmp_path / "index")])
    assert "2 empty passages, which are never found" in " ".join(capsys.readouterr().out.split())

    async def search():
        backend = load_backend(server_flags.parse([*words, "--index_path", str(tmp_path / "index")]), Metrics())
        found = await backend.service._searcher.search(["port", ""], 9)
        await backend.service.aclose()
        return backend.about, found

    about, found = asyncio.run(search())
    assert "2 empty passages" in about["rows"]
    assert [[document["id"] for document, _ in hits] for hits in found] == [["0", "3"], []]


def test_an_index_that_finds_empty_passages_does_not_give_them():
    class Index:
        rows = 5

        def search(self, queries, topk):
            return [[(row, 1.0 - row / 10) for row in range(5)][:topk] for _ in queries]

    corpus = [{"contents": text} for text in ("", "a", " ", "b", "c")]

    async def search(empty):
        batcher = Batcher(Index(), corpus, empty=empty)
        found = await batcher.search(["q"], 2)
        await batcher.aclose()
        return [document["contents"] for document, _ in found[0]]

    assert asyncio.run(search(2)) == ["a", "b"]
    assert asyncio.run(search(0)) == ["", "a"]


def test_a_corpus_of_empty_passages_is_an_error(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"contents": ""}\n{"contents": " "}\n')
    with pytest.raises(UserError, match="has no words"):
        Bm25Index.build(Corpus(tmp_path / "c.jsonl").contents(), tokenizer="multilingual")
