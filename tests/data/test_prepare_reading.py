"""Every file format gives the same records, with the lines that people look for."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from searchr1.data.reading import read_records
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


DEEP = "not valid JSON (lists and objects are nested more than 200 deep)"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"question": ' + b"[" * 100_000, DEEP),
        (b'{"question": ' + b"[" * 300 + b"]" * 300 + b"}", DEEP),
        (b'{"id": ' + b"7" * 5000 + b"}", "not valid JSON (Exceeds the limit (4300 digits)"),
        (b'{"id": "caf\xe9"}', "not UTF-8 (invalid continuation byte, byte 0xe9); it may be Latin-1"),
        ('{"id": "中文"}'.encode("gbk"), "not UTF-8"),
        (b'{"id": "a\x00"}', "not valid JSON (Invalid control character at character 10)"),
        (b'{"id": 1', "not valid JSON (Expecting ',' delimiter at character "),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_line_of_a_bad_row_is_the_one_an_editor_shows(tmp_path, line, problem, end):
    """Whatever else ends a line for `str.splitlines` stands inside rows: JSON's own lines end with line feeds."""
    first = '{"id": "\u2028 \x85 \u2029", "form\\u000cfeed": 1}'
    path = tmp_path / "x.jsonl"
    path.write_bytes(end.join(["\ufeff" + first, "", "\x0c", first, ""]).encode() + line + end.encode() + first.encode())
    records = list(read_records(path))
    bad = [record for record in records if record.row is None]
    assert [record.line for record in bad] == [5]
    assert bad[0].problem.startswith(problem)
    assert [record.line for record in records if record.row] == [1, 4, 6]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", 'id,question\n1,"a\nb"\n2,caf\xe9\n'.encode("latin-1"), r"x\.csv:4: not UTF-8 .*0xe9"),
        ("x.csv", "id,question\r\n1,a\r\n2,中文\r\n".encode("gbk"), r"x\.csv:3: not UTF-8"),
        ("x.tsv", "id\tquestion\n".encode("utf-16-le"), r"x\.tsv:1: not UTF-8, but UTF-16"),
        ("x.jsonl", '{"id": 1}\n'.encode("utf-16-be"), r"x\.jsonl:1: not UTF-8, but UTF-16"),
        ("x.jsonl.gz", gzip.compress('{"id": 1}\n'.encode("utf-16")), r"x\.jsonl\.gz:1: not UTF-8, but UTF-16"),
        (
            "x.json",
            '[{"id": "a"},\r\n {"id": "\u2028"},\r\n {"id": "caf\xe9"}]'.encode("latin-1", "replace"),
            r"x\.json:3: not",
        ),
        ("x.json", b'[{"id":\n 1,\n "b": }]', r"x\.json:3: not valid JSON \(Expecting value at character 7\)"),
        ("x.json", b'[{"id": 1},\n' + b'{"a":' * 100_000, r"x\.json:2: .*nested"),
        ("x.json", b"[" * 100_000, r"x\.json:1: .*nested"),
        ("x.json", b'[{"id": 1},\n{"id": ' + b"7" * 5000 + b"}]", r"x\.json:2: .*4300 digits"),
        ("x.json", b'[{"id": 1}]\n[{"id": 2}]', r"x\.json:1: more follows after the end of the list"),
        ("x.parquet", b"PAR1" + b"\xff" * 200 + b"PAR1", "not readable as parquet"),
    ],
)
def test_hostile_and_foreign_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_records(tmp_path / name))


def test_long_lines_are_read_and_endless_ones_rejected(tmp_path, monkeypatch):
    long = "x" * 10_000_000
    for name, content in (("x.jsonl", json.dumps({"id": long})), ("x.csv", f'id,question\n"{long}",\n')):
        (tmp_path / name).write_text(content)
        assert next(iter(read_records(tmp_path / name))).row["id"] == long
    monkeypatch.setattr("searchr1.files.text_rows.MAX_LINE_BYTES", 1 << 20)
    for name in ("x.jsonl", "x.jsonl.gz", "x.csv"):
        content = b'{"id": 1}\n' + b"y" * (3 << 20)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        with pytest.raises(UserError, match=rf"{name}:2: the line is longer than 1 MiB"):
            list(read_records(tmp_path / name))


def test_a_packed_list_that_is_a_bomb_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr("searchr1.data.reading.USUAL_BYTES", 1 << 20)
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(b"[" + b" " * (20 << 20) + b"]"))
    with pytest.raises(UserError, match=r"x\.json\.gz: holds more than 1 MiB of JSON"):
        list(read_records(tmp_path / "x.json.gz"))


def test_a_quote_that_is_not_closed_loses_no_row_in_silence(tmp_path, monkeypatch):
    rows = 'id,question\n1,"Who?"\n2,"Where?\n3,When?\n4,Why?\n'
    (tmp_path / "x.csv").write_text(rows)
    whole, broken = read_records(tmp_path / "x.csv")
    assert whole.row == {"id": "1", "question": "Who?"}
    assert (broken.line, broken.row) == (3, None)
    assert "a quote that is not closed" in broken.problem
    (tmp_path / "x.csv").write_text('id,question\n1,"a\nb"\n2,5" disk\n3,"say ""x"""')
    assert [record.row["question"] for record in read_records(tmp_path / "x.csv")] == ["a\nb", '5" disk', 'say "x"']
    monkeypatch.setattr("searchr1.data.reading.MAX_LINE_BYTES", 1000)
    (tmp_path / "x.csv").write_text(rows + "5,What?\n" * 1000)
    with pytest.raises(UserError, match=r"x\.csv:3: not readable .*is a quote not closed"):
        list(read_records(tmp_path / "x.csv"))
    monkeypatch.undo()
    csv.field_size_limit(1 << 17)


def test_two_columns_of_one_name_are_named(tmp_path):
    pq.write_table(pa.table([[1], [2]], names=["id", "id"]), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="two columns have the name 'id'"):
        list(read_records(tmp_path / "x.parquet"))


def test_a_small_parquet_file_that_repeats_a_long_text_takes_no_memory(tmp_path):
    """300 kB that unpack to a terabyte: read one row at a time, where texts are long."""
    long = "x" * 2_000_000
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 500_000, pa.int32()), pa.array([long]))
    pq.write_table(pa.table({"question": column}), tmp_path / "x.parquet", compression="zstd")
    assert (tmp_path / "x.parquet").stat().st_size < 1 << 20
    tracemalloc.start()
    records = read_records(tmp_path / "x.parquet")
    assert all(len(next(records).row["question"]) == len(long) for _ in range(100))
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()
