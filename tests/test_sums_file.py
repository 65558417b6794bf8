"""The file that holds sums: any damage to it is noticed, and a stranger's leads nowhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import xxhash
from support.bit_flips import flipped

from searchr1.files.checksums import MAX_BYTES, FileSum, read_sums, write_sums

SUMS = {"a/b.bin": FileSum(12, "0123456789abcdef" * 2), "ü \udcff.txt": FileSum(0, "99aa06d3014798d86001c324468d497f")}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_sums(tmp_path / "sums.json", SUMS, step=7)
    return tmp_path / "sums.json"


def signed(content: object) -> bytes:
    """A file whose own sum fits, as anybody can write one: the XXH3-128 of the sorted, compact text without it."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return json.dumps(content | {"xxh3": xxhash.xxh3_128(text.encode()).hexdigest()}).encode()  # type: ignore[operator]


def test_what_was_written_is_read(path: Path) -> None:
    found = read_sums(path)
    assert found.files == SUMS
    assert found.fields == {"step": 7}
    assert [file.name for file in path.parent.iterdir()] == ["sums.json"]


def test_every_single_flipped_bit_is_noticed_or_harmless(path: Path) -> None:
    harmless = set()
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        with flipped(path, bit):
            try:
                found = read_sums(path)
            except ValueError as error:
                assert str(error).startswith(("is damaged", "has changed"))  # noqa: PT017  # most flips, but not all
            else:
                assert (found.files, found.fields) == (SUMS, {"step": 7})
                harmless.add(data[bit // 8 - 5 : bit // 8 + 5])
    assert all(b"\\u" in around for around in harmless), harmless  # \u00fc and \u00FC are the same letter


def test_every_shortened_file_is_noticed(path: Path) -> None:
    data = path.read_bytes()
    for length in range(len(data) - 2):  # the last is the end of the line
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"is damaged|has changed"):
            read_sums(path)


GOOD = {"bytes": 1, "xxh3": "0" * 32}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"format": 2, "files": {}}, "has format 2, this searchr1 knows 1; update searchr1"),
        ({"files": {}}, "has format None"),
        ({"format": 1, "files": {"/etc/passwd": GOOD}}, "leads out of the folder"),
        ({"format": 1, "files": {"a/../../b": GOOD}}, "leads out of the folder"),
        ({"format": 1, "files": {"a\0b": GOOD}}, "leads out of the folder"),
        ({"format": 1, "files": {"": GOOD}}, "leads out of the folder"),
        ({"format": 1, "files": {"a": {"bytes": 1}}}, "no size and checksum of 'a'"),
        ({"format": 1, "files": {"a": 5}}, "no size and checksum of 'a'"),
        ({"format": 1, "files": {"a": GOOD | {"bytes": -1}}}, "size -1"),
        ({"format": 1, "files": {"a": GOOD | {"bytes": True}}}, "size True"),
        ({"format": 1, "files": {"a": GOOD | {"xxh3": ""}}}, "checksum ''"),
        ({"format": 1, "files": {"a": GOOD | {"xxh3": "A" * 32}}}, "checksum 'AAA"),
    ],
)
def test_a_strangers_file_is_rejected(path: Path, content: object, problem: str) -> None:
    path.write_bytes(signed(content))
    with pytest.raises(ValueError, match=problem):
        read_sums(path)


DEEP = [b"[" * 200_000, b'{"a":' * 100_000]


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"files": {}}', b"9" * 5000, *DEEP])
def test_what_is_no_table_is_rejected(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"is damaged|has changed"):
        read_sums(path)


def test_what_would_block_or_never_end_is_not_read(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="no regular file"):
        read_sums(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="no regular file"):
        read_sums(path)


def test_a_file_of_absurd_size_is_not_read(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match=r"is damaged \(more than 64 MiB"):
        read_sums(path)
