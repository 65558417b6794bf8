"""Corpora and pages: formats, addresses, damage."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1.errors import UserError
from searchr1.retrieval.documents import split_contents
from searchr1.retrieval.index import rows as rows_module
from searchr1.retrieval.index.corpus import Corpus, Pages, canonical_url

ROWS = [{"id": str(i), "contents": f'"Tïtle {i}"\ntext {i} 💥', "url": f"https://w.example/{i}"} for i in range(9)]


def write(path, rows=ROWS):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.parquet"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    corpus = Corpus(write(tmp_path / name))
    assert [corpus[row] for row in range(len(corpus))] == ROWS
    assert list(corpus.contents()) == [row["contents"] for row in ROWS]
    pages = Pages(write(tmp_path / f"pages-{name}"))
    assert len(pages) == 9
    assert pages.get("http://w.example/4").contents == ROWS[4]["contents"]


def test_a_packed_file_is_unpacked_once_and_again_when_it_changes(tmp_path, capsys):
    path = write(tmp_path / "c.jsonl.gz")
    Corpus(path)
    assert "unpacking" in capsys.readouterr().out
    Corpus(path)
    assert "unpacking" not in capsys.readouterr().out
    write(path, ROWS[:2])
    unpacked = tmp_path / "c.jsonl.gz.unpacked.jsonl"
    os.utime(unpacked, (0, 0))
    assert len(Corpus(path)) == 2
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.parametrize(("name", "content"), [("c.jsonl.gz", b"no gzip"), ("c.parquet", b"no parquet"), ("c.txt", b"x")])
def test_damaged_or_unknown_files_are_reported(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"--corpus_path .*{name}"):
        Corpus(path)


def test_truncated_archive_is_reported_and_leaves_nothing(tmp_path):
    path = write(tmp_path / "c.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match="cannot unpack"):
        Corpus(path)
    assert [file.name for file in tmp_path.iterdir()] == ["c.jsonl.gz"]


def test_a_bad_row_is_named_by_its_line(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"contents": "a"}\n\n  \r\n{"contents": "b"}\nbroken\n')
    with pytest.raises(UserError, match=r"--corpus_path .*c.jsonl: line 5: "):
        Corpus(path)
    assert [file.name for file in tmp_path.iterdir()] == ["c.jsonl"]
    path.write_text(path.read_text().replace("broken", '{"contents": 3}'))
    with pytest.raises(UserError, match=r"line 5: .*not a passage"):
        Corpus(path)
    path.write_text(path.read_text().replace("3", '"c"'))
    corpus = Corpus(path)
    assert [corpus[row] for row in range(3)] == [{"contents": text, "id": str(i), "url": ""} for i, text in enumerate("abc")]


def test_a_table_is_made_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "c.jsonl")
    first = Corpus(path)
    scanned = []
    monkeypatch.setattr(rows_module.Rows, "_scan", lambda *_: scanned.append(1))
    assert Corpus(path).fingerprint() == first.fingerprint()
    assert not scanned
    monkeypatch.undo()
    write(path, ROWS[:3])
    os.utime(path, (1, 1))
    assert len(Corpus(path)) == 3
    assert Corpus(path).fingerprint() == hashlib.sha256(path.read_bytes()).hexdigest() != first.fingerprint()


def test_a_folder_that_cannot_be_written_uses_the_cache(tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    path = write(tmp_path / "corpus" / "c.jsonl")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "corpus" / f"c.jsonl.passages.{os.getpid()}.partial").write_text("in the way")  # root may write anywhere
    assert list(Corpus(path).contents()) == [row["contents"] for row in ROWS]
    assert list((tmp_path / "cache").rglob("summary.json"))


def test_nowhere_to_write_is_reported(tmp_path, monkeypatch):
    path = write(tmp_path / "c.jsonl")
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / f"c.jsonl.passages.{os.getpid()}.partial").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the table of its rows"):
        Corpus(path)


def test_a_half_written_table_is_made_again(tmp_path):
    path = write(tmp_path / "c.jsonl")
    Corpus(path)
    (tmp_path / "c.jsonl.passages" / "summary.json").write_text('{"format": 1')
    assert len(Corpus(path)) == len(ROWS)


def test_rows_with_half_surrogate_pairs_and_nan_are_read(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(r'{"contents": "\ud83d half", "score": NaN}')
    assert Corpus(path)[0]["contents"] == "\ud83d half"


@given(lines=st.lists(st.sampled_from(["", "   ", "\r", '{"contents": ""}', '{"contents": "x  "}\r'])), last=st.booleans())
def test_line_offsets_skip_blank_lines_whatever_the_block_size(tmp_path_factory, lines, last):
    lines = ['{"contents": "first"}', *lines]
    path = tmp_path_factory.mktemp("lines") / "c.jsonl"
    path.write_bytes(("\n".join(lines) + "\n" * last).encode())
    expected = [json.loads(line)["contents"] for line in lines if line.strip()]
    before = rows_module.SCAN_BYTES
    try:
        for size in (1, 7, before):
            rows_module.SCAN_BYTES = size
            shutil.rmtree(f"{path}.passages", ignore_errors=True)
            assert list(Corpus(path).contents()) == expected
    finally:
        rows_module.SCAN_BYTES = before


@pytest.mark.parametrize("content", ["", "not json\n", '{"contents": "x"}\n', '{"url": 3}\n', "[]\n"])
def test_bad_pages_are_reported(tmp_path, content):
    path = tmp_path / "pages.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="--pages_path"):
        Pages(path)


def test_missing_files_are_reported(tmp_path):
    with pytest.raises(UserError, match=r"--corpus_path .*no such file"):
        Corpus(tmp_path / "c.jsonl")
    with pytest.raises(UserError, match=r"--pages_path .*no such file"):
        Pages(tmp_path / "p.jsonl")


def test_the_exact_address_goes_first_among_those_that_mean_the_same(tmp_path):
    rows = [{"url": url, "contents": url} for url in ("http://w/A", "https://w/A", "https://w/A/")]
    pages = Pages(write(tmp_path / "p.jsonl", rows))
    for row in rows:
        assert pages.get(row["url"]).contents == row["url"]
    assert pages.get("W/A#part").contents == "http://w/A"
    assert pages.get("w/a") is None


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("https://en.wikipedia.org/wiki/Ada_Lovelace", "en.wikipedia.org/wiki/Ada_Lovelace"),
        ("HTTP://EN.wikipedia.org/wiki/Ada%20Lovelace#Life", "en.wikipedia.org/wiki/Ada_Lovelace"),
        ("https://en.wikipedia.org/index.php/Ada", "en.wikipedia.org/index.php?title=Ada"),
        ("https://en.wikipedia.org/w/index.php?title=Ada", "en.wikipedia.org/w/index.php?title=Ada"),
        ("https://x/wiki/Caf%C3%A9/", "x/wiki/Café"),
        ("https://x/wiki/http://y", "x/wiki/http://y"),
        ("http://[x", "[x"),
        ("", ""),
    ],
)
def test_canonical_url(url, canonical):
    assert canonical_url(url) == canonical


@given(st.text(max_size=40))
def test_canonical_url_takes_any_text(url):
    once = canonical_url(url)
    assert canonical_url(f"https://host/{url}") == canonical_url(f"http://HOST/{url}")
    if "%" not in once and "://" not in once and "#" not in once:
        assert canonical_url(once) == once


@given(st.text(st.characters(exclude_characters="\n\r"), max_size=30), st.text(max_size=60))
def test_contents_split_into_title_and_text(title, text):
    found_title, found_text = split_contents(f'"{title}"\n{text}')
    assert found_title == title.strip()
    assert found_text == text.strip()


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ("only text", ("", "only text")),
        ("Bare title\ntext", ("Bare title", "text")),
        ('""Heroes" (song)"\ntext', ('"Heroes" (song)', "text")),
        ('"Heroes" (song)\ntext', ('"Heroes" (song)', "text")),
        ('"\ntext', ('"', "text")),
        ("", ("", "")),
    ],
)
def test_titles_keep_their_own_quotes(contents, expected):
    assert split_contents(contents) == expected
