"""Damaged and hostile corpora, page stores and row tables: named before use, or harmless; never followed, never executed."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from searchr1 import caches
from searchr1.errors import UserError
from searchr1.files import checksums as sealed
from searchr1.retrieval.index import compiled, file_identity, unpack
from searchr1.retrieval.index import rows as row_table
from searchr1.retrieval.index.corpus import Corpus, Pages
from searchr1.retrieval.index.verify import bytes_of_rows, check_rows

ROWS = [{"id": str(i), "contents": f'"Tïtle {i}"\ntext {i} {i * 7919}', "url": f"https://w.example/{i}"} for i in range(30)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def archive(*members, compress=True):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(buffer.getvalue(), mtime=0) if compress else buffer.getvalue()


def write(path):
    if path.name.endswith(".parquet"):
        table = pyarrow.Table.from_pylist(ROWS)
        pyarrow.parquet.write_table(table, path, write_page_checksum=True)
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(LINES, mtime=0))
    elif path.name.endswith(".tar.gz"):
        path.write_bytes(archive(("README.txt", b"words"), ("wiki.jsonl", LINES)))
    else:
        path.write_bytes(LINES)
    return path


def passages(path):
    corpus = Corpus(path)
    return [corpus[row] for row in range(len(corpus))], corpus.fingerprint(), corpus.peculiarities()


def pages(path):
    store = Pages(path)
    return [store.get(row["url"]) for row in ROWS], len(store), store.get("https://w.example/none")


def flip(path, rng):
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data) * 8)
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.tar.gz", "c.parquet"])
def test_a_flipped_bit_in_a_packed_file_is_named_or_harmless(tmp_path, name):
    good = passages(write(tmp_path / name))
    original = (tmp_path / name).read_bytes()
    rng, named, harmless = random.Random(7), 0, 0
    for _ in range(200):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        (tmp_path / name).write_bytes(original)
        flip(tmp_path / name, rng)
        try:
            found = passages(tmp_path / name)
            assert (found[0], found[2]) == (good[0], good[2])
            harmless += 1
        except UserError as error:
            named += name in str(error)
    assert named + harmless == 200
    assert named > 100


@pytest.mark.parametrize(("read", "name"), [(passages, "c.jsonl.gz"), (pages, "c.parquet")])
def test_a_flipped_bit_in_what_is_used_is_named_or_harmless(tmp_path, monkeypatch, capsys, name, read):
    """Also where the file system says that nothing has changed, as it does of damage on a disk."""
    monkeypatch.setattr(file_identity, "is_unchanged", lambda found, known: found.st_size == known.bytes)
    kept = tmp_path / "kept"
    kept.mkdir()
    good = read(write(kept / name))
    files = sorted(file.relative_to(kept) for file in kept.rglob("*") if file.is_file())
    assert len(files) == (7 if read is passages else 9), "the packed file, the unpacked one, its note, and the table"
    rng = random.Random(3)
    outcomes = {"named": 0, "said": 0, "harmless": 0}
    for number in range(200):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(kept, copy)
        flip(copy / files[number % len(files)], rng)
        capsys.readouterr()
        try:
            assert read(copy / name) == good
            said = "again" in capsys.readouterr().out
            outcomes["said" if said else "harmless"] += 1
        except UserError as error:
            outcomes["named"] += str(copy) in str(error)
    assert sum(outcomes.values()) == 200
    assert outcomes["named"] > 10
    assert outcomes["said"] > 50


def test_verify_reads_every_byte_whatever_the_file_system_says(tmp_path, monkeypatch):
    path = write(tmp_path / "c.jsonl.gz")
    with pytest.raises(UserError, match="nothing is known"):
        list(check_rows(path))
    passages(path)
    read = []
    assert list(check_rows(path, read.append)) == []
    assert sum(read) == bytes_of_rows(path)
    monkeypatch.setattr(file_identity, "is_unchanged", lambda found, known: True)
    monkeypatch.setattr("searchr1.retrieval.index.verify.is_unchanged", lambda found, known: True)
    for file in [file for file in tmp_path.rglob("*") if file.is_file()]:
        original = file.read_bytes()
        flip(file, random.Random(1))
        (damage, *_) = check_rows(path)
        assert damage.path == file
        file.write_bytes(original)
    assert list(check_rows(path)) == []
    unpacked = tmp_path / "c.jsonl.gz.unpacked.jsonl"
    unpacked.write_bytes(LINES[:-1])
    assert [damage.path for damage in check_rows(path)] == [unpacked]


def hostile_table(folder, name, values):
    """A table whose checksums are right, since whoever made it took them."""
    np.save(folder / f"{name}.npy", values, allow_pickle=values.dtype == object)
    values = sealed.read_sealed(folder / row_table.SUMMARY)
    sums = row_table.take_all(folder, [row_table.Path(file) for file in values["files"]])
    values["files"] = {file: {"bytes": known.bytes, "xxh3": known.xxh3} for file, known in sums.items()}
    sealed.write_sealed(folder / row_table.SUMMARY, values)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("starts", np.arange(30)[::-1].copy()),
        ("starts", np.full(30, -5)),
        ("starts", np.full(30, 2**63 - 1)),
        ("starts", np.arange(29)),
        ("starts", np.arange(30.0)),
        ("starts", np.array([print] * 30, dtype=object)),
        ("lengths", np.full(30, 2**32 - 1, dtype=np.uint32)),
        ("sums", np.zeros((30, 1), dtype=np.uint32)),
        ("keys", np.arange(30, dtype=np.uint64)[::-1].copy()),
        ("order", np.full(30, 7)),
        ("order", np.full(30, -1)),
        ("order", np.arange(1, 31)),
    ],
)
def test_a_table_of_the_wrong_structure_is_not_used_even_with_right_checksums(tmp_path, capsys, name, values):
    path = write(tmp_path / "c.jsonl")
    good = pages(path)
    hostile_table(tmp_path / "c.jsonl.pages", name, values)
    capsys.readouterr()
    assert pages(path) == good
    assert "made again" in capsys.readouterr().out


def test_a_header_that_lies_about_its_size_is_not_believed(tmp_path, capsys):
    path = write(tmp_path / "c.jsonl")
    good = passages(path)
    starts = tmp_path / "c.jsonl.passages/starts.npy"
    starts.write_bytes(starts.read_bytes().replace(b"(30,)", b"(3000000000000,)")[:400])
    capsys.readouterr()
    assert passages(path) == good
    assert "starts.npy" in capsys.readouterr().out


def test_a_row_that_changes_while_it_is_used_is_named(tmp_path):
    path = write(tmp_path / "c.jsonl")
    corpus = Corpus(path)
    with path.open("r+b") as file:
        file.seek(LINES.index(b"text 3 "))
        file.write(b"TEXT")
    assert corpus[4]["id"] == "4"
    with pytest.raises(UserError, match=r"--corpus_path .*c\.jsonl: row 4, .* damaged"):
        corpus[3]
    path.write_bytes(b"")
    with pytest.raises(UserError, match="row 30"):
        corpus[29]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"contents": "x"}\n' + b"[" * 100_000, "line 2: .*nested"),
        (b'{"contents": "x"}\n{"contents": "y", "more": ' + b"[" * 300 + b"]" * 300 + b"}", "line 2: .*nested"),
        (b'{"contents": "x"}\n{"contents": ' + b"1" * 5000 + b"}", "line 2: .*4300 digits"),
        (b'{"contents": "x"}\n\n{"contents": "caf\xe9"}\n', r"line 3: not UTF-8 .*0xe9.*save the file as UTF-8"),
        ('{"contents": "x"}\n\x0c{"contents": "中文"}\n'.encode("gbk"), "line 2: not UTF-8"),
        ('{"contents": "x"}\n'.encode("utf-16"), "line 1: not UTF-8, but UTF-16"),
        ('{"contents": "x"}\n'.encode("utf-16-le"), "line 1: not UTF-8, but UTF-16"),
        ('{"contents": "\u2028\x85"}\r\n{"contents": "x"}\r\nbad'.encode(), "line 3: not valid JSON"),
        (b'{"contents": "x"\x00}\n', "line 1: not valid JSON"),
        (b'{"contents": "x"}\r{"contents": "y"}', "line 1: not valid JSON"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, content, problem):
    (tmp_path / "c.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"--corpus_path .*c\.jsonl: {problem}"):
        Corpus(tmp_path / "c.jsonl")


def test_unusual_lines_are_read(tmp_path):
    big = {"contents": "x" * 10_000_000, "n": 1}
    lines = [
        b"\xef\xbb\xbf" + json.dumps({"contents": "marked"}).encode(),
        json.dumps(big).encode(),
        b'{"contents": "first", "contents": "last", "score": NaN, "number": 123456789012345678901234567890}',
        b'{"contents": "nul \\u0000"}',
    ]
    (tmp_path / "c.jsonl").write_bytes(b"\r\n".join(lines))
    assert [len(text) if len(text) > 99 else text for text in Corpus(tmp_path / "c.jsonl").contents()] == [
        "marked", 10_000_000, "last", "nul \0",
    ]  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_without_end_is_rejected_and_does_not_fill_the_memory(tmp_path, monkeypatch, packed):
    for module in ("searchr1.files.text_rows", "searchr1.retrieval.index.unpack"):
        monkeypatch.setattr(f"{module}.MAX_LINE_BYTES", 1 << 20)
    content = b'{"contents": "x"}\n' + b"y" * (3 << 20)
    path = tmp_path / ("c.jsonl.gz" if packed else "c.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(UserError, match="line 2.*longer than 1 MiB" if not packed else "longer than 1 MiB"):
        Corpus(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def header(kind, size, name="x"):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (header(tarfile.XHDTYPE, 8 << 30) + b"\0" * 4096, "8589934592 bytes of names and notes"),
        (header(tarfile.GNUTYPE_LONGNAME, 8 << 30) + b"\0" * 4096, "8589934592 bytes of names and notes"),
        (header(tarfile.GNUTYPE_SPARSE, 1024, "a.jsonl") + b"\0" * 4096, "gaps|cannot unpack"),
        (header(tarfile.REGTYPE, 1 << 50, "a.jsonl") + LINES, "cannot unpack"),
        (header(tarfile.CHRTYPE, 0, "a.jsonl") + b"\0" * 4096, "holds no .jsonl file"),
        (header(tarfile.FIFOTYPE, 0, "a.jsonl") + b"\0" * 4096, "holds no .jsonl file"),
        (header(tarfile.REGTYPE, 0, "a.txt") * 10_050, "more than 10000 files"),
        (header(tarfile.XHDTYPE, 0) * 5000, "cannot unpack"),
    ],
)
def test_an_archive_that_lies_takes_no_memory(tmp_path, content, problem):
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(content))
    with pytest.raises(UserError, match=problem):
        Corpus(tmp_path / "c.tar.gz")
    assert [file.name for file in tmp_path.iterdir()] == ["c.tar.gz"]


def test_unpacking_leaves_room_on_the_disk(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(unpack.shutil, "disk_usage", lambda _: usage._replace(total=1 << 40, free=900 << 20))
    with pytest.raises(UserError, match="only 900 MiB left"):
        Corpus(write(tmp_path / "c.jsonl.gz"))
    assert [file.name for file in tmp_path.iterdir()] == ["c.jsonl.gz"]


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.parquet"])
def test_a_packed_file_in_a_folder_that_cannot_be_written_is_unpacked_into_the_cache(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "data" / name)
    (tmp_path / "data" / f"{name}.unpacked.jsonl.{os.getpid()}.partial").mkdir()  # root may write anywhere
    assert passages(path)[0] == ROWS
    assert "unpacked into the cache" in capsys.readouterr().out
    assert passages(path)[0] == ROWS
    assert "unpack" not in capsys.readouterr().out
    assert list(check_rows(path)) == []
    (tmp_path / "cache/searchr1").rename(tmp_path / "moved")
    (tmp_path / "cache/searchr1").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot unpack it: .*set XDG_CACHE_HOME"):
        Corpus(path)


def test_no_home_folder_and_no_entry_in_the_password_file(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(
        caches.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    assert caches.user_cache() is None
    path = write(tmp_path / "c.jsonl.gz")
    assert passages(path)[0] == ROWS
    shutil.rmtree(tmp_path / "c.jsonl.gz.unpacked.jsonl.passages")
    (tmp_path / f"c.jsonl.gz.unpacked.jsonl.passages.{os.getpid()}.partial").write_text("in the way")
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        Corpus(path)


def test_compiled_code_is_kept_only_where_nobody_else_can_write(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(caches, "temporary_private", lambda name: tmp_path / "temporary")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled.numba.config, "CACHE_DIR", "")
    own, shared, source = tmp_path / "own", tmp_path / "shared", tmp_path / "source"
    source.mkdir(0o755)
    shared.mkdir()
    shared.chmod(0o777)

    def chosen(given=None):
        monkeypatch.setenv(compiled.VARIABLE, str(given)) if given else monkeypatch.delenv(compiled.VARIABLE, raising=False)
        compiled.prepare_cache(source)
        return os.environ.get(compiled.VARIABLE), capsys.readouterr().out

    assert chosen(own) == (str(own), "")
    assert own.stat().st_mode & 0o777 == 0o700
    found, said = chosen(shared)
    assert found == str(tmp_path / "cache/searchr1/numba")
    assert f"{compiled.VARIABLE}={shared}: cannot be written, or others can write to it" in said
    assert chosen() == (None, "")  # beside the source, as numba does it
    (source / "__pycache__").mkdir()
    (source / "__pycache__").chmod(0o777)
    assert chosen()[0] == str(tmp_path / "cache/searchr1/numba")
    (tmp_path / "cache/searchr1/numba").chmod(0o777)
    found, said = chosen()
    assert found == compiled.numba.config.CACHE_DIR == str(tmp_path / "temporary")
    assert "each start takes longer" in said
