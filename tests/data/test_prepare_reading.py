"""Every file format gives the same records, with the lines that people look for."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from searchr1.data.prepare.reading import read_records
from searchr1.errors import UserError

ROWS = [{"id": "a", "question": "Who\nis é?"}, {"id": "b", "question": "When, or where?"}]


def write(path):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row | {"metadata": {"big": "x"}} for row in ROWS]), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix in (".csv", ".tsv"):
        mark = "\t" if path.suffix == ".tsv" else ","
        cells = [f'"{row["question"]}"' for row in ROWS]
        path.write_text(f"\ufeffid{mark}question\na{mark}{cells[0]}\nb{mark}{cells[1]}\n", encoding="utf-8")
    else:
        path.write_text(lines, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("x.jsonl", [1, 2]),
        ("x.jsonl.gz", [1, 2]),
        ("x.json", [1, 2]),
        ("x.ndjson", [1, 2]),
        ("x.parquet", [1, 2]),
        ("x.csv", [2, 4]),
        ("x.tsv", [2, 4]),
    ],
)
def test_formats(tmp_path, name, lines):
    told = []
    records = list(read_records(write(tmp_path / name), told.append, ("metadata",)))
    assert [record.row for record in records] == ROWS
    assert [record.line for record in records] == lines
    assert told[-1] == 1.0


@pytest.mark.parametrize(
    "around",
    [
        "{}",
        '{{"Data": {}, "Domain": "Web"}}',
        '{{"Domain": "unfiltered", "Version": 1.0, "Data": {}}}',
        '\n {{ "data" : {} }}',
    ],
)
def test_lists_of_rows_are_read_one_by_one(tmp_path, around):
    path = tmp_path / "x.json"
    path.write_text(around.format(json.dumps([*ROWS, 3], indent=1)), encoding="utf-8")
    first, second, third = read_records(path)
    assert [first.row, second.row] == ROWS
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all("{" in lines[record.line - 1] for record in (first, second))
    assert (third.row, third.problem) == (None, "expected an object with keys, found int")
    assert "3" in lines[third.line - 1]


def test_bad_lines_are_handed_on_and_the_rest_is_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": 1}\n\n{"id": \n[1]\n{"id": "\xff"}\n{"id": 2}\n')
    records = list(read_records(path))
    assert [record.line for record in records] == [1, 3, 4, 5, 6]
    assert [record.row for record in records] == [{"id": 1}, None, None, None, {"id": 2}]
    assert [record.problem.partition(" (")[0] for record in records[1:4]] == [
        "not valid JSON", "expected an object with keys, found list", "not UTF-8",
    ]  # fmt: skip


def test_a_table_row_with_too_few_columns_is_handed_on(tmp_path):
    (tmp_path / "x.csv").write_text("id,question\n1\n2,Who?\n")
    short, whole = read_records(tmp_path / "x.csv")
    assert (short.line, short.problem) == (2, "has 1 columns, the first line 2")
    assert whole.row == {"id": "2", "question": "Who?"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", r"expected one of \.jsonl"),
        ("x.parquet", b"PAR1", "not readable as parquet"),
        ("x.jsonl.gz", gzip.compress(b'{"id": 1}\n' * 9)[:-12], "not readable"),
        ("x.jsonl.gz", b'{"id": 1}\n', "not readable"),
        ("x.json", b'[{"id": 1},\n {"id": ]', r"x\.json:2: not valid JSON"),
        ("x.json", b'[{"id": 1},\n', r"x\.json:2: not valid JSON"),
        ("x.json", b'[{"id": "\xff"}]', "not UTF-8"),
        ("x.csv", b"id\n\xff\n", r"x\.csv:2: not UTF-8 .*Latin-1"),
        ("x.csv", "id\nWho\n".encode("utf-16"), "UTF-16"),
        ("x.csv", b"id;id\n1;2\n", "two columns have the name 'id'"),
        ("x.jsonl", b"PAR1...", "is a parquet file; name it"),
        ("x.jsonl", gzip.compress(b"{}"), "is gzipped"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
    ],
)
def test_files_that_cannot_be_read_to_the_end(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_records(tmp_path / name))


def test_a_table_shows_what_stands_between_its_columns(tmp_path):
    for mark in (",", ";", "\t"):
        (tmp_path / "x.csv").write_text(f'id{mark}question\n1{mark}"Who, or; what?"\n')
        (record,) = read_records(tmp_path / "x.csv")
        assert record.row == {"id": "1", "question": "Who, or; what?"}
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress((tmp_path / "x.csv").read_bytes()))
    assert list(read_records(tmp_path / "x.csv.gz")) == [record]


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        list(read_records(tmp_path / "x.jsonl"))
